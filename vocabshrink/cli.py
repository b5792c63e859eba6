"""The command line. Bad input is one sentence on stderr and exit code 2; torch is imported only by what trains."""

import codecs
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from vocabshrink.run.folder import RunDir, task_rows
from vocabshrink.run.stage import STAGES

HELP = "Compress a BERT-type encoder to under 7 MB by giving it a much smaller vocabulary."
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
RecipePath = Annotated[Path, typer.Argument(help="a recipe (YAML)")]
Force = Annotated[bool, typer.Option("--force", help="write a delivery that fails its gates, and say so in it")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings over the recipe's: section.key=value ...")]
Artifact = Annotated[Path, typer.Argument(help="a delivered folder, or its run's")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads")]
BatchSize = Annotated[int, typer.Option(min=1, help="texts in a batch")]
TRAIN = "torch transformers accelerate pydantic yaml pyarrow scipy onnx sklearn safetensors sentencepiece"
EXTRAS = {"train": TRAIN, "tune": "optuna sqlalchemy", "report": "matplotlib jinja2 pandas"}  # packages of each
CPUS = os.cpu_count() or 1
SETTING = re.compile(r"[a-z_]+(\.\w+)+=")  # what overrides a recipe, as no file is called
OF_LANGUAGE = re.compile(r"([a-z]{2,3}(?:[-_]\w+)?)=(.+)")  # a file of a language
CONSOLE = Console(width=None if sys.stdout.isatty() else 120)


def table_of(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of a name and figures in each row."""
    table = Table(heads[0], *(Column(head, justify="right") for head in heads[1:]), title=title)
    for row in rows:
        table.add_row(*row)
    return table


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="a folder, a hub name or package:NAME/SUBFOLDER")],
    out: Annotated[Path, typer.Option(help="folder of the run; the delivery is in its export/")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="files, folders, globs, datasets:NAME:SPLIT, de=FILE; section.key=value")
    ] = None,
    task: Annotated[Path | None, typer.Option(help="labelled rows, of which a classifier or tagger is made")] = None,
    budget: Annotated[str, typer.Option(help="bytes of the delivery")] = "7MB",
    minutes: Annotated[float | None, typer.Option(help="how long it may take; 30 unless told")] = None,
    tokens: Annotated[int | None, typer.Option(help="how much to train, instead of minutes")] = None,
    goal: Annotated[str, typer.Option(help="quality or speed")] = "quality",
    start: Annotated[str | None, typer.Option(help="another model whose layers the student starts from")] = None,
    column: Annotated[str, typer.Option(help="of JSONL, CSV and parquet files")] = "text",
    only_plan: Annotated[bool, typer.Option("--plan", help="write the recipe, print what it costs, stop")] = False,
    since: Annotated[float | None, typer.Option(help="Unix time from which summary.json counts its minutes")] = None,
):
    """Make an encoder, or a classifier, small for your text: choose a student, train it, deliver it."""
    from vocabshrink import api
    from vocabshrink.run.recipe_yaml import override_value, parse_override

    settings: dict = {}
    for word in filter(SETTING.match, texts or ()):
        key, value = parse_override(word)
        override_value(settings, key.split("."), value, word)
    options = {"budget": budget, "minutes": minutes, "tokens": tokens, "goal": goal, "start": start, "column": column}
    options |= {"settings": settings or None, "task": task}
    texts = [text for text in texts or () if not SETTING.match(text)]
    sources: list | dict | None = [text if text.startswith("datasets:") else Path(text) for text in texts] or None
    if named := [match for text in texts if (match := OF_LANGUAGE.match(text))]:
        if len(named) < len(texts):
            raise InputError("texts: some are of a language and some of none: write LANGUAGE=FILE for all or none")
        sources = {match[1]: [Path(m[2]) for m in named if m[1] == match[1]] for match in named}
    recipe = api.plan(model, sources, out=out, **options)
    show_plan(recipe, out)
    print(f"recipe: {recipe}", flush=True)
    if not only_plan:
        artifact = api.compress(model, sources, out=out, since=since, **options)
        show_summary(artifact.figures)
        print(artifact.path)


def run(context: typer.Context, recipe: RecipePath, overrides: Overrides = None, force: Force = False):
    """Do every stage that the recipe asks for; finished ones are skipped."""
    from vocabshrink.api import run_recipe
    from vocabshrink.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder, only = RunDir(Path("artifacts") / loaded.name), "" if context.info_name == "run" else context.info_name
    if summary := run_recipe(loaded, folder, force=force, only=only):
        show_summary(summary)
        print(f"report: {folder.path / 'report.html'}")


app.command("run")(run)
for stage_name in STAGES:
    app.command(stage_name, help=STAGES[stage_name].about, rich_help_panel="Stages of a recipe")(run)


def show_summary(summary: dict) -> None:
    """The headline tables of a run."""
    from vocabshrink.pages.report import SYSTEMS, per_system

    rows = []
    for key, figures in per_system(summary).items():
        form = "{:,.0f}" if key == "bytes" else "{:.4g}"
        rows.append((key.replace("_", " "), *("" if x is None else form.format(x) for x in map(figures.get, SYSTEMS))))
    if rows:
        CONSOLE.print(table_of(f"{summary['minutes']:.1f} minutes", ("", *SYSTEMS), rows))
    if "tasks" in summary:
        CONSOLE.print(table_of("validation", ("task", "metric", "median", "min", "max"), task_rows(summary["tasks"])))


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None):
    """Print parameters, bytes of every format, tokens, FLOPs and hours; refuse what cannot meet its budget."""
    show_plan(recipe, None, overrides)


def show_plan(recipe: Path, folder: Path | None, overrides: list[str] | None = None) -> None:
    from vocabshrink.run.recipe import load_recipe
    from vocabshrink.stages.plan import check_budget, plan_tables

    loaded = load_recipe(recipe, overrides or [])
    tables = plan_tables(loaded, RunDir(folder or Path("artifacts") / loaded.name))
    CONSOLE.print(*(table_of(*table) for table in tables))
    check_budget(loaded)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None):
    """Print the resolved recipe, every default written out."""
    from vocabshrink.run.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or [])), end="")


@app.command("list")
def list_parts():
    """List stages, vocabulary trainers, losses and layer maps."""
    from tokenizer_build.trainers import TRAINERS
    from vocabshrink.run.layer_map import LAYER_MAPS
    from vocabshrink.training.losses import LOSSES

    kinds = {"stages": {name: stage.about for name, stage in STAGES.items()}, "trainers": TRAINERS}
    kinds["losses"] = {name: loss.function.__doc__ for name, loss in LOSSES.items()}
    kinds["maps"] = LAYER_MAPS
    for title, parts in kinds.items():
        print(title, *(f"  {name:<24} {about.strip().splitlines()[0]}" for name, about in parts.items()), sep="\n")


@app.command()
def ablations(
    files: Annotated[list[str], typer.Argument(help="ablation files (recipes/ablations/*.yaml), then key=value ...")],
    root: Annotated[Path, typer.Option(help="where runs, tables and plots go")] = Path("artifacts/ablations"),
):
    """Run every variant and seed of the ablation files, each stage once; write summary.json, tables and plots."""
    from vocabshrink.lab.ablations import run_ablations

    paths = [Path(word) for word in files if "=" not in word]
    run_ablations(paths, [word for word in files if "=" in word], root=root)


@app.command()
def harvest(out: Annotated[Path, typer.Argument(help="a .jsonl to write")]):
    """Harvest the documentation of the installed Python packages as a corpus."""
    from vocabshrink.lab.harvest import harvest as harvest_to

    if out.is_file():
        print(f"{out}: harvested before", file=sys.stderr)
        return
    counts = harvest_to(out, processes=CPUS)
    print(f"{out}: {counts['words']:,} words in {counts['paragraphs']:,} paragraphs")


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(help="a search (recipes/tune/*.yaml)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, tune.key=value ...")] = None,
    root: Annotated[Path, typer.Option(help="where searches go")] = Path("artifacts/tune"),
):
    """Search for the layer map, and for whatever else the file makes a gene, under a cheap proxy."""
    from vocabshrink.lab.tune import run_tuning

    summary = run_tuning(file, overrides or [], root)
    for row in summary["front"] if "front" in summary else [summary["best"]]:
        print(f"{100 * row['quality']:.2f}  {row['bytes']:,.0f} bytes  {row['words']}")
    print(f"beside the named maps: {root / summary['name'] / 'tune.html'}")
    if (confirmation := root / summary["name"] / "confirm.yaml").is_file():
        print(f"longer runs on other tasks: vocabshrink ablations {confirmation} (and the settings given here)")


def delivered(path: Path) -> Path:
    """The delivered folder of a path: itself, or the embedder of a run's `export`."""
    return next((f for f in (path / "model", path / "export/model") if (f / "MANIFEST.json").is_file()), path)


@app.command()
def search(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an index, or its run")],
    query: Annotated[list[str], typer.Argument(help="the query, one word or several")],
    top: Annotated[int, typer.Option(min=1, help="answers to the query")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
):
    """Answer a query from an artifact's own passages, without torch."""
    from vocabshrink.runtime.index import Index

    for hit in Index(delivered(artifact)).search(" ".join(query), top):
        words = f"{hit['score']:.3f}  {hit.get('source', '')}\n       {hit['text']}"
        print(json.dumps(hit, ensure_ascii=False) if as_json else words)


def answer(command: str, artifact: Path, **options) -> None:
    """`answer_lines` from standard input to standard output."""
    from vocabshrink.runtime.lines import answer_lines

    answer_lines(command, delivered(artifact), sys.stdin.buffer, sys.stdout, **options)


@app.command()
def embed(
    artifact: Artifact,
    batch_size: BatchSize = 32,
    threads: Threads = 1,
    prompt: Annotated[str | None, typer.Option(help="the name of the prompt to put before each line")] = None,
    dimensions: Annotated[int | None, typer.Option(help="only so many, of a model trained for it")] = None,
):
    """Embed the lines of standard input: one JSON object a line. Needs no torch."""
    answer("embed", artifact, threads=threads, batch_size=batch_size, prompt=prompt, dimensions=dimensions)


@app.command()
def classify(artifact: Artifact, batch_size: BatchSize = 32, threads: Threads = 1):
    """Classify the lines of standard input (a pair: first TAB second), or label words. Needs no torch."""
    answer("classify", artifact, threads=threads, batch_size=batch_size)


@app.command()
def web(
    artifacts: Annotated[list[Path], typer.Argument(help="delivered folders, or their runs'")],
    out: Annotated[Path, typer.Option(help="where the page goes")] = Path("artifacts/web"),
    passages: Annotated[Path | None, typer.Option(help="JSONL with a text in each row, to search in")] = None,
    node_modules: Annotated[Path, typer.Option(help="where npm put transformers.js")] = Path("tests/js/node_modules"),
):
    """Write a page that runs the artifacts in the browser."""
    from vocabshrink.pages.web import build_web

    searched = build_web([delivered(path) for path in artifacts], out, passages, node_modules=node_modules)
    print(f"{out}/index.html (any static server), {out}/standalone.html (from a disk); {searched} passages")


@app.command()
def score(
    models: Annotated[list[str], typer.Argument(help="deliveries, or folders, package:NAME/FOLDER or hub names")],
    data: Annotated[Path, typer.Option(help="a folder of tasks' folders of JSONL")] = Path("tasks"),
    out: Annotated[Path | None, typer.Option(help="where the figures go, as JSON")] = None,
    rows: Annotated[int, typer.Option(min=10, help="of each file, at most")] = 2_000,
    cards: Annotated[bool, typer.Option("--cards", help="put the figures into the deliveries' cards")] = False,
    threads: Threads = CPUS,
):
    """Measure how good the embeddings of models are, on one's own tasks or on everybody's."""
    from vocabshrink.lab.score import score_models, write_cards

    folders = [str(delivered(Path(model))) if Path(model).is_dir() else model for model in models]
    report = score_models(folders, data, rows=rows, threads=threads)
    if out:
        write_json(out, report)
    if cards:
        write_cards(map(Path, folders), report)
    values, heads = {}, dict.fromkeys(f"{row['model']}\n{row['bytes']:,}" for row in report)
    for row in report:
        values.setdefault(f"{row['task']} {row['metric']}", []).append(f"{row['value']:.4f}")
    CONSOLE.print(table_of(f"at most {rows:,} rows of a file", ("", *heads), ((k, *v) for k, v in values.items())))


def stop(number: int, frame) -> None:
    """Ends the command at a signal, with one sentence."""
    name = signal.Signals(number).name
    if os.environ.get("RANK", "0") == "0":
        print(f"vocabshrink: stopped ({name}): the same command goes on from here", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    """The console script: what the user can mend becomes one sentence and exit code 2; a signal, one and its code."""
    # what a terminal's encoding lacks is written as in JSON, so that the answers in JSON stay valid
    codecs.register_error("escaped", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))
    sys.stdout.reconfigure(errors="escaped")
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, ImportError) as error:
        sentence, package = str(error), (getattr(error, "name", None) or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages.split()), None)
        if isinstance(error, OSError):  # what no reader or writer below could tell more about
            sentence = f"{error.filename or 'a file'}: {error.strerror or error}: make room, or choose another place"
        elif extra:
            sentence = f"this command needs {package}: pip install 'vocabshrink[{extra}]'"
        elif not isinstance(error, InputError):
            raise
        print(f"vocabshrink: {sentence}", file=sys.stderr)
        sys.exit(2)
