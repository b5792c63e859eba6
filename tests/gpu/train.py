"""(c) Training by wall clock on the GPU: the recipe's `distill` stage on the kit's words, its steps chosen from the
speed of a short probe so that all of it, the last evaluation included, ends within --minutes.

Of a kit with text, the stages before it run first: its vocabulary, the teachers' vectors, its words. While it trains,
the student of the newest checkpoint goes to --out as fp16 safetensors of at most 16 MB each, with the
metrics: a machine that is taken away leaves the last of them. `shards.json` says which tensors lie where; `join` makes
a model folder of them again, here or anywhere.

    python tests/gpu/train.py --kit /tmp/gpu-kit --out "$OUT" --minutes 8 distill.batch_size=2048 ...
    python tests/gpu/train.py join --shards FOLDER --out student
"""

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from kit import recipe_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from tokenizer_build.files import read_json, write_json
from vocabshrink.models.families import without_pooler
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.models.student import read_student, save_student
from vocabshrink.run.engine import Context, Run, run_stage
from vocabshrink.run.folder import RunDir
from vocabshrink.run.stage import STAGES, stages_of
from vocabshrink.stages import training
from vocabshrink.stages.inputs import shared_modules

SHARD_BYTES = 15_000_000
RESERVE = 45  # seconds kept for what comes after the last step: evaluation, the student's folder, the last shards


def write_shards(tensors: dict[str, torch.Tensor], out: Path, about: dict) -> None:
    """Tensors in fp16 as files of at most SHARD_BYTES, each whole or not there; a large one lies in slices of rows."""
    shards, sizes, index = [{}], [0], {}
    for name, tensor in tensors.items():
        rows = tensor.half().contiguous()
        each = max(1, SHARD_BYTES // max(1, rows[:1].numel() * 2)) if rows.ndim else 1
        for number, part in enumerate(rows.split(each) if rows.ndim else [rows]):
            size = part.numel() * 2
            if sizes[-1] + size > SHARD_BYTES:
                shards.append({})
                sizes.append(0)
            shards[-1][f"{name}#{number}"] = part.clone()
            sizes[-1] += size
            index.setdefault(name, []).append([len(shards) - 1, number])
    for number, shard in enumerate(shards):
        save_file(shard, out / "partial.safetensors")
        (out / "partial.safetensors").rename(out / f"student-{number:02}.safetensors")
    write_json(out / "shards.json", about | {"tensors": index})


def join(shards: Path, out: Path) -> None:
    """The student's folder, as `save_student` writes it, of the shards and the vocabulary beside them."""
    about, files = read_json(shards / "shards.json"), {}
    state = {}
    for name, places in about["tensors"].items():
        parts = []
        for file, number in places:
            if file not in files:
                files[file] = load_file(shards / f"student-{file:02}.safetensors")
            parts.append(files[file][f"{name}#{number}"].float())
        state[name] = torch.cat(parts) if parts[0].ndim else parts[0]
    config = AutoConfig.for_model(**about["config"])
    student = AutoModel.from_config(config, **without_pooler(config))
    student.load_state_dict(state)
    save_student(out, student, None, shards / "vocab", ModuleSettings(about["pooling"], about["normalize"]))
    print(f"{out}: the student of step {about['step']}")


class Watcher(threading.Thread):
    """Sends every new checkpoint's student to `out`."""

    def __init__(self, run: RunDir, out: Path, about: dict):
        super().__init__(daemon=True)
        self.run_dir, self.out, self.about, self.ended = run, out, about, threading.Event()

    def run(self) -> None:
        seen, folder = 0, self.run_dir.stage("distill") / "checkpoints/last"
        while not self.ended.wait(2):
            try:
                step = read_json(folder / "meta.json")["step"]
                if step == seen:
                    continue
                tensors = load_file(folder / "model.safetensors")
            except (OSError, ValueError):  # between two checkpoints' names
                continue
            student = {n.removeprefix("student."): t for n, t in tensors.items() if n.startswith("student.")}
            write_shards(student, self.out, self.about | {"step": step})
            shutil.copy(self.run_dir.path / "metrics.jsonl", self.out / "metrics.jsonl")
            seen = step


def prepare(kit: Path, place: Path, overrides: list[str]) -> Path:
    """The folder of the stages before `distill`: the kit's own, or one where they run now on its text."""
    if (kit / "run").is_dir():
        return (kit / "run").resolve()
    given = ["vectors.batch_size=1024"] if torch.cuda.is_available() else []
    recipe = recipe_of(kit, [*given, *overrides])
    for name in stages_of(recipe)[: stages_of(recipe).index("distill")]:
        run_stage(Run(recipe, RunDir(place)), name)
    return place.resolve()


def context_of(kit: Path, before: Path, place: Path, overrides: list[str]) -> Context:
    """The `distill` stage of the kit's recipe, in a run's folder at `place`. before: of `prepare`."""
    recipe, run = recipe_of(kit, overrides), RunDir(place)
    for name in ("vocab", "vectors", "encode"):
        if (before / name).is_dir() and not run.stage(name).exists():
            run.stage(name).parent.mkdir(parents=True, exist_ok=True)
            run.stage(name).symlink_to(before / name)
    return Context(recipe, run, stage=STAGES["distill"])


def probe(kit: Path, before: Path, place: Path, overrides: list[str], steps: int) -> tuple[float, float, dict]:
    """(seconds of a step, seconds before the first one, the student's config) from a run of a few steps."""
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    context = context_of(kit, before, place, [*overrides, f"distill.steps={steps}", "distill.evaluations=0"])
    result = training.distill(context)
    rows = [row for row in context.dir.metrics() if row["kind"] == "train"]
    first, last = rows[len(rows) // 2], rows[-1]
    each = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
    return each, time.monotonic() - began - result["seconds"], read_json(context.folder / "student/config.json")


def train(arguments: argparse.Namespace) -> None:
    kit, out, began = arguments.kit, arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    overrides = ["distill.checkpoint_minutes=0.75", *arguments.overrides]
    before = prepare(kit, arguments.work / "before", overrides)
    print(f"{time.monotonic() - began:.0f} s for the stages before", flush=True)
    shutil.copytree(before / "vocab", out / "vocab", dirs_exist_ok=True)
    each, around, config = probe(kit, before, arguments.work / "probe", overrides, arguments.probe_steps)
    left = 60 * arguments.minutes - (time.monotonic() - began) - around - arguments.reserve
    steps = max(2, int(left / max(each, 1e-6)))
    print(f"{each:.3f} s a step, {around:.0f} s around them: {steps} steps in {arguments.minutes} minutes", flush=True)
    shutil.rmtree(arguments.work / "run", ignore_errors=True)
    context = context_of(kit, before, arguments.work / "run", [*overrides, f"distill.steps={steps}"])
    modules = shared_modules(context.recipe)[0]
    about = {"config": config, "pooling": modules.pooling, "normalize": modules.normalize, "step": 0}
    watcher = Watcher(context.dir, out, about)
    watcher.start()
    result = training.distill(context)
    watcher.ended.set()
    watcher.join()
    write_shards(read_student(context.folder / "student").state_dict(), out, about | {"step": steps})
    shutil.copy(context.dir.path / "metrics.jsonl", out / "metrics.jsonl")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    speed = result["tokens"] / result["seconds"]
    said = {"device": device, "minutes": (time.monotonic() - began) / 60, "tokens_per_second": speed} | result
    write_json(out / "result.json", said)
    print(json.dumps(said, indent=1, default=str))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    joining = "join" in sys.argv[1:2]
    if joining:
        sys.argv.pop(1)
    parser.add_argument("--out", type=Path, required=True)
    if joining:
        parser.add_argument("--shards", type=Path, required=True)
        arguments = parser.parse_args()
        return join(arguments.shards, arguments.out)
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--reserve", type=float, default=RESERVE, help="seconds kept for what follows the last step")
    parser.add_argument("--probe-steps", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-train"))
    parser.add_argument("overrides", nargs="*", help="settings over the recipe's")
    return train(parser.parse_args())


if __name__ == "__main__":
    main()
