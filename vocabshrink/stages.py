"""The stages from text to artifact. Each reads files of the stage before and writes its own folder, DONE last.

A finished stage is skipped; an unfinished training stage resumes. A finished stage made by other settings is refused,
with the first setting that differs, rather than silently reused or overwritten.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertModel

from tokenizer_build.compare import compare
from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer, save_tokenizer
from tokenizer_build.trainers import TRAINERS
from vocabshrink.augment import augment_task
from vocabshrink.batches import Batcher, PieceTable, cut_segments
from vocabshrink.delivery import export
from vocabshrink.distillation import LOSSES_OF_DISTILLATION, Distillation, reads_teacher
from vocabshrink.dual_training import LOSSES_OF_MODE, DualTraining, HeadTraining
from vocabshrink.evaluation import HeldOut, held_out_texts, read_rated_pairs, torch_embedder
from vocabshrink.finetune import finetune, train_task_teachers, trains_teacher
from vocabshrink.layer_map import layer_pairs
from vocabshrink.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.loop import make_accelerator, train
from vocabshrink.losses import ACROSS_VOCABULARIES, MASKED_LM, TASK, check_losses
from vocabshrink.quantize import bake, quantization_aware
from vocabshrink.recipe import DistillStage, Recipe, TrainingSection, Weighted, dump_recipe
from vocabshrink.recorded import RecordingBatcher, kinds_kept
from vocabshrink.run_dir import RunDir, read_json, write_json, write_text
from vocabshrink.student import build_student, load_student, save_student, shared_pieces, spellings
from vocabshrink.tasks import Task, read_task
from vocabshrink.teacher import (
    MaskedLMHead,
    Teacher,
    check_folder,
    eps_and_activation,
    load_head,
    load_teacher,
    resolve_model,
)

# Settings that change how fast or how visibly a run goes, but not what it makes.
IMMATERIAL = {"processes", "threads", "trackers", "evaluations", "checkpoint_minutes"}


STUDENTS = ("dual", "distill", "quantize")  # the stages that leave a student, each from the one before


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # The first of a process to be made decides what it sees: on CPUs nobody, unless told of them.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).wait_for_everyone()


def say(text: str) -> None:
    if main_process():
        print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """A recipe and its folder, with what several stages read."""

    recipe: Recipe
    dir: RunDir
    force: bool = False  # export writes a delivery that fails its gates, with the failures in its manifest

    def __post_init__(self):
        dual, finetune = self.recipe.dual, self.recipe.finetune
        if dual:
            check_losses("dual", dual.losses, LOSSES_OF_MODE[dual.mode])
        for name in ("distill", "recovery"):
            if stage := getattr(self.recipe, name):
                check_losses(name, stage.losses, LOSSES_OF_DISTILLATION)
        if finetune:
            for number, phase in enumerate(finetune.phases):
                check_losses(f"finetune.phases.{number}", phase.losses, LOSSES_OF_DISTILLATION - MASKED_LM | TASK)
            if finetune.teacher:
                check_losses("finetune.teacher", finetune.teacher.losses, {"labels"})

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

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The student's and the teacher's."""
        student, teacher = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (self.vocab, self.teacher_folder))
        return student, teacher

    @cached_property
    def shared_pieces(self) -> np.ndarray:
        return shared_pieces(*self.tokenizers)

    def teacher(self) -> Teacher:
        """The recipe's teacher, fresh from its folder, with the head that the teacher stage trained for it."""
        section = self.recipe.teacher
        teacher = load_teacher(str(self.teacher_folder), pooling=section.pooling, normalize=section.normalize)
        trained = self.dir.stage("teacher")
        if teacher.head is None and (trained / "DONE").is_file():
            teacher.head = load_head(trained / "head", teacher.backbone)
        return teacher

    def start_student(self, teacher: Teacher) -> tuple[BertModel, torch.Tensor | None, dict]:
        """`build_student` by the recipe; what extraction by importance measures, it measures on the corpus."""
        section, batch = self.recipe.student, None
        if section.initialize == "extract_importance":
            lexicon, stream = self.words
            limits = {"max_pieces": 126, "min_words": 4, "held_out_every": self.recipe.corpus.held_out_every}
            segments, _ = cut_segments(stream, lexicon, unit="line", **limits)
            table = PieceTable(lexicon, teacher.table.num_embeddings)
            options = {"batch_size": 64, "seed": self.recipe.seed, "sides": ("teacher",)}
            batch = Batcher(table, stream, lexicon, segments, **options).batch(0).teacher
        return build_student(section, teacher, self.vocab, batch=batch, seed=self.recipe.seed)

    @cached_property
    def directions(self) -> torch.Tensor | None:
        """Of `start_student`, for those that load a student which was trained meanwhile. Made when first asked for, so
        it leaves torch's generator as it was: a head is the same whichever task comes first."""
        with torch.random.fork_rng(devices=[]):
            return self.start_student(self.teacher())[1]

    @property
    def students(self) -> dict[str, Path]:
        """The students that the run trains, each from the one before: {stage: folder}."""
        return {name: self.dir.stage(name) / "student" for name in stages_of(self.recipe) if name in STUDENTS}

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return {name: read_task(section, name) for name, section in self.recipe.tasks.items()}

    def settings_of(self, stage: str) -> dict:
        """The settings that decide a stage's output: its own and, of the stages before it, those that it reads."""
        own = {
            "count": ["corpus.sources", "corpus.column", "vocabulary.lowercase"],
            "vocab": ["vocabulary", "teacher"],
            "encode": [],
            # in the teacher's pieces alone, whatever the student's vocabulary
            "teacher": ["corpus", "teacher", "masked_lm_head", "seed"],
            "dual": ["student", "dual", "seed", "corpus"],
            "distill": ["student", "distill", "seed", "corpus"],
            "quantize": ["recovery", "delivery.weights", "delivery.compact"],
            "task_teacher": ["teacher", "tasks", "finetune.teacher"],
            "augment": ["teacher", "tasks", "finetune.augment"],
            "finetune": ["student", "tasks", "finetune"],
            "export": ["student", "delivery", "evaluation", "index"],
            "report": [],
        }
        chosen: dict = {}
        for name in STAGES[stage][1](self.recipe) if stage != "teacher" else []:
            chosen |= self.settings_of(name)
        for path in own[stage]:
            value = self.recipe
            for part in path.split("."):
                value = getattr(value, part)
            chosen[path] = material(value)
        return chosen

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


def material(value):
    """A section as plain values, without what changes nothing but speed or looks."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: material(item) for key, item in value.items() if key not in IMMATERIAL}
    return [material(item) for item in value] if isinstance(value, list) else value


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
    training = name in ("teacher", *STUDENTS, "task_teacher", "finetune")
    summary = function(run) if training or main_process() else {}
    if main_process():
        run.dir.finish(name, {"minutes": round((time.monotonic() - started) / 60, 2)} | summary)
        shown = {k: v for k, v in summary.items() if isinstance(v, (int, float, str))}
        say(f"{name}: {(time.monotonic() - started) / 60:.1f} min  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
    wait_for_everyone()
    return True


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe asks for, in order."""
    finetune = recipe.finetune
    optional = {
        "teacher": recipe.masked_lm_head,
        "dual": recipe.dual,
        "distill": recipe.distill,
        "quantize": recipe.recovery,
        "task_teacher": finetune and finetune.teacher and any(map(trains_teacher, recipe.tasks.values())),
        "augment": finetune and finetune.augment,
        "finetune": finetune,
        "export": recipe.delivery,
    }
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
        given = load_tokenizer(run.teacher_folder if section.tokenizer == "teacher" else section.tokenizer)
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
    table = PieceTable(lexicon, teacher.table.num_embeddings, run.shared_pieces)
    training, _ = cut_segments(
        stream,
        lexicon,
        sides=sides,
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

    Made before training, which may change the teacher; None where there is nothing to measure, and on the processes
    that do not evaluate.
    """
    recipe = run.recipe
    if not accelerator.is_main_process or not (recipe.evaluation.sentences or recipe.evaluation.stsb):
        return None
    held_out = run.held_out if recipe.evaluation.sentences else None
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    pooling, normalize = recipe.teacher.pooling, recipe.teacher.normalize
    backbone = teacher.backbone.to(accelerator.device)
    of_teacher = torch_embedder(backbone, run.teacher_folder, pooling, normalize, max_length=128)(
        held_out.texts if held_out else []
    )

    def evaluate(task) -> dict:
        embed = torch_embedder(task.student, run.vocab, pooling, normalize, max_length=128)
        figures = {name: pairs.spearman(embed) for name, pairs in rated.items()}
        if held_out is None:
            return figures
        vectors = embed(held_out.texts)
        return {
            "rank_agreement": held_out.rank_agreement(vectors, of_teacher),
            "neighbour_overlap": held_out.neighbour_overlap(vectors, of_teacher),
        } | figures

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
    student, directions, report = run.start_student(teacher)
    say(f"dual: student embeddings {report['embeddings']}; layers {report['layers']}")
    head = new_student_head(student, teacher) if stage.mode == "joint" else None
    # in match mode the teacher stands on both sides, so the map is of its layers to its own
    depth = (teacher if stage.mode == "match" else student).config.num_hidden_layers
    pairs = layer_pairs(stage.layer_map, depth, teacher.config.num_hidden_layers, seed=run.recipe.seed)
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
    return distil_into_student(run, "distill", run.recipe.distill)


def quantize(run: Run) -> dict:
    """Trains on through the rounding of the delivery, of its packed weights where it has some, which the student's
    weights then hold exactly."""
    delivery = run.recipe.delivery
    return distil_into_student(run, "quantize", run.recipe.recovery, delivery.compact or delivery.weights)


def distil_into_student(run: Run, name: str, stage: DistillStage, formats=None) -> dict:
    teacher = run.teacher()
    torch.manual_seed(run.recipe.seed)
    accelerator = make_accelerator(stage, run.dir)
    evaluate = evaluator(run, teacher, accelerator)
    student, directions, report = run.start_student(teacher)
    head = new_student_head(student, teacher) if MASKED_LM & set(stage.losses) else None
    stages = [*run.students]
    if before := stages[: stages.index(name)]:
        report = {"from": before[-1]} | load_student(run.students[before[-1]], student, head)
        trained_teacher = run.dir.stage("dual") / "teacher"
        if trained_teacher.is_dir():
            teacher.backbone.load_state_dict(
                type(teacher.backbone).from_pretrained(trained_teacher).state_dict(), strict=False
            )
    say(f"{name}: student from {report}")
    if formats:
        quantization_aware(student, formats)
    task = make_distillation(run, stage, teacher, student, head, directions)
    sides = ("student", "teacher") if reads_teacher(stage.losses) else ("student",)
    batcher = make_batcher(run, stage, teacher, sides, accelerator, group_size=stage.group_size)
    if stage.record_teacher and "teacher" in sides:
        options = {"pooling": teacher.pooling, "normalize": teacher.normalize, "device": accelerator.device}
        backbone = teacher.backbone.to(accelerator.device)
        batcher = RecordingBatcher(batcher, backbone, records_of(run, name, accelerator), stage, **options)
    result = train(
        task,
        batcher,
        stage,
        run.dir,
        name,
        fingerprint=fingerprint(run, name),
        accelerator=accelerator,
        evaluate=evaluate,
    )
    if accelerator.is_main_process:
        if formats:
            bake(student)
        save_student(run.dir.stage(name) / "student", student, head, run.vocab, teacher.pooling, teacher.normalize)
    return result | {"start": report}


# Of a distillation, what decides neither its batches nor what the teacher says of them.
OF_STUDENT = {"layer_map", "losses", "record_teacher", "steps", "learning_rate", "embedding_learning_rate"}
OF_STUDENT |= {"optimizer", "weight_decay", "warmup", "decay", "clip"}


def records_of(run: Run, name: str, accelerator) -> Path:
    """The folder that runs share which see these batches of this text with this teacher."""
    stage = material(getattr(run.recipe, name))
    deciding = run.settings_of("encode") | {"corpus": material(run.recipe.corpus), "seed": run.recipe.seed}
    deciding |= {
        "stage": {key: value for key, value in stage.items() if key not in OF_STUDENT},
        "kinds": kinds_kept(stage["losses"]),
    }
    trained = run.settings_of("dual") if (run.dir.stage("dual") / "teacher").is_dir() else None
    deciding |= {"processes": accelerator.num_processes, "trained teacher": trained}
    text = json.dumps(deciding, sort_keys=True)
    return run.dir.stage(name).parent / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def make_distillation(
    run: Run, stage: DistillStage, teacher: Teacher, student: BertModel, head: MaskedLMHead | None, directions
) -> Distillation:
    """The task of a stage, with what the chosen losses must know of the two vocabularies."""
    layers = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    across = bool(ACROSS_VOCABULARIES & set(stage.losses))
    return Distillation(
        stage,
        teacher,
        student,
        layer_pairs(stage.layer_map, *layers, seed=run.recipe.seed),
        head=head,
        directions=directions,
        shared=torch.from_numpy(run.shared_pieces) if across else None,
        spelling=torch.from_numpy(spellings(*run.tokenizers)) if across else None,
    )


def augment(run: Run) -> dict:
    """Writes the augmented training rows of every task."""
    section, teacher = run.recipe.finetune.augment, run.teacher()
    return {
        name: augment_task(
            task,
            teacher,
            run.dir.stage("augment") / f"{name}.jsonl",
            p=section.p,
            copies=section.copies,
            candidates=section.candidates,
            seed=0,
            progress=saying_millions("augment", "rows", every=1),
        )
        for name, task in run.tasks.items()
    }


def report(run: Run) -> dict:
    from vocabshrink.report import write_report  # the report extra is asked for only here

    return {"report": write_report(run.dir).name}


def summarise(run: Run, since: float | None = None) -> dict:
    """Writes and returns summary.json of the run: what delivery and tasks measured, and the minutes, from `since` if
    given."""
    done = {n: read_json(run.dir.stage(n) / "summary.json") for n in stages_of(run.recipe) if run.dir.is_done(n)}
    minutes = sum(s["minutes"] for s in done.values()) if since is None else (time.time() - since) / 60
    summary = {"minutes": round(minutes, 2)} | {k: v for k, v in done.get("export", {}).items() if isinstance(v, dict)}
    if "finetune" in done:
        summary["tasks"] = done["finetune"]
    write_json(run.dir.path / "summary.json", summary)
    return summary


def needed(*names: str) -> Callable[[Recipe], list[str]]:
    """Those of the stages that a recipe asks for."""
    return lambda recipe: [name for name in names if name in stages_of(recipe)]


# name -> (function, the stages that must be done before)
STAGES: dict[str, tuple[Callable[[Run], dict], Callable[[Recipe], list[str]]]] = {
    "count": (count, needed()),
    "vocab": (vocab, needed("count")),
    "encode": (encode, needed("vocab")),
    "teacher": (teacher, needed("encode")),
    "dual": (dual, needed("encode", "teacher")),
    "distill": (distill, needed("encode", "teacher", "dual")),
    "quantize": (quantize, needed("encode", "teacher", "dual", "distill")),
    "task_teacher": (train_task_teachers, needed()),
    "augment": (augment, needed("teacher")),
    "finetune": (finetune, needed("encode", "teacher", "dual", "distill", "task_teacher", "augment")),
    "export": (export, needed("encode", "teacher", "dual", "distill", "quantize", "finetune")),
    "report": (report, needed()),
}
