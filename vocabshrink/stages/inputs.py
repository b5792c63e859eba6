"""What several stages read, as functions of a stage's context: the teacher, the words, the student as it starts."""

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from tokenizer_build.corpus import read_lines
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, read_values
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Batch, Batcher, PieceTable, Segments, cut_segments
from vocabshrink.data.held_out import LEAST_WORDS, HeldOut, held_out_texts
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.data.tasks import Task, read_task
from vocabshrink.models.families import positions_of
from vocabshrink.models.forward import ModuleSettings, module_settings, piece_reader
from vocabshrink.models.loading import check_folder, load_config, resolve_model
from vocabshrink.models.projection import fit_layers
from vocabshrink.models.spelling import shared_pieces
from vocabshrink.models.student import Start, build_student, save_student, source_layers
from vocabshrink.models.teacher import Teacher, load_head, load_teacher
from vocabshrink.run.engine import Context, main_process
from vocabshrink.run.recipe import Recipe, TeacherSection

HELD_OUT = {"max_pieces": 126, "min_words": LEAST_WORDS}  # of the segments that no training batch holds


def teacher_folder(section: TeacherSection, name: str = "teacher") -> Path:
    """The folder of the teacher that the recipe's section of this name describes, checked."""
    check_folder(folder := resolve_model(section.model, section.revision, key=f"{name}.model"), section.sha256)
    return folder


def given_tokenizer(recipe: Recipe) -> Path | None:
    """The folder or file of the tokenizer that is taken as it is, where the recipe names one."""
    if (named := recipe.vocabulary.tokenizer) == "teacher":
        return teacher_folder(recipe.teacher)
    if named == "start" and recipe.student.start:
        return resolve_model(recipe.student.start, key="student.start")
    if named and not os.path.exists(os.path.expanduser(named)):
        raise InputError(f"vocabulary.tokenizer {named}: no such file or folder")
    return Path(named).expanduser() if named else None


def source_config(recipe: Recipe, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that the student starts from: student.start's, else the teacher's."""
    return load_config(resolve_model(recipe.student.start, key="student.start")) if recipe.student.start else teacher


def teacher_modules(section: TeacherSection) -> ModuleSettings:
    """How a teacher pools, and its prompts: the recipe's own words, else its folder's."""
    return module_settings(teacher_folder(section), section.pooling, section.normalize)


def prompt_of(section: TeacherSection) -> str | None:
    """What a teacher reads before every text whose vector is stored: the recipe's own words, else its folder's."""
    said = teacher_modules(section)
    return said.prompts.get(said.default_prompt) if section.prompt is None else section.prompt


def shared_modules(recipe: Recipe) -> tuple[ModuleSettings, str | None]:
    """What a student's folder says as its teacher's does, how to pool and the prompts that both read; and what the
    teacher alone reads before each text where the two are compared: as when its vectors were stored."""
    said = teacher_modules(recipe.teacher)
    if recipe.vectors and not recipe.vectors.prompts:
        return replace(said, prompts={}, default_prompt=None), prompt_of(recipe.teacher)
    return said, None


def read_teacher(context: Context) -> Teacher:
    """The recipe's teacher with the masked-LM head that was trained for it."""
    teacher = load_teacher(teacher_folder(context.recipe.teacher), shared_modules(context.recipe)[0])
    if teacher.head is None and context.has("masked_lm_head"):
        teacher.head = load_head(context.folder_of("masked_lm_head") / "head", teacher.backbone)
    return teacher


def read_words(context: Context, *, stored: bool = False) -> tuple[Lexicon, WordStream]:
    """The lexicon of the `encode` stage, and the word stream of the corpus; `stored`: of the sentences before it."""
    stream, of_vectors = WordStream.load(folder := context.folder_of("encode")), context.folder_of("vectors")
    first = read_json(of_vectors / "summary.json")["sentences"] if context.recipe.vectors else 0
    lines = slice(first + 1) if stored else slice(first, None)
    return Lexicon.load(folder), replace(stream, line_offsets=stream.line_offsets[lines])


def languages_of(context: Context, stream: WordStream, segments: Segments) -> dict[str, np.ndarray]:
    """{language of the recipe: the numbers of its segments}"""
    if not (names := list(context.recipe.corpus.languages)):
        return {}
    lines = read_json(context.folder_of("encode") / "languages.json")
    ends = stream.line_offsets[np.cumsum([lines[name] for name in names])]
    places = np.searchsorted(ends, segments.starts, side="right")
    return {name: np.flatnonzero(places == place) for place, name in enumerate(names)}


def read_tokenizers(context: Context) -> tuple[Tokenizer, Tokenizer]:
    """The student's and the teacher's."""
    return load_tokenizer(context.vocabulary), load_tokenizer(teacher_folder(context.recipe.teacher))


def start_student(context: Context, teacher: Teacher) -> Start:
    """`build_student` by the recipe. Where none was trained before, whose layers would be taken, its own are fitted if
    the recipe says so, and the stage that trains it keeps it as it starts, for the delivery to be compared with."""
    recipe, first = context.recipe, not context.students
    source = load_teacher(recipe.student.start, teacher.modules) if recipe.student.start else teacher
    batch = None
    if recipe.student.initialize == "extract_importance":
        batch = piece_reader(source.folder, source.config, HELD_OUT["max_pieces"] + 2)(first_texts(recipe, 64))
    counts = Lexicon.load(context.folder_of("encode")).student_counts if recipe.student.embedding_size else None
    given = {"batch": batch, "counts": counts, "seed": recipe.seed}
    started = build_student(recipe.student, source, context.vocabulary, **given)
    if first and recipe.student.calibration:
        layers = source_layers(recipe.student.layer_map, started.model, source, recipe.seed)
        positions = filter(None, map(positions_of, (started.model.config, source.config)))
        batches = calibration_batches(context, source, positions)
        fit_layers(started.model, source.backbone, layers, batches, started.directions)
        started.report["layers"] += ", fitted by least squares"
    if first and context.stage.student and main_process():
        save_student(context.folder / "untrained", started.model, None, context.vocabulary, teacher.modules)
    # the way back to another model's width is not the way to the teacher's
    return started if source is teacher else started._replace(directions=None, table_directions=None)


def calibration_batches(context: Context, source: Teacher, positions: Iterable[int]) -> list[Batch]:
    """Sentences of at most so many pieces, the student's and those of the model that it starts from."""
    recipe, wanted, stored = context.recipe, context.recipe.student.calibration, context.has("vectors")
    kept = read_values(context.folder_of("vectors") / "sentences.jsonl") if stored else first_texts(recipe, wanted)
    with TemporaryDirectory() as place:
        encode_corpus([texts := kept[:wanted]], source.folder, context.vocabulary, folder := Path(place))
        lexicon, stream = Lexicon.load(folder), WordStream.load(folder)
        shared = shared_pieces(load_tokenizer(context.vocabulary), load_tokenizer(source.folder))
        table = PieceTable(lexicon, source.table.num_embeddings, shared)
        limits = {"max_pieces": min(HELD_OUT["max_pieces"] + 2, *positions) - 2}
        segments, _ = cut_segments(stream, lexicon, **limits, unit="line", min_words=1, held_out_every=len(texts) + 1)
        options = {"batch_size": 64, "seed": recipe.seed, "sides": ("student", "teacher")}
        batcher = Batcher(table, stream, lexicon, segments, **limits, **options)
        return [batcher.batch(index) for index in range(batcher.order.per_epoch)]


def first_texts(recipe: Recipe, count: int) -> list[str]:
    """The first lines of the corpus that are as long as a sentence or, where none is, its first lines."""
    lines = partial(read_lines, recipe.corpus.sources, recipe.corpus.column)
    long = (line for line in lines() if len(line.split()) >= LEAST_WORDS)
    return list(islice(long, count)) or list(islice(lines(), count))


def start_directions(context: Context) -> torch.Tensor | None:
    """The directions of `start_student`, for those that load a student which was trained meanwhile. torch's generator
    stays as it was, so that a new head is the same whichever task comes first."""
    with torch.random.fork_rng(devices=[]):
        return start_student(context, read_teacher(context)).directions


def read_held_out(context: Context) -> HeldOut:
    """Sentences of lines that no training batch holds, and near ones of each."""
    recipe, (lexicon, stream) = context.recipe, read_words(context)
    every = recipe.corpus.held_out_every if recipe.trains_on_lines else 1  # there are no other lines
    _, segments = cut_segments(stream, lexicon, held_out_every=every, unit="sentence", **HELD_OUT)
    drawn = segments, recipe.evaluation.sentences, recipe.seed, languages_of(context, stream, segments)
    return held_out_texts(stream, lexicon, read_tokenizers(context)[1], *drawn)


def read_tasks(recipe: Recipe) -> dict[str, Task]:
    """{name: task} of the recipe's labelled tasks."""
    return {name: read_task(section, name) for name, section in recipe.tasks.items()}
