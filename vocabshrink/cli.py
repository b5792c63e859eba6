"""The command line. Bad input is one sentence on stderr and exit code 2; torch is imported only by what trains."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tokenizer_build.errors import InputError
from vocabshrink.run.folder import task_rows
from vocabshrink.run.stage import RENAMED, STAGES, stages_of

app = typer.Typer(
    help="Compress a BERT-type encoder to under 7 MB by giving it a much smaller vocabulary.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="a recipe (YAML)")]
Force = Annotated[bool, typer.Option("--force", help="write a delivery that fails its gates, and say so in it")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings over the recipe's: section.key=value ...")]
SYSTEMS = ("teacher", "untrained", "trained", "delivered")


def open_run(recipe: Path, overrides: list[str] | None, force: bool = False, *, check: bool = True):
    """The run of a recipe; what cannot work is refused here."""
    from vocabshrink.run.engine import Run
    from vocabshrink.run.folder import RunDir
    from vocabshrink.run.recipe import load_recipe
    from vocabshrink.stages.checks import check_recipe

    loaded = load_recipe(recipe, overrides or [])
    if check:
        check_recipe(loaded, force=force)
    return Run(loaded, RunDir(Path("artifacts") / loaded.name), force)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    since: Annotated[float | None, typer.Option(help="Unix time from which summary.json counts its minutes")] = None,
    force: Force = False,
):
    """Do every stage that the recipe asks for; finished ones are skipped."""
    from vocabshrink.run.engine import main_process, run_stage, summarise

    opened = open_run(recipe, overrides, force)
    for name in stages_of(opened.recipe):
        if name == "report" and main_process():
            summarise(opened, since)
        run_stage(opened, name)
    if main_process():
        show_summary(summarise(opened, since))
        print(f"report: {opened.dir.path / 'report.html'}")


def add_stage(name: str) -> None:
    @app.command(name, help=STAGES[name].about, rich_help_panel="Stages of a recipe")
    def stage(recipe: RecipePath, overrides: Overrides = None, force: Force = False):
        from vocabshrink.run.engine import run_stage, summarise

        opened = open_run(recipe, overrides, force)
        if name == "report":
            summarise(opened)
        run_stage(opened, name)


def add_renamed(old: str, new: str) -> None:
    @app.command(old, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def renamed():
        raise InputError(f"the stage {old} is called {new} now: vocabshrink {new} RECIPE")


for stage_name in STAGES:
    add_stage(stage_name)
for names in RENAMED.items():
    add_renamed(*names)


def show_summary(summary: dict) -> None:
    """The headline tables of a run."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    systems = {
        key: row
        for key, row in summary.items()
        if isinstance(row, dict) and not key.endswith("_by_block") and set(SYSTEMS) & set(row)
    }
    if systems:
        table = Table(
            "", *(Column(name, justify="right") for name in SYSTEMS), title=f"{summary['minutes']:.1f} minutes"
        )
        for key, row in systems.items():
            shown = [
                f"{row[s]:,.0f}" if key == "bytes" and s in row else f"{row[s]:.4g}" if s in row else ""
                for s in SYSTEMS
            ]
            table.add_row(key.replace("_", " "), *shown)
        console.print(table)
    if "tasks" in summary:
        table = Table("task", "metric", "median", "min", "max", title="validation")
        for row in task_rows(summary["tasks"]):
            table.add_row(*row)
        console.print(table)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None):
    """Print parameters, bytes of every format, tokens, FLOPs and hours; refuse what cannot meet its budget."""
    from vocabshrink.stages.plan import check_budget, plan_tables

    opened = open_run(recipe, overrides, check=False)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in plan_tables(opened.recipe, opened.dir):
        console.print(table)
    check_budget(opened.recipe)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None):
    """Print the resolved recipe, every default written out."""
    from vocabshrink.run.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or [])), end="")


@app.command("list")
def list_parts(
    kind: Annotated[str, typer.Argument(help="stages, trainers, losses or maps; all of them if not given")] = "",
):
    """List stages, vocabulary trainers, losses and layer maps, or one of these kinds."""
    from tokenizer_build.trainers import TRAINERS
    from vocabshrink.run.layer_map import LAYER_MAPS
    from vocabshrink.training.losses import LOSSES

    kinds = {
        "stages": {name: stage.about for name, stage in STAGES.items()},
        "trainers": TRAINERS,
        "losses": {name: loss.function.__doc__ for name, loss in LOSSES.items()},
        "maps": {name: layer_map.__doc__ for name, layer_map in LAYER_MAPS.items()},
    }
    if kind and kind not in kinds:
        raise InputError(f"{kind}: there is no such list: choose from {', '.join(kinds)}")
    for title in [kind] if kind else kinds:
        table = Table(title, "", box=None, title_justify="left")
        for name, about in kinds[title].items():
            table.add_row(name, Text(about.strip().split("\n")[0]))  # [n, C] is no markup
        Console().print(table, "")


@app.command()
def ablations(
    files: Annotated[list[str], typer.Argument(help="ablation files (recipes/ablations/*.yaml), then key=value ...")],
    root: Annotated[Path, typer.Option(help="where runs, tables and the page go")] = Path("artifacts/ablations"),
):
    """Run every variant and seed of the ablation files, each stage once; write summary.json, tables and a page."""
    from vocabshrink.lab.ablations import run_ablations

    overrides = [word for word in files if "=" in word]
    run_ablations([Path(word) for word in files if "=" not in word], overrides, root=root)


@app.command()
def harvest(out: Annotated[Path, typer.Argument(help="a .jsonl or .jsonl.gz to write")]):
    """Harvest the documentation of the installed Python packages as a corpus."""
    from vocabshrink.lab.harvest import harvest as harvest_to

    if out.is_file():
        print(f"{out}: harvested before", file=sys.stderr)
        return
    started = time.monotonic()
    counts = harvest_to(out, processes=os.cpu_count() or 1)
    print(
        f"{out}: {counts['words']:,} words in {counts['paragraphs']:,} paragraphs, {time.monotonic() - started:.0f} s"
    )


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(help="a search (recipes/tune/*.yaml)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, tune.key=value of the search")
    ] = None,
    proxy_check: Annotated[bool, typer.Option("--proxy-check", help="measure how well the proxy ranks")] = False,
    root: Annotated[Path, typer.Option(help="where searches go")] = Path("artifacts/tune"),
):
    """Search for the layer map, and for whatever else the file makes a gene, under a cheap proxy."""
    from vocabshrink.lab.tune import run_tuning

    summary = run_tuning(file, overrides or [], root, proxy_check=proxy_check)
    table = Table("", "quality", *summary["tasks"], "bytes", title=summary["title"])
    results = {f"front {number}": row for number, row in enumerate(summary.get("front", []), 1)}
    results |= {
        label: summary[key] for label, key in (("found", "best"), ("random search", "random_search")) if key in summary
    }
    for name, row in (results | summary["named"]).items():
        if row["quality"] is not None:
            figures = [row["quality"], *(row["scores"][task] for task in summary["tasks"])]
            table.add_row(f"{name}: {row['words']}", *(f"{100 * x:.2f}" for x in figures), f"{row['bytes']:,.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for row in summary["confirm"]["rows"] if "confirm" in summary else ():
        if "difference" in row:
            spread = f"{'beyond' if row['clear'] else 'within'} the seeds' spread"
            print(f"unseen tasks: found against {row['recipe']} {0 - 100 * row['difference']:+.2f}, {spread}")
    if "proxy_check" in summary:
        low, high = summary["proxy_check"]["interval"]
        print(f"proxy's rank correlation {summary['proxy_check']['spearman']:.2f} ({low:.2f} to {high:.2f})")


@app.command()
def search(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an index, or its run")],
    query: Annotated[list[str] | None, typer.Argument(help="the query, one word or several")] = None,
    top: Annotated[int, typer.Option(min=1, help="answers to the query")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
):
    """Answer a query from an artifact's own passages, without torch."""
    from vocabshrink.runtime.index import search as search_index

    if artifact.suffix in (".yaml", ".yml"):
        raise InputError(f"{artifact}: search answers queries from an artifact: write vocabshrink tune {artifact}")
    if not query:
        raise InputError(f"{artifact}: there is no query: write one behind it")
    for hit in search_index(delivered(artifact), " ".join(query), top):
        print(
            json.dumps(hit, ensure_ascii=False)
            if as_json
            else f"{hit['score']:.3f}  {hit.get('source', '')}\n       {hit['text']}"
        )


def delivered(path: Path) -> Path:
    """The delivered folder of a path: itself, or the embedder of a run's `export`."""
    inside = (path / "model", path / "export" / "model")
    return next((folder for folder in inside if (folder / "MANIFEST.json").is_file()), path)


Artifact = Annotated[Path, typer.Argument(help="a delivered folder, or its run's")]
Artifacts = Annotated[list[Path], typer.Argument(help="delivered folders, or their runs'")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads")]
BatchSize = Annotated[int, typer.Option(min=1, help="texts in a batch")]


@app.command()
def embed(artifact: Artifact, batch_size: BatchSize = 32, threads: Threads = 1):
    """Embed the lines of standard input: one JSON object a line. Needs no torch."""
    from vocabshrink.runtime.lines import embed_lines

    embed_lines(delivered(artifact), sys.stdin.buffer, sys.stdout, batch_size=batch_size, threads=threads)


@app.command()
def classify(artifact: Artifact, batch_size: BatchSize = 32, threads: Threads = 1):
    """Classify the lines of standard input (first TAB second, of a model of pairs), or label words. Needs no torch."""
    from vocabshrink.runtime.lines import classify_lines

    classify_lines(delivered(artifact), sys.stdin.buffer, sys.stdout, batch_size=batch_size, threads=threads)


@app.command()
def web(
    artifacts: Artifacts,
    out: Annotated[Path, typer.Option(help="where the page goes")] = Path("artifacts/web"),
    passages: Annotated[Path | None, typer.Option(help="JSONL with a text in each row, to search in")] = None,
    title: Annotated[str, typer.Option(help="the page's heading")] = "Search by meaning, in your browser",
    node_modules: Annotated[Path, typer.Option(help="where npm put transformers.js")] = Path("tests/js/node_modules"),
):
    """Write a page that runs the artifacts in the browser."""
    from vocabshrink.pages.web import build_web

    done = build_web([delivered(path) for path in artifacts], out, passages, title=title, node_modules=node_modules)
    print(f"{out}/index.html (any static server), {out}/standalone.html (from a disk); {done['passages']} passages")


@app.command()
def bench(
    artifacts: Artifacts,
    teacher: Annotated[str | None, typer.Option(help="folder or package:NAME/FOLDER, exported as a peer")] = None,
    static: Annotated[bool, typer.Option(help="a model2vec peer, distilled from the teacher")] = True,
    task: Annotated[list[str] | None, typer.Option(help="name=folder of JSONL, for quality")] = None,
    out: Annotated[Path, typer.Option(help="where the figures go")] = Path("artifacts/bench/delivery.json"),
    seconds: Annotated[float, typer.Option(help="of calls for each length, batch and number of threads")] = 2.0,
):
    """Measure artifacts beside their teacher and a static peer."""
    from vocabshrink.lab.bench import Calls, bench_tables
    from vocabshrink.lab.bench import bench as measure

    if teacher:
        from vocabshrink.models.loading import resolve_model

    tasks = dict(entry.split("=", 1) for entry in task or [])
    report = measure(
        [delivered(path) for path in artifacts],
        teacher=resolve_model(teacher) if teacher else None,
        static=static,
        tasks=tasks,
        out=out,
        calls=Calls(seconds=seconds),
        progress=lambda line: print(line, file=sys.stderr),
    )
    for table in bench_tables(report):
        Console().print(table)


def main() -> None:
    """The console script: InputError becomes one sentence and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"vocabshrink: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "a file"
        print(f"vocabshrink: the disk is full (writing {where}): free some space and run again", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        train = "torch transformers accelerate pydantic yaml pyarrow scipy onnx sklearn safetensors sentencepiece"
        extras = {"train": train, "tune": "optuna sqlalchemy", "report": "matplotlib jinja2 pandas"}
        known = {package: extra for extra, packages in extras.items() for package in packages.split()}
        extra = known.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"vocabshrink: this command needs {error.name}: pip install 'vocabshrink[{extra}]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
