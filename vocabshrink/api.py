"""What the library does, as functions: `compress`, which decides everything, and the pieces that it is made of.

Every function works in a folder that it is given and goes on there when it is called again after a kill. Models are
folders that transformers loads, so that any of them may come from elsewhere or go elsewhere."""

import dataclasses
import filecmp
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from tokenizer_build.corpus import read_rows
from tokenizer_build.count import count_words
from tokenizer_build.errors import InputError
from tokenizer_build.files import plain, read_json, write_json, write_jsonl, write_text
from tokenizer_build.tokenizer import form_of, load_tokenizer, lowercases, save_tokenizer
from tokenizer_build.trainers import check_trainer, train_tokenizer
from vocabshrink.data.tasks import Task, read_task
from vocabshrink.delivery.export import ExportSettings, export_model
from vocabshrink.models.families import positions_of
from vocabshrink.models.forward import module_settings
from vocabshrink.models.loading import load_config, resolve_model
from vocabshrink.models.student import build_student, save_student
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.engine import Run, main_process, run_stage, summarise
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import DeliverySection, Recipe, StudentSection, TaskSection, load_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import dump_yaml, read_yaml
from vocabshrink.run.stage import stages_of
from vocabshrink.runtime.delivery import KINDS
from vocabshrink.stages.checks import check_recipe
from vocabshrink.stages.choose import SHAPES, choose_effort, choose_shape, draw_lines, look_at, recipe_text
from vocabshrink.stages.tasks import label_texts
from vocabshrink.training.losses import LOSSES, Loss

PathLike = str | os.PathLike
Texts = PathLike | Iterable[str]  # a file, folder, glob or datasets:NAME:SPLIT, several of them, or the texts
Languages = Mapping[str, Texts]  # {language: its texts}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What `compress` made. path: the delivered folder, for `vocabshrink.load`. manifest: its MANIFEST.json. figures:
    {figure: {"teacher", "untrained", "trained", "delivered"}}. recipe: the file that makes it again."""

    path: Path
    manifest: dict
    figures: dict
    recipe: Path


def compress(
    model: str, texts: Texts | Languages | None = None, *, out: PathLike, since: float | None = None, **options: Any
) -> Artifact:
    """The encoder `model` (a folder, hub name or package:NAME/SUBFOLDER), made small for the texts, in a folder `out`:
    an embedder; a classifier, cross-encoder or tagger with the model's labels; or a model of the `task`.

    since: Unix time from which the summary counts minutes. options: those of `plan`. Killed and called again with the
    same arguments, it goes on. Raises InputError for a model, texts or a budget that cannot be, before it trains."""
    path = plan(model, texts, out=out, **options)
    figures = run_recipe(recipe := load_recipe(path), RunDir(Path(out)), since=since)
    delivered = Path(out, "export", *recipe.tasks or ["model"])
    return Artifact(delivered, read_json(delivered / "MANIFEST.json"), figures, path)


def plan(
    model: str,
    texts: Texts | Languages | None = None,
    *,
    task: PathLike | Mapping[str, Any] | None = None,
    out: PathLike,
    budget: str | int = "7MB",
    minutes: float | None = None,
    tokens: int | None = None,
    goal: Literal["quality", "speed"] = "quality",
    start: str | None = None,
    column: str = "text",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """The recipe that `compress` would run, written to `out`/compress.yaml. task: a file of labelled rows, or a task
    as recipes have it; `texts` may then be left out. Without it, a model that has a task labels the texts here, in at
    most 30 % of the minutes; a line is a text and, if every line has one tab, a pair. budget: bytes of all the files
    that onnxruntime needs. minutes, or tokens: how long; 30 minutes unless told. goal: the best for the bytes, or the
    fastest. start: another model whose layers and pieces the student starts from. column: of JSONL, CSV and parquet
    files. settings: {section: {key: value}} over what is chosen."""
    out, size = Path(out), parse_recipe({"budget": budget}, "budget", DeliverySection).budget
    minutes = 30.0 if minutes is None and tokens is None else minutes
    if (minutes or tokens) is not None and (minutes or tokens) <= 0 or (minutes and tokens):
        raise InputError("give minutes or tokens, one of them, above 0")
    if goal not in SHAPES:
        raise InputError(f"goal {goal!r} is unknown: choose {' or '.join(SHAPES)}")
    if texts is None and task is None:
        raise InputError("texts: there are none: give files, or strings, or a task with labelled rows")
    section, rows = (None, None) if task is None else labelled_task(task, column, settings or {}, out / "labelled")
    languages = texts if isinstance(texts, Mapping) else {}
    languages = {name: spool(of_language, out / "languages" / name) for name, of_language in languages.items()}
    sources = [*chain(*languages.values())] or spool(texts_of(rows) if texts is None else texts, out)
    names = {"model": model, "sources": sources, "column": "text" if texts is None else column}
    names |= {"budget": size, "start": start} | ({"languages": languages} if languages else {})
    asked = names | {"minutes": minutes, "tokens": tokens, "goal": goal, "settings": settings, "task": section}
    recipe, before = out / "compress.yaml", out / "compress.json"
    if before.is_file():
        if read_json(before) == plain(asked):
            return recipe
        raise InputError(f"{out}: made with other arguments: give another folder, or delete this one")
    look = look_at(model, start, sources, names["column"], task=texts is None)
    kind, labels = (rows.kind, rows.labels) if rows else look.head or ("embedding", [])
    shape = choose_shape(look, size, goal, "classification" if kind == "regression" else kind, len(labels) or 1)
    names["embeds"] = kind == "embedding" or texts is not None and not look.head
    minutes = minutes and minutes / (1 + (names["embeds"] and kind != "embedding"))  # for text, and for the task
    effort, of_task = choose_effort(look, shape, minutes, tokens) if names["embeds"] else None, None
    if kind != "embedding":
        known = {"rows": len(rows.splits["train"]) if rows else 0, "tuned": bool(look.head), "fits": not effort}
        of_task = choose_effort(look, shape, minutes, tokens, task=True, **known)
        if rows:
            section = section | ({"teacher": model} if look.head else {})
        else:
            drawn = partial(draw_lines, look, sources, names["column"], of_task.sentences)
            section = label_texts(model, drawn, out / "labelled", asked)
            if shape.own_pieces and kind != "tokens":  # all of the text has nothing more to tell
                names |= {"sources": [section["train"]], "column": "sentence1"}
    names |= {"of_task": of_task, "task": section, "labelled": rows is not None}
    names["name"] = re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9_]+", "_", out.name) or "model"
    write_text(recipe, recipe_text(look, shape, effort or of_task, **names))
    if settings:
        write_text(recipe, dump_yaml(merge(read_yaml(recipe, "a recipe"), settings)))
    check_recipe(load_recipe(recipe))
    write_json(before, asked)
    return recipe


def labelled_task(task: PathLike | Mapping, column: str, settings: Mapping, folder: Path) -> tuple[dict, Task]:
    """A labelled task as a recipe has it, and as read. Of a file, or where no `validation` is named, every tenth row
    validates, in files in a folder. The text is sentence1 and sentence2 or, if there is no such field, `column`."""
    section = dict(task) if isinstance(task, Mapping) else {"train": os.path.expanduser(task)}
    section |= settings.get("tasks", {}).get("task", {})
    whole = parse_recipe({"validation": section.get("train")} | section, "task", TaskSection)
    rows = [row for _, row in read_rows(whole.train)]
    if rows and "text" not in section and whole.text[0] not in rows[0] and column in rows[0]:
        section["text"] = [column]
    if "validation" not in section:
        for split, chosen in {"train": [row for i, row in enumerate(rows) if i % 10], "validation": rows[::10]}.items():
            write_jsonl(path := folder / f"{split}.jsonl", chosen)
            section[split] = str(path)
        if (meta := Path(whole.train).expanduser().with_name("meta.json")).is_file():  # which names the labels
            write_text(folder / "meta.json", meta.read_text(encoding="utf-8-sig"))
    return section, read_task(parse_recipe(section, "task", TaskSection), "task")


def texts_of(task: Task) -> Iterator[str]:
    """The training rows as texts."""
    rows = task.splits["train"]
    yield from chain((row if isinstance(row, str) else " ".join(row) for row in rows.first), rows.second or ())


def merge(values: dict, over: Mapping[str, Any]) -> dict:
    """Nested values with others put over them."""
    return values | {
        key: merge(values[key], value) if isinstance(value, Mapping) and isinstance(values.get(key), dict) else value
        for key, value in over.items()
    }


def spool(texts: Texts, out: Path) -> list[str]:
    """The sources of a corpus: the paths given, or out/texts.jsonl with the texts of an iterable, which is never held.
    A list is of paths where its first member names one. Raises InputError where `out` has other texts already."""
    if isinstance(texts, str | os.PathLike):
        return [os.path.expanduser(texts)]
    if isinstance(texts, Mapping):
        raise InputError("texts: compress alone takes languages: give the texts of all as one")
    members = iter(texts)
    if (first := next(members, None)) is None:
        raise InputError("texts: there are none: give files, or strings")
    named = isinstance(first, os.PathLike) or first.startswith("datasets:")
    if named or len(first) < 1000 and (os.path.exists(path := os.path.expanduser(first)) or glob.glob(path)):
        return [os.path.expanduser(member) for member in (first, *members)]
    kept, new = out / "texts.jsonl", out / "texts.new.jsonl"
    write_jsonl(new, ({"text": text} for text in chain([first], members)))
    if kept.is_file() and not filecmp.cmp(new, kept, shallow=False):
        new.unlink()
        raise InputError(f"{out}: holds other texts: give another folder, or delete this one")
    new.replace(kept)
    return [str(kept)]


def run_recipe(recipe: Recipe, folder: RunDir, *, force=False, only: str = "", since: float | None = None) -> dict:
    """Runs the stages that a recipe asks for, or `only` one, in a folder; what cannot work is refused before anything
    runs. since: Unix time from which minutes are counted. Returns the run's summary: {figure: {system: value}, ...}."""
    check_recipe(recipe, force=force)
    run = Run(recipe, folder, force)
    with folder.alone() if main_process() else nullcontext():  # a launcher's processes are one holder
        for name in [only] if only else stages_of(recipe):
            if name == "report" and main_process():
                summarise(run, since)  # which it shows
            run_stage(run, name)
        return summarise(run, since) if not only and main_process() else {}


def learn_vocabulary(
    texts: Texts,
    size: int,
    *,
    out: PathLike,
    teacher: str | None = None,
    trainer: str = "fewest",
    lowercase: bool | None = None,
    required: Sequence[str] = (),
    column: str = "text",
) -> Path:
    """A WordPiece tokenizer of at most `size` pieces, learnt from the texts, as a folder that transformers loads.
    teacher: a model whose pieces are candidates too. trainer: one of tokenizer_build.trainers.TRAINERS. lowercase:
    None: as the teacher. required: words that must be one piece. Raises InputError for a size below the alphabet's."""
    check_trainer(trainer)
    tokenizer = load_tokenizer(resolve_model(teacher)) if teacher else None
    if lowercase is None:
        lowercase = tokenizer is None or lowercases(tokenizer)
    reads = {"lowercase": lowercase, "form": form_of(tokenizer) if tokenizer else None}
    counts = count_words(spool(texts, out := Path(out)), column=column, **reads)
    known = tokenizer.get_vocab() if tokenizer else {}
    options = reads | {"required": list(required), "teacher_vocabulary": known}
    save_tokenizer(train_tokenizer(counts, size, trainer, **options), out)
    return out


def start_student(model: str, tokenizer: PathLike, *, out: PathLike, **shape: Any) -> Path:
    """A student of the tokenizer's pieces [V, D_S], started from `model`, as a folder that transformers loads. shape:
    of the recipe's student section: num_hidden_layers, hidden_size, intermediate_size, embedding_size ...; what is left
    out is the model's. Raises InputError for a shape that the model cannot fill."""
    section = parse_recipe(shape, "shape", StudentSection)
    source = load_teacher(model)
    if section.initialize == "extract_importance":
        raise InputError("initialize: extract_importance measures on text: use compress or a recipe, or extract_random")
    student = build_student(section, source, Path(tokenizer)).model
    save_student(Path(out), student, None, Path(tokenizer), source.modules)
    return Path(out)


def distill(
    student: PathLike,
    teacher: str,
    texts: Texts,
    *,
    out: PathLike,
    losses: Mapping[str | Callable, float],
    vectors: int | None = None,
    **training: Any,
) -> Path:
    """Trains a student's folder on the texts against a teacher and returns the trained one's folder. losses: {a name of
    `vocabshrink list`, or a function of all hidden states (training.losses.Forward): its weight}. vectors: how
    many sentences' teacher vectors are stored, behind each of its prompts alike, and trained on; None: the teacher runs
    in every step. training: of the recipe's distill section: steps, batch_size ... Raises InputError for losses and
    models that do not go together."""
    models = [load_config(resolve_model(str(model))) for model in (student, teacher)]
    training = {"max_length": min(128, *(positions_of(config) or 128 for config in models))} | training
    named = {loss.__name__ if callable(loss) else loss: weight for loss, weight in losses.items()}
    values = {"student": {"start": str(student)}, "distill": {"losses": named} | training}
    if vectors:
        values["vectors"] = {"sentences": vectors, "prompts": module_settings(resolve_model(teacher)).prompt_shares}
    with _among_losses(filter(callable, losses)):
        return _run_section(values, teacher, student, texts, Path(out)) / "distill" / "student"


@contextmanager
def _among_losses(functions: Iterable[Callable]) -> Iterator[None]:
    """The functions are losses of distillation until the block ends."""
    reads = frozenset({"hidden", "sentence", "teacher"})
    own = {function.__name__: Loss(function, reads, frozenset({"distill"})) for function in functions}
    if taken := sorted(own.keys() & LOSSES):
        raise InputError(f"losses: {taken[0]} is a loss of the library: call your function something else")
    LOSSES.update(own)
    try:
        yield
    finally:
        for name in own:
            del LOSSES[name]


def finetune(student: PathLike, task: Mapping[str, Any], *, out: PathLike, **settings: Any) -> tuple[Path, dict]:
    """Fine-tunes a student's folder on a labelled task; the folder of the trained model, and its figures. task: one of
    the recipe's tasks: {"train": file, "validation": file, "kind": ..., "teacher": folder ...}. settings: of its
    finetune section: phases, seeds, grid ... Raises InputError for rows or labels that do not go together."""
    texts = texts_of(read_task(parse_recipe(dict(task), "task", TaskSection), "task"))
    values = {"tasks": {"task": dict(task)}, "finetune": settings, "student": {"start": str(student)}}
    folder = _run_section(values, str(student), student, texts, Path(out))
    return folder / "finetune" / "task" / "model", read_json(folder / "finetune" / "summary.json")


def _run_section(values: dict, teacher: str, student: PathLike, texts: Texts, out: Path) -> Path:
    """Runs a recipe that begins with a student as it is, and delivers nothing."""
    whole = {"name": out.name, "teacher": {"model": teacher}, "vocabulary": {"tokenizer": str(student)}}
    whole |= {"corpus": {"sources": spool(texts, out)}, "delivery": None, "evaluation": {"sentences": 0}}
    run_recipe(parse_recipe(whole | values, str(out)), RunDir(out))
    return out


def export(model: PathLike, out: PathLike, *, weights: str | dict = "int4-64", **settings: Any) -> dict:
    """Writes a trained student's folder as a delivery and returns its manifest. weights: a format of run.formats, or
    one for each class of tensors. settings: of the recipe's delivery section: max_positions, kernel, safetensors,
    budget ... Raises InputError for a model that the graph cannot compute."""
    folder = resolve_model(str(model))
    config = load_config(folder)
    named = (config.architectures or [""])[0].removeprefix("Electra").removeprefix("Bert")
    task = next((t for t, kind in KINDS.items() if kind.architecture.removeprefix("Bert") == named), "embedding")
    values = {"weights": weights, "max_positions": min(128, config.max_position_embeddings), "budget": 10**12}
    section = parse_recipe(values | settings, "export", DeliverySection)
    return export_model(folder, out, ExportSettings(task, section, module_settings(folder)))
