"""What several stages read, as functions of a stage's context: the teacher, the words, the student as it starts."""

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from tokenizer_build.corpus import read_lines
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.languages import factors, shares
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Batch, Batcher, Segments, cut_segments, repeated
from vocabshrink.data.held_out import HeldOut, held_out_texts
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.data.pieces import Pieces, PieceTable
from vocabshrink.data.tasks import Task, read_task
from vocabshrink.data.vectors import StoredVectors, read_sentences
from vocabshrink.models.families import positions_of
from vocabshrink.models.fitting import fit_layers
from vocabshrink.models.forward import ModuleSettings, module_settings
from vocabshrink.models.loading import check_folder, load_config, resolve_model
from vocabshrink.models.spelling import shared_pieces
from vocabshrink.models.student import Start, build_student, source_layers
from vocabshrink.models.teacher import Teacher, load_head, load_teacher
from vocabshrink.run.engine import Context
from vocabshrink.run.recipe import DistillStage, Recipe, TeacherSection

HELD_OUT = {"max_pieces": 126, "min_words": 4}  # of the segments that no training batch holds


def section_folder(section: TeacherSection, name: str = "teacher") -> Path:
    """The folder of the teacher that the recipe's section of this name describes, checked."""
    check_folder(folder := resolve_model(section.model, section.revision, key=f"{name}.model"), section.sha256)
    return folder


def teacher_folder(recipe: Recipe) -> Path:
    """The teacher's folder, checked."""
    return section_folder(recipe.teacher)


def given_tokenizer(recipe: Recipe) -> Path | None:
    """The folder or file of the tokenizer that is taken as it is, where the recipe names one."""
    if (named := recipe.vocabulary.tokenizer) == "teacher":
        return teacher_folder(recipe)
    if named == "start" and recipe.student.start:
        return resolve_model(recipe.student.start, key="student.start")
    if named and not os.path.exists(os.path.expanduser(named)):
        raise InputError(f"vocabulary.tokenizer {named}: no such file or folder")
    return Path(named).expanduser() if named else None


def source_config(recipe: Recipe, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that the student starts from: student.start's, else the teacher's."""
    return load_config(resolve_model(recipe.student.start, key="student.start")) if recipe.student.start else teacher


def teacher_modules(recipe: Recipe) -> ModuleSettings:
    """How the teacher pools, and its prompts: the recipe's own words, else its folder's."""
    return module_settings(teacher_folder(recipe), recipe.teacher.pooling, recipe.teacher.normalize)


def prompt_of(section: TeacherSection, said: ModuleSettings) -> str | None:
    """What a teacher reads before every text whose vector is stored: the recipe's own words, else its folder's."""
    return said.prompts.get(said.default_prompt) if section.prompt is None else section.prompt


def evaluated_prompt(recipe: Recipe) -> str | None:
    """What the teacher reads before each text where student and teacher are compared: what it read when its vectors
    were stored, unless the student read prompts too."""
    bare = recipe.vectors and not recipe.vectors.prompts
    return prompt_of(recipe.teacher, teacher_modules(recipe)) if bare else None


def load_section(section: TeacherSection) -> Teacher:
    """The teacher that a section of the recipe describes, fresh from its folder, its hash checked."""
    named = ("revision", "sha256", "pooling", "normalize")
    return load_teacher(section.model, **{key: getattr(section, key) for key in named})


def read_teacher(context: Context) -> Teacher:
    """The recipe's teacher with the masked-LM head that was trained for it."""
    teacher = load_section(context.recipe.teacher)
    if teacher.head is None and context.has("masked_lm_head"):
        teacher.head = load_head(context.folder_of("masked_lm_head") / "head", teacher.backbone)
    return teacher


def read_words(context: Context, *, stored: bool = False) -> tuple[Lexicon, WordStream]:
    """The lexicon of the `encode` stage, and the word stream of the corpus; `stored`: of the sentences before it."""
    stream, of_vectors = WordStream.load(folder := context.folder_of("encode")), context.folder_of("vectors")
    first = read_json(of_vectors / "summary.json")["sentences"] if context.recipe.vectors else 0
    lines = slice(first + 1) if stored else slice(first, None)
    return Lexicon.load(folder), replace(stream, line_offsets=stream.line_offsets[lines])


def read_stored_vectors(context: Context, stage: DistillStage) -> StoredVectors | None:
    """The teachers' sentence vectors in the shares of a stage; None where the recipe stores none."""
    if (section := context.recipe.vectors) is None:
        return None
    shares = {name: share for name, share in stage.teachers.items() if share} or dict.fromkeys(section.names, 1.0)
    return StoredVectors.load(context.folder_of("vectors"), shares, section.centered)


def languages_of(context: Context, stream: WordStream, segments: Segments) -> dict[str, np.ndarray]:
    """{language of the recipe: the numbers of its segments}"""
    if not (names := list(context.recipe.corpus.languages)):
        return {}
    lines = read_json(context.folder_of("encode") / "languages.json")
    ends = stream.line_offsets[np.cumsum([lines[name] for name in names])]
    places = np.searchsorted(ends, segments.starts, side="right")
    return {name: np.flatnonzero(places == place) for place, name in enumerate(names)}


def balanced(context: Context, stream: WordStream, segments: Segments) -> Segments:
    """Training segments, repeated so that the languages have their shares of the words."""
    languages, times = languages_of(context, stream, segments), np.ones(len(segments.starts))
    words = {name: int(segments.lengths[numbers].sum()) for name, numbers in languages.items()}
    for name, factor in factors(words, shares(words, context.recipe.corpus.alpha)).items() if words else ():
        times[languages[name]] = factor
    rows = repeated(times, context.recipe.seed)
    return Segments(segments.starts[rows], segments.lengths[rows])


def read_tokenizers(context: Context) -> tuple[Tokenizer, Tokenizer]:
    """The student's and the teacher's."""
    return load_tokenizer(context.vocabulary), load_tokenizer(teacher_folder(context.recipe))


def start_student(context: Context, teacher: Teacher, *, fitted: bool = True) -> Start:
    """`build_student` by the recipe; what extraction by importance measures, it measures on the corpus. fitted: whether
    its layers are wanted, and so fitted where the recipe says so."""
    recipe, source = context.recipe, teacher
    if recipe.student.start:
        source = load_teacher(recipe.student.start, pooling=teacher.pooling, normalize=teacher.normalize)
    batch = pieces_of_corpus(recipe, source) if recipe.student.initialize == "extract_importance" else None
    counts = Lexicon.load(context.folder_of("encode")).student_counts if recipe.student.embedding_size else None
    given = {"batch": batch, "counts": counts, "seed": recipe.seed}
    started = build_student(recipe.student, source, context.vocabulary, **given)
    if fitted and recipe.student.calibration:
        layers = source_layers(recipe.student.layer_map, started.model, source, recipe.seed)
        positions = filter(None, map(positions_of, (started.model.config, source.config)))
        batches = calibration_batches(context, source, positions)
        fit_layers(started.model, source.backbone, layers, batches, started.directions)
        started.report["layers"] += ", fitted by least squares"
    # the way back to another model's width is not the way to the teacher's
    return started if source is teacher else started._replace(directions=None, table_directions=None)


def calibration_batches(context: Context, source: Teacher, positions: Iterable[int]) -> list[Batch]:
    """Sentences of at most so many pieces, the student's and those of the model that it starts from: stored sentences,
    or the corpus's first lines that are as long as one."""
    recipe, wanted = context.recipe, context.recipe.student.calibration
    if context.has("vectors"):
        texts = read_sentences(context.folder_of("vectors"))[:wanted]
    else:
        texts = first_texts(recipe, wanted)
    with TemporaryDirectory() as place:
        encode_corpus([texts], source.folder, context.vocabulary, folder := Path(place))
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
    for least in (HELD_OUT["min_words"], 1):
        lines = read_lines(recipe.corpus.sources, recipe.corpus.column)
        if texts := list(islice((line for line in lines if len(line.split()) >= least), count)):
            break
    return texts


def pieces_of_corpus(recipe: Recipe, source: Teacher) -> Pieces:
    """The first 64 texts of the corpus in the pieces of a model."""
    texts = first_texts(recipe, 64)
    tokenizer, config, most = load_tokenizer(source.folder), source.config, HELD_OUT["max_pieces"] + 2
    tokenizer.enable_truncation(min(positions_of(config) or most, most))
    tokenizer.enable_padding(pad_id=config.pad_token_id or 0)
    encodings = tokenizer.encode_batch(texts)
    ids, mask = (torch.tensor([getattr(e, part) for e in encodings]) for part in ("ids", "attention_mask"))
    return Pieces(ids, mask, units=ids)


def start_directions(context: Context) -> torch.Tensor | None:
    """The directions of `start_student`, for those that load a student which was trained meanwhile. torch's generator
    stays as it was, so that a new head is the same whichever task comes first."""
    with torch.random.fork_rng(devices=[]):
        return start_student(context, read_teacher(context), fitted=False).directions


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
