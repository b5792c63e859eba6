"""The stages from text to artifact. Each reads files of the stage before and writes its own folder, DONE last.

A finished stage is skipped; an unfinished training stage resumes. A finished stage made by other settings is refused,
with the first setting that differs, rather than silently reused or overwritten.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from tokenizer_build.compare import compare
from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer, save_tokenizer
from tokenizer_build.trainers import TRAINERS
from vocabshrink.batches import Batcher, PieceTable, cut_segments
from vocabshrink.distillation import Distillation
from vocabshrink.dual_training import LOSSES_OF_MODE, DualTraining, HeadTraining
from vocabshrink.evaluation import HeldOut, held_out_texts, read_rated_pairs, torch_embedder
from vocabshrink.export import export_embedder
from vocabshrink.layer_map import layer_pairs
from vocabshrink.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.loop import make_accelerator, train
from vocabshrink.losses import LOSSES, MASKED_LM, check_losses
from vocabshrink.measure import measure_systems
from vocabshrink.recipe import Recipe, TrainingSection, Weighted, dump_recipe
from vocabshrink.run_dir import RunDir, read_json, write_json, write_text
from vocabshrink.runtime import build_index
from vocabshrink.student import build_student, save_student
from vocabshrink.teacher import (
    MaskedLMHead,
    Teacher,
    check_folder,
    eps_and_activation,
    file_sha256,
    load_head,
    load_teacher,
    resolve_model,
)

# Settings that change how fast or how visibly a run goes, but not what it makes.
IMMATERIAL = {"processes", "threads", "trackers", "evaluations", "checkpoint_minutes"}


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def say(text: str) -> None:
    if main_process():
        print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """A recipe and its folder, with what several stages read."""

    recipe: Recipe
    dir: RunDir

    def __post_init__(self):
        dual, distill = self.recipe.dual, self.recipe.distill
        if dual:
            check_losses("dual", dual.losses, LOSSES_OF_MODE[dual.mode])
        if distill:
            of_dual_alone = {"teacher_masked_lm", "parameters_down", "parameters_up"}
            check_losses("distill", distill.losses, set(LOSSES) - of_dual_alone)

    @cached_property
    def teacher_folder(self) -> Path:
        folder = resolve_model(self.recipe.teacher.model)
        check_folder(folder, self.recipe.teacher.sha256)
        return folder

    @cached_property
    def words(self) -> tuple[Lexicon, WordStream]:
        return Lexicon.load(self.dir.stage("encode")), WordStream.load(self.dir.stage("encode"))

    @property
    def vocab(self) -> Path:
        return self.dir.stage("vocab")

    def teacher(self) -> Teacher:
        """The recipe's teacher, fresh from its folder, with the head that the teacher stage trained for it."""
        section = self.recipe.teacher
        teacher = load_teacher(str(self.teacher_folder), pooling=section.pooling, normalize=section.normalize)
        trained = self.dir.stage("teacher")
        if teacher.head is None and (trained / "DONE").is_file():
            teacher.head = load_head(trained / "head", teacher.backbone)
        return teacher

    def settings_of(self, stage: str) -> dict:
        """The settings that decide a stage's output: its own sections and those of every stage before it."""
        sections = {
            "count": ("corpus", "vocabulary"),
            "vocab": (),
            "encode": ("teacher",),
            "teacher": ("masked_lm_head", "seed"),
            "dual": ("student", "dual"),
            "distill": ("distill",),
            "export": ("delivery", "evaluation", "index"),
            "report": (),
        }
        chosen: dict = {}
        for name in STAGES:
            for section in sections[name]:
                value = getattr(self.recipe, section)
                value = value.model_dump(mode="json", exclude=IMMATERIAL) if hasattr(value, "model_dump") else value
                chosen[section] = value
            if name == stage:
                return chosen
        raise KeyError(stage)

    @cached_property
    def held_out(self) -> HeldOut:
        lexicon, stream = self.words
        _, held_out = cut_segments(
            stream,
            lexicon,
            unit="sentence",
            max_pieces=126,
            min_words=4,
            held_out_every=self.recipe.corpus.held_out_every,
        )
        return held_out_texts(stream, lexicon, held_out, self.recipe.evaluation.sentences, self.recipe.seed)


def first_difference(before, now, path: str = "") -> str | None:
    """The first key whose value differs, as `key (before -> now)`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            found = first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if before == now else f"{path} ({json.dumps(before)} -> {json.dumps(now)})"


def run_stage(run: Run, name: str) -> bool:
    """Runs one stage unless it is done. Returns whether it ran.

    Raises:
        InputError: an earlier stage is missing, or the stage is done under other settings.
    """
    function, needs = STAGES[name]
    missing = [n for n in needs(run.recipe) if not run.dir.is_done(n)]
    if missing:
        raise InputError(
            f"{run.dir.path}: stage {name} needs {missing[0]} first: vocabshrink {missing[0]} RECIPE, or run"
        )
    settings, kept = run.settings_of(name), run.dir.stage(name) / "settings.json"
    # a report is cheap, and stale as soon as any stage ran again
    if run.dir.is_done(name) and name != "report":
        different = first_difference(read_json(kept), settings)
        if different:
            raise InputError(
                f"{kept.parent}: made by another recipe: {different}: give the run another name, or delete the folder"
            )
        say(f"{name}: done before")
        return False
    if main_process():
        run.dir.start(name)
        write_json(kept, settings)
        write_text(run.dir.path / "recipe.yaml", dump_recipe(run.recipe))
        run.dir.write_environment()
    wait_for_everyone()
    started = time.monotonic()
    training = name in ("teacher", "dual", "distill")
    summary = function(run) if training or main_process() else {}
    if main_process():
        run.dir.finish(name, {"minutes": round((time.monotonic() - started) / 60, 2)} | summary)
        shown = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
        say(f"{name}: {(time.monotonic() - started) / 60:.1f} min  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
    wait_for_everyone()
    return True


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe asks for, in order."""
    optional = {"teacher": recipe.masked_lm_head, "dual": recipe.dual, "distill": recipe.distill}
    return [name for name in STAGES if name not in optional or optional[name]]


# ------------------------------------------------------------------------------------------------ text


def saying_millions(stage: str, unit: str, every: int) -> Callable[[int], None]:
    """A progress callback that adds up what it is given and says so every few millions."""
    seen = 0

    def progress(more: int) -> None:
        nonlocal seen
        before, seen = seen, seen + more
        if seen // (every * 1_000_000) > before // (every * 1_000_000):
            say(f"{stage}: {seen / 1e6:,.0f} M {unit}")

    return progress


def count(run: Run) -> dict:
    corpus = run.recipe.corpus
    counts = count_words(
        corpus.sources,
        column=corpus.column,
        lowercase=run.recipe.vocabulary.lowercase,
        processes=corpus.processes,
        progress=saying_millions("count", "characters", every=50),
    )
    write_counts(counts, run.dir.stage("count") / "counts.parquet")
    return {"words": sum(counts.values()), "distinct_words": len(counts)}


def vocab(run: Run) -> dict:
    section, folder = run.recipe.vocabulary, run.vocab
    counts = read_counts(run.dir.stage("count") / "counts.parquet")
    tokenizer = Tokenizer.from_file(str(run.teacher_folder / "tokenizer.json"))
    if section.tokenizer:
        given = load_tokenizer(section.tokenizer)
        if not isinstance(given.model, WordPiece):
            kind = type(given.model).__name__
            raise InputError(
                f"vocabulary.tokenizer {section.tokenizer}: {kind}, not WordPiece: name a WordPiece tokenizer"
            )
        pieces = sorted(given.get_vocab(), key=given.token_to_id)
    else:
        pieces = TRAINERS[section.trainer](
            counts, section.size, required=section.required, teacher_vocabulary=tokenizer.get_vocab()
        )
    save_tokenizer(pieces, folder, lowercase=section.lowercase)
    comparison = compare(
        counts, {"teacher": run.teacher_folder / "tokenizer.json", "student": folder / "tokenizer.json"}
    )
    student = Tokenizer.from_file(str(folder / "tokenizer.json"))
    examples = segmentation_examples(counts, tokenizer, student)
    write_json(folder / "comparison.json", comparison | {"examples": examples})
    return {"pieces": len(pieces), "comparison": comparison}


def segmentation_examples(
    counts: dict[str, int], teacher: Tokenizer, student: Tokenizer, number: int = 12
) -> list[dict]:
    """Words that the two cut into different numbers of pieces, spread over frequencies, for the report."""
    words = sorted((w for w in counts if w.isalpha() and len(w) > 5), key=lambda w: (-counts[w], w))[:20_000]
    found = []
    for word in words[200 :: max(1, len(words) // 400)]:
        pieces = {
            name: t.encode(word, add_special_tokens=False).tokens
            for name, t in (("teacher", teacher), ("student", student))
        }
        if len(pieces["student"]) != len(pieces["teacher"]):
            found.append({"word": word} | pieces)
    return found[:: max(1, len(found) // number)][:number]


def encode(run: Run) -> dict:
    corpus = run.recipe.corpus
    return encode_corpus(
        read_blocks(corpus.sources, corpus.column),
        run.teacher_folder,
        run.vocab,
        run.dir.stage("encode"),
        processes=corpus.processes,
        progress=saying_millions("encode", "words", every=10),
    )


# -------------------------------------------------------------------------------------------- training


def make_batcher(
    run: Run, stage: TrainingSection, teacher: Teacher, sides: tuple[str, ...], accelerator, **options
) -> Batcher:
    lexicon, stream = run.words
    table = PieceTable(lexicon, teacher.table.num_embeddings)
    training, _ = cut_segments(
        stream,
        lexicon,
        unit=getattr(stage, "unit", "line"),
        max_pieces=stage.max_length - 2,
        min_words=4,
        held_out_every=run.recipe.corpus.held_out_every,
    )
    share = stage.batch_size // (accelerator.num_processes * stage.gradient_accumulation)
    group = options.get("group_size", 1)
    if share < group:
        raise InputError(
            f"batch_size {stage.batch_size} over {accelerator.num_processes} processes and "
            f"{stage.gradient_accumulation} accumulation steps leaves less than one group of {group}: make it larger"
        )
    return Batcher(
        table,
        stream,
        lexicon,
        training,
        batch_size=share,
        seed=run.recipe.seed,
        sides=sides,
        mask=stage.mask,
        max_pieces=stage.max_length - 2,
        **options,
    )


def fingerprint(run: Run, stage: str) -> str:
    return json.dumps(run.settings_of(stage), sort_keys=True)


def evaluator(run: Run, teacher: Teacher, accelerator) -> Callable | None:
    """Evaluation during training: rank agreement with the teacher as it is now, and the recipe's rated pairs.

    Made before training, which may change the teacher; None on the processes that do not evaluate.
    """
    if not accelerator.is_main_process:
        return None
    recipe, held_out = run.recipe, run.held_out
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    pooling, normalize = recipe.teacher.pooling, recipe.teacher.normalize
    backbone = teacher.backbone.to(accelerator.device)
    of_teacher = torch_embedder(backbone, run.teacher_folder, pooling, normalize, max_length=128)(held_out.texts)

    def evaluate(task) -> dict:
        embed = torch_embedder(task.student, run.vocab, pooling, normalize, max_length=128)
        vectors = embed(held_out.texts)
        return {
            "rank_agreement": held_out.rank_agreement(vectors, of_teacher),
            "neighbour_overlap": held_out.neighbour_overlap(vectors, of_teacher),
        } | {name: pairs.spearman(embed) for name, pairs in rated.items()}

    return evaluate


def teacher(run: Run) -> dict:
    """Trains a masked-LM head on a teacher that has none."""
    stage, teacher = run.recipe.masked_lm_head, run.teacher()
    if teacher.head is not None:
        raise InputError(f"{run.teacher_folder} has a masked-LM head already: remove masked_lm_head from the recipe")
    torch.manual_seed(run.recipe.seed)
    accelerator = make_accelerator(stage, run.dir)
    table = teacher.table
    teacher.head = MaskedLMHead(
        teacher.config.hidden_size, table.embedding_dim, table.num_embeddings, *eps_and_activation(teacher.config)
    )
    task = HeadTraining(teacher, {"teacher_masked_lm": Weighted()})
    batcher = make_batcher(run, stage, teacher, ("teacher",), accelerator)
    result = train(
        task, batcher, stage, run.dir, "teacher", fingerprint=fingerprint(run, "teacher"), accelerator=accelerator
    )
    if accelerator.is_main_process:
        write_head(run.dir.stage("teacher") / "head", teacher.head)
    return result


def write_head(folder: Path, head: MaskedLMHead) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    }
    tensors = {}
    for key, value in head.state_dict().items():
        part, _, kind = key.partition(".")
        tensors[f"{names[part]}.{kind}" if kind else names[part]] = value.cpu().contiguous()
    save_file(tensors, folder / "model.safetensors")


def dual(run: Run) -> dict:
    stage, teacher = run.recipe.dual, run.teacher()
    uses_masked_lm = bool(MASKED_LM & set(stage.losses))
    if "teacher_masked_lm" in stage.losses and teacher.head is None:
        raise InputError(
            f"dual.mode {stage.mode} needs a masked-LM head and {run.teacher_folder} has none: add a masked_lm_head "
            "section, or choose dual.mode: match"
        )
    torch.manual_seed(run.recipe.seed)
    accelerator = make_accelerator(stage, run.dir)
    evaluate = evaluator(run, teacher, accelerator)
    student, directions, report = build_student(run.recipe.student, teacher, run.vocab)
    say(f"dual: student embeddings {report['embeddings']}; layers {report['layers']}")
    head = new_student_head(student, teacher) if stage.mode == "joint" else None
    # in match mode the teacher stands on both sides, so the map is of its layers to its own
    depth = (teacher if stage.mode == "match" else student).config.num_hidden_layers
    pairs = layer_pairs(stage.layer_map, depth, teacher.config.num_hidden_layers)
    task = DualTraining(stage, teacher, student, pairs, student_head=head, directions=directions)
    sides = {"joint": ("mixed", "student"), "two_stage": ("mixed",), "match": ("mixed", "teacher")}[stage.mode]
    end = stage.p if stage.p_end is None else stage.p_end
    micro_steps = stage.steps * stage.gradient_accumulation * accelerator.num_processes
    batcher = make_batcher(
        run,
        stage if uses_masked_lm else stage.model_copy(update={"mask": 0.0}),
        teacher,
        sides,
        accelerator,
        group_size=stage.group_size,
        p=lambda index: stage.p + (end - stage.p) * min(1.0, index / micro_steps),
    )
    result = train(
        task,
        batcher,
        stage,
        run.dir,
        "dual",
        fingerprint=fingerprint(run, "dual"),
        accelerator=accelerator,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        folder = run.dir.stage("dual")
        save_student(folder / "student", student, head, run.vocab, teacher.pooling, teacher.normalize)
        if any(p.requires_grad for p in teacher.backbone.parameters()):
            teacher.backbone.save_pretrained(folder / "teacher")
    return result | {"start": report}


def new_student_head(student, teacher: Teacher) -> MaskedLMHead:
    """The student's masked-LM head: the teacher's transform where widths agree, else random."""
    width = student.config.hidden_size
    head = MaskedLMHead(width, width, student.config.vocab_size, *eps_and_activation(student.config))
    if teacher.head is not None and teacher.head.dense.weight.shape == head.dense.weight.shape:
        head.dense.load_state_dict(teacher.head.dense.state_dict())
        head.norm.load_state_dict(teacher.head.norm.state_dict())
    return head


def distill(run: Run) -> dict:
    stage, teacher = run.recipe.distill, run.teacher()
    torch.manual_seed(run.recipe.seed)
    accelerator = make_accelerator(stage, run.dir)
    evaluate = evaluator(run, teacher, accelerator)
    student, directions, report = build_student(run.recipe.student, teacher, run.vocab)
    head = new_student_head(student, teacher) if "student_masked_lm" in stage.losses else None
    if run.recipe.dual:
        report = {"from": "dual"} | load_student(run.dir.stage("dual") / "student", student, head)
        trained_teacher = run.dir.stage("dual") / "teacher"
        if trained_teacher.is_dir():
            teacher.backbone.load_state_dict(
                type(teacher.backbone).from_pretrained(trained_teacher).state_dict(), strict=False
            )
    say(f"distill: student from {report}")
    pairs = layer_pairs(stage.layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    task = Distillation(stage, teacher, student, pairs, head=head, directions=directions)
    batcher = make_batcher(run, stage, teacher, ("student", "teacher"), accelerator, group_size=stage.group_size)
    result = train(
        task,
        batcher,
        stage,
        run.dir,
        "distill",
        fingerprint=fingerprint(run, "distill"),
        accelerator=accelerator,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        save_student(run.dir.stage("distill") / "student", student, head, run.vocab, teacher.pooling, teacher.normalize)
    return result | {"start": report}


def load_student(folder: Path, student, head: MaskedLMHead | None) -> dict:
    """Puts a saved student (and head) into a built one, in place."""
    from transformers import BertModel

    student.load_state_dict(BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict())
    saved = load_head(folder, student)
    if head is not None and saved is not None:
        head.load_state_dict(saved.state_dict())
    return {"folder": folder.name, "head": saved is not None}


# -------------------------------------------------------------------------------------------- delivery


def final_student(run: Run, untrained: Path) -> Path:
    """The model folder to ship: the last training stage's, or the untrained student where the recipe trains none."""
    trained = [name for name in ("dual", "distill") if getattr(run.recipe, name)]
    return run.dir.stage(trained[-1]) / "student" if trained else untrained


def export(run: Run) -> dict:
    """Writes the delivery, loads it back, and measures teacher, untrained, trained and delivered side by side."""
    recipe, section, folder = run.recipe, run.recipe.delivery, run.dir.stage("export")
    teacher = run.teacher()
    student, _, _ = build_student(recipe.student, teacher, run.vocab)
    save_student(folder / "untrained", student, None, run.vocab, teacher.pooling, teacher.normalize)
    trained = final_student(run, folder / "untrained")
    about = {"recipe": recipe.name, "teacher_sha256": file_sha256(next(run.teacher_folder.glob("*.safetensors")))}

    def deliver(manifest: dict) -> dict:
        return export_embedder(
            trained,
            folder / "model",
            weights=section.weights,
            group_size=section.group_size,
            max_positions=min(section.max_positions, student.config.max_position_embeddings),
            pooling=teacher.pooling,
            normalize=teacher.normalize,
            budget_bytes=section.budget,
            manifest=manifest,
        )

    deliver(about)
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    figures = measure_systems(
        run.held_out,
        rated,
        teacher_folder=run.teacher_folder,
        untrained=folder / "untrained",
        trained=trained,
        delivered=folder / "model",
        pooling=teacher.pooling,
        normalize=teacher.normalize,
    )
    agreement = figures["rank_agreement"]
    if agreement["delivered"] < agreement["trained"] - section.tolerance:
        raise InputError(
            f"{folder / 'model'}: {section.weights} costs too much: rank agreement {agreement['delivered']} is more "
            f"than delivery.tolerance {section.tolerance} below {agreement['trained']}: use smaller groups or int8"
        )
    figures["parameters_by_block"] = {"teacher": blocks_of(teacher.backbone), "student": blocks_of(student)}
    quality = {name: row for name, row in figures.items() if name not in ("bytes", "latency_ms", "parameters_by_block")}
    figures["bytes"]["delivered"] = deliver(about | {"quality": quality})["delivery_bytes"]
    if recipe.index:
        passages = islice(read_passages(Path(recipe.index.passages)), recipe.index.limit)
        figures["indexed_passages"] = build_index(folder / "model", passages, threads=os.cpu_count() or 1)
    return figures


def blocks_of(model) -> dict[str, int]:
    """Parameters of the piece table, of the other embeddings and of the layers, whatever the family."""
    pieces = model.get_input_embeddings().weight.numel()
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    return {"pieces": pieces, "other embeddings": embeddings - pieces, "layers": model.num_parameters() - embeddings}


def read_passages(path: Path) -> Iterator[dict]:
    """Rows of a JSONL file with a "text"."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}: line {number} is not JSON ({error}): correct or delete it") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: correct index.passages or leave the section out") from None


def report(run: Run) -> dict:
    from vocabshrink.report import write_report  # the report extra is asked for only here

    return {"report": write_report(run.dir).name}


def summarise(run: Run, since: float | None = None) -> dict:
    """Writes and returns summary.json of the run: the export stage's figures and the minutes, from `since` if given."""
    stages = [read_json(run.dir.stage(n) / "summary.json") for n in stages_of(run.recipe) if run.dir.is_done(n)]
    minutes = sum(s["minutes"] for s in stages) if since is None else (time.time() - since) / 60
    figures = read_json(run.dir.stage("export") / "summary.json")
    summary = {"minutes": round(minutes, 2)} | {k: v for k, v in figures.items() if isinstance(v, dict)}
    write_json(run.dir.path / "summary.json", summary)
    return summary


def needs_text(recipe: Recipe) -> list[str]:
    return ["encode"]


def needs_training(recipe: Recipe) -> list[str]:
    return [name for name in ("teacher", "dual", "distill") if name in stages_of(recipe)]


# name -> (function, the stages that must be done before)
STAGES: dict[str, tuple[Callable[[Run], dict], Callable[[Recipe], list[str]]]] = {
    "count": (count, lambda recipe: []),
    "vocab": (vocab, lambda recipe: ["count"]),
    "encode": (encode, lambda recipe: ["vocab"]),
    "teacher": (teacher, needs_text),
    "dual": (dual, lambda recipe: ["encode", *(["teacher"] if recipe.masked_lm_head else [])]),
    "distill": (distill, lambda recipe: ["encode", *(["dual"] if recipe.dual else [])]),
    "export": (export, lambda recipe: ["encode", *needs_training(recipe)]),
    "report": (report, lambda recipe: []),
}
