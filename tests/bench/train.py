"""Training speed as ratios: our distillation step beside a plain Hugging Face loop and textbrewer's GeneralDistiller,
two processes beside one, stored vectors beside the teacher in the step; same models, text and batches, in one run.

Beside the other loops, teacher and student are of one shape and read one vocabulary, as textbrewer needs, and learn all
hidden states (TinyBERT's MSE) in bfloat16. Each system runs in processes of its own, on one core, in turns, so that a
machine that slows down slows all of them. The plain loop is what a page of documentation gives: texts in random order,
tokenised and padded in the collator, all hidden states of both models, masked MSE, AdamW, transformers' default
attention, the student's dropout on. `plain-tuned` is the same with what we found to be faster on a CPU, eager attention
and no dropout: what it leaves is the loop's own price. Tokens are real pieces, padding not counted.

Stored vectors replace the teacher's pass, so what they save depends on the teacher's size. Two pairs are measured, each
with the same losses of sentence vectors on both sides: a teacher of all-mpnet-base-v2's shape with mpnet_7mb's student
(`vectors_ratio`), and the given teacher with a student of its own shape (`vectors_same_shape_ratio`).

    python tests/bench/train.py --corpus docs.jsonl --teacher FOLDER --out artifacts/bench/train.json

Refuses to overwrite the stored figures where a ratio fell by more than a fifth (--accept does).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, BertConfig, MPNetConfig

from tokenizer_build.corpus import read_blocks
from tokenizer_build.files import read_json, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Batcher, PieceTable, cut_segments
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.data.vectors import SAMPLE, store_vectors, stored_vectors
from vocabshrink.models.loading import resolve_model
from vocabshrink.models.spelling import shared_pieces
from vocabshrink.models.student import build_student
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.folder import RunDir, processor
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, StudentSection
from vocabshrink.training.loop import Job, make_accelerator, train
from vocabshrink.training.task import Distillation

ROOT = Path(__file__).parents[2]
ROUNDS, WARM = 3, 3  # WARM: steps that are not counted
FALL = 0.8  # of a stored ratio: less is a regression
OF_VECTORS = {"sentence_cosine": 1.0, "batch_similarity": 20.0}  # losses that stored vectors and a live teacher share
SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "mpnet": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
FLAGSHIP = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 960}


@dataclass(frozen=True)
class Load:
    """What every system is given. work: the folder of the text (lines.json) and, in `encode`, of its word ids."""

    teacher: str
    work: str
    steps: int
    batch_size: int
    max_length: int
    precision: str = "bf16"
    student: dict | None = None  # of `StudentSection`, over the teacher's own shape
    variant: str = ""  # of ours, to try what may pay on a GPU: "compile", "bf16-teacher"
    losses: dict | None = None  # of ours; None: all hidden states
    stored: bool = False  # ours reads stored vectors instead of running the teacher

    def lines(self) -> list[str]:
        return json.loads((Path(self.work) / "lines.json").read_text())


def prepare(load: Load, corpus: list[str], lines: int) -> None:
    """Writes the text and its word ids, once for all systems."""
    work = Path(load.work)
    found = list(islice((line for block in read_blocks(corpus) for line in block if len(line) > 20), lines))
    (work / "lines.json").write_text(json.dumps(found))
    encode_corpus([found], load.teacher, load.teacher, work / "encode")
    made_model(work / "mpnet", Path(load.teacher), "mpnet")


def made_model(folder: Path, tokenizer_from: Path, kind: str, **size: int) -> Path:
    """A model of the shape of all-MiniLM-L6-v2 or all-mpnet-base-v2 with random weights, which cost as much as trained
    ones, and another one's tokenizer. size: of another shape."""
    config = {"minilm": BertConfig, "mpnet": MPNetConfig}[kind]
    pieces = load_tokenizer(tokenizer_from).get_vocab_size()
    config = config(**SHAPES[kind] | {"vocab_size": pieces} | size)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    return folder


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Speed:
    """Tokens a second of a loop that reports each step's tokens, from step WARM on."""

    def __init__(self):
        self.tokens, self.steps, self.started = 0, 0, 0.0

    def step(self, tokens: int) -> None:
        self.steps += 1
        if self.steps > WARM:
            self.tokens += tokens
        if self.steps == WARM:
            self.started = self.now()

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def tokens_per_second(self) -> float:
        return self.tokens / (self.now() - self.started)


def ours(load: Load) -> float:
    """`train` on a distillation of the library, batches and log included."""
    if not (rows := metrics_of(load)):  # of another process than the main one
        return 0.0
    first, last = next(row for row in rows if row["step"] >= WARM), rows[-1]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def metrics_of(load: Load) -> list[dict]:
    """The rows that `train` logs of a distillation of the library."""
    teacher = load_teacher(load.teacher)
    tokenizer = load_tokenizer(load.teacher)
    shared = shared_pieces(tokenizer, tokenizer)
    options = {"batch_size": load.batch_size, "max_length": load.max_length, "precision": load.precision}
    options |= {"losses": load.losses or {"hidden_mse": 1.0}}
    stage = DistillStage(steps=load.steps + WARM, evaluations=0, checkpoint_minutes=1e6, **options)
    torch.manual_seed(0)
    student, directions, *_ = build_student(StudentSection(**(load.student or {})), teacher, Path(load.teacher))
    lexicon, stream = (kind.load(Path(load.work) / "encode") for kind in (Lexicon, WordStream))
    limits = {"unit": "line", "max_pieces": load.max_length - 2, "min_words": 2, "held_out_every": 10**9}
    segments, _ = cut_segments(stream, lexicon, **limits)
    with tempfile.TemporaryDirectory() as place:
        of_batches, of_task = {"sides": ("student", "teacher")}, {"directions": directions}
        if load.stored:
            vectors = made_vectors(Path(place), len(segments.starts), teacher.config.hidden_size)
            of_batches = {"sides": ("student",), "vectors": vectors}
            bank = torch.from_numpy(vectors(slice(SAMPLE)))
            of_task["bank"] = bank, torch.randn(bank.shape[1], student.config.hidden_size)
        depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        task = Distillation(stage, teacher, student, layer_pairs("uniform", *depths), **of_task)
        if load.variant == "compile":
            task.teacher, task.student = (torch.compile(model, dynamic=True) for model in (task.teacher, task.student))
        elif load.variant == "bf16-teacher":
            task.teacher.bfloat16()
        table = PieceTable(lexicon, teacher.table.num_embeddings, shared)
        of_batches |= {"batch_size": load.batch_size, "max_pieces": load.max_length - 2, "seed": 0}
        batcher, run = Batcher(table, stream, lexicon, segments, **of_batches), RunDir(Path(place) / "run")
        train(task, batcher, stage, Job(run, "bench", "any"), make_accelerator(stage, run))
        if os.environ.get("RANK", "0") != "0":
            return []
        return [row for row in run.metrics() if row["kind"] == "train"]


def made_vectors(folder: Path, count: int, width: int) -> Callable[..., np.ndarray]:
    """Vectors as the `vectors` stage stores them, of made-up values, which cost as much to read as real ones."""
    rng = np.random.default_rng(0)

    def embed(texts: list[str]) -> np.ndarray:
        return rng.standard_normal((len(texts), width), np.float32)

    store_vectors(folder, "teacher", [""] * count, embed, lambda done: lambda more: None)
    return stored_vectors(folder, {"teacher": 1.0}, set())


def plain_parts(load: Load, *, tuned: bool = False) -> tuple:
    """(teacher, student, batches): the models as `from_pretrained` gives them, the student's layers the teacher's or,
    for another shape, random; and padded batches of the same text in random order, tokenised by the collator."""
    tokenizer, options = AutoTokenizer.from_pretrained(load.teacher), {"attn_implementation": "eager"} if tuned else {}
    teacher, student = (AutoModel.from_pretrained(load.teacher, dtype=torch.float32, **options) for _ in range(2))
    if load.student:
        config = student.config
        for key, value in load.student.items():
            setattr(config, key, value)
        student = AutoModel.from_config(config, **options)

    def collate(texts: list[str]):
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=load.max_length, return_tensors="pt"))

    torch.manual_seed(0)
    made = DataLoader(load.lines(), load.batch_size, shuffle=True, collate_fn=collate, drop_last=True)
    student.train(not tuned)
    return teacher.eval().to(device()), student.to(device()), made


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def plain(load: Load, *, tuned: bool = False) -> float:
    """The plain loop."""
    teacher, student, loader = plain_parts(load, tuned=tuned)
    ours, theirs = student.config, teacher.config
    every = theirs.num_hidden_layers // ours.num_hidden_layers
    up = torch.nn.Linear(ours.hidden_size, theirs.hidden_size) if ours.hidden_size != theirs.hidden_size else None
    up = up.to(device()) if up else torch.nn.Identity()
    optimizer, speed = torch.optim.AdamW([*student.parameters(), *up.parameters()], lr=5e-5), Speed()
    for batch in islice(endless(loader), load.steps + WARM):
        batch = {name: values.to(device()) for name, values in batch.items()}
        with torch.autocast(device().type, torch.bfloat16, enabled=load.precision == "bf16"):
            with torch.no_grad():
                target = teacher(**batch, output_hidden_states=True).hidden_states
            states = student(**batch, output_hidden_states=True).hidden_states
            mask = batch["attention_mask"].unsqueeze(-1)
            count = mask.sum()
            loss = sum(
                ((up(state) - target[every * number]).float().pow(2) * mask).sum() / count / target[0].shape[-1]
                for number, state in enumerate(states[1:], 1)
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        speed.step(int(count))
    return speed.tokens_per_second()


def textbrewer(load: Load) -> float:
    """textbrewer's GeneralDistiller with its own masked `hidden_mse` of every layer, given the same batches, and
    autocast around it: by itself it trains in float32. ImportError where it is not installed."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    teacher, student, loader = plain_parts(load)
    layers = range(1, student.config.num_hidden_layers + 1)
    matches = [
        {"layer_T": layer, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse", "weight": 1} for layer in layers
    ]
    speed = Speed()

    def adaptor(batch, outputs):
        return {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    def counted(batch):
        speed.step(int(batch["attention_mask"].sum()))  # of the step that begins
        return batch

    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5)
    with tempfile.TemporaryDirectory() as place:
        settings = TrainingConfig(output_dir=place, device=device(), ckpt_steps=10**9)
        distillation = DistillationConfig(intermediate_matches=matches, hard_label_weight=0, kd_loss_weight=0)
        distiller = GeneralDistiller(settings, distillation, teacher, student, adaptor, adaptor)
        with torch.autocast(device().type, torch.bfloat16, enabled=load.precision == "bf16"), distiller:
            options = {"num_steps": load.steps + WARM, "callback": None, "max_grad_norm": 1.0}
            with contextlib.redirect_stdout(sys.stderr):
                distiller.train(optimizer, loader, batch_postprocessor=counted, output_hidden_states=True, **options)
    return speed.tokens_per_second()


def of_flagship(load: Load) -> Load:
    """Losses of sentence vectors, a teacher of all-mpnet-base-v2's shape and mpnet_7mb's student."""
    return replace(load, teacher=str(Path(load.work) / "mpnet"), student=FLAGSHIP, losses=OF_VECTORS)


SYSTEMS: dict[str, Callable[[Load], float | None]] = {
    "ours": ours,
    "plain": plain,
    "plain-tuned": lambda load: plain(load, tuned=True),
    "textbrewer": textbrewer,
    "mpnet in the step": lambda load: ours(of_flagship(load)),
    "mpnet's vectors": lambda load: ours(replace(of_flagship(load), stored=True)),
    "teacher in the step": lambda load: ours(replace(load, losses=OF_VECTORS)),
    "teacher's vectors": lambda load: ours(replace(load, losses=OF_VECTORS, stored=True)),
    "two processes": ours,
}
RATIOS = {  # of tokens a second
    "plain_loop_ratio": ("ours", "plain"),
    "textbrewer_ratio": ("ours", "textbrewer"),
    "vectors_ratio": ("mpnet's vectors", "mpnet in the step"),
    "vectors_same_shape_ratio": ("teacher's vectors", "teacher in the step"),
    "two_processes_ratio": ("two processes", "ours"),
}


def measure(name: str, load: Load) -> float | None:
    """A system's tokens a second, in one process on one core, or two on a core each. None where it cannot be had."""
    command = [sys.executable, str(Path(__file__)), "--system", name, "--load", json.dumps(asdict(load))]
    if name == "two processes":
        launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no"
        launch += " --mixed_precision no --main_process_port 0"
        command = [sys.executable, "-m", *launch.split(), *command[1:]]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [json.loads(line)["speed"] for line in done.stdout.splitlines() if line.startswith('{"speed"')]
    if done.returncode or not found:
        raise SystemExit(f"{name}: measuring failed: {done.stderr[-2000:]}")
    return max(found, key=lambda speed: speed or 0)


def ratios_of(speeds: dict[str, list[float]]) -> dict[str, float | None]:
    """{row: the median over rounds of two systems' ratio}, None where one of them was not measured."""
    found = {}
    for row, (ours, theirs) in RATIOS.items():
        pairs = [(a, b) for a, b in zip(speeds.get(ours, []), speeds.get(theirs, []), strict=False) if a and b]
        found[row] = round(statistics.median(a / b for a, b in pairs), 3) if pairs else None
    return found


def fallen(stored: dict, found: dict) -> list[str]:
    """What of the stored ratios, or of the GPU's figures, fell by more than a fifth, as sentences."""
    lost = []
    for name, before in stored.items():
        now = found.get(name)
        if isinstance(before, dict):
            lost += [f"{name}.{sentence}" for sentence in fallen(before, now or {})]
        elif isinstance(before, int | float) and now is not None and now < FALL * before:
            lost.append(f"{name} fell from {before:.2f} to {now:.2f}")
    return lost


def store(out: Path, kind: str, entry: dict, *, accept: bool) -> None:
    """Puts the figures of a "cpu" or "gpu" into the file; SystemExit instead where one fell by more than a fifth."""
    stored = read_json(out) if out.is_file() else {"cpu": None, "gpu": None}
    lost = fallen((stored[kind] or {}).get("rows", {}), entry["rows"])
    if lost and not accept:
        raise SystemExit(f"{out} is left as it was: {'; '.join(lost)}. Mend it, or write --accept")
    before = (stored[kind] or {}).get("rows", {}).items()
    kept = {name: value for name, value in before if entry["rows"].get(name) is None}
    write_json(out, stored | {kind: entry | {"rows": entry["rows"] | kept}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+")
    parser.add_argument("--teacher")
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/train.json"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--accept", action="store_true", help="store ratios that fell")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.system:
        torch.set_num_threads(1)
        try:
            speed = SYSTEMS[arguments.system](Load(**json.loads(arguments.load)))
        except ImportError as error:
            print(f"{arguments.system}: {error.name} is not installed, left out", file=sys.stderr)
            speed = None
        print(json.dumps({"speed": speed}), flush=True)
        return
    with tempfile.TemporaryDirectory() as work:
        size = arguments.steps, arguments.batch_size, arguments.max_length
        load = Load(str(resolve_model(arguments.teacher).resolve()), work, *size)
        prepare(load, arguments.corpus, arguments.lines)
        speeds: dict[str, list] = {name: [] for name in arguments.systems}
        for turn in range(arguments.rounds):
            for name in arguments.systems:
                speeds[name].append(measure(name, load))
                shown = f"{speeds[name][-1]:,.0f} tokens/s" if speeds[name][-1] else "not to be had here, left out"
                print(f"round {turn + 1} of {arguments.rounds}: {name}: {shown}", flush=True)
    rows = ratios_of(speeds)
    for name, ratio in rows.items():
        print(f"{name:<22} {'not measured' if ratio is None else f'{ratio:.2f}'}")
    if all(speeds.get("plain-tuned", [None])):
        tuned = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["plain-tuned"], strict=True))
        print(f"{'against plain-tuned':<22} {tuned:.2f}")
    store(arguments.out, "cpu", {"device": processor(), "rows": rows}, accept=arguments.accept)


if __name__ == "__main__":
    main()
