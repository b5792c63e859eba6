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
from rich.table import Table

from tokenizer_build.errors import InputError

app = typer.Typer(
    help="Compress a BERT-type encoder to under 7 MB by giving it a much smaller vocabulary.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="a recipe (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings over the recipe's: section.key=value ...")]
STAGES = ("count", "vocab", "encode", "teacher", "dual", "distill", "export", "report")
SYSTEMS = ("teacher", "untrained", "trained", "delivered")


def open_run(recipe: Path, overrides: list[str] | None):
    from vocabshrink.recipe import load_recipe
    from vocabshrink.run_dir import RunDir
    from vocabshrink.stages import Run

    loaded = load_recipe(recipe, overrides or [])
    return Run(loaded, RunDir(Path("artifacts") / loaded.name))


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    since: Annotated[float | None, typer.Option(help="Unix time from which summary.json counts its minutes")] = None,
):
    """Do every stage that the recipe asks for; finished ones are skipped."""
    from vocabshrink.plan import check_budget
    from vocabshrink.stages import main_process, run_stage, stages_of, summarise

    opened = open_run(recipe, overrides)
    check_budget(opened.recipe)
    for name in stages_of(opened.recipe):
        if name == "report" and main_process():
            summarise(opened, since)
        run_stage(opened, name)
    if main_process():
        show_summary(summarise(opened, since))
        print(f"report: {opened.dir.path / 'report.html'}")


def add_stage(name: str) -> None:
    @app.command(name, help=f"Do the {name} stage of a recipe.")
    def stage(recipe: RecipePath, overrides: Overrides = None):
        from vocabshrink.stages import run_stage, summarise

        opened = open_run(recipe, overrides)
        if name == "report" and opened.dir.is_done("export"):
            summarise(opened)
        run_stage(opened, name)


for stage_name in STAGES:
    add_stage(stage_name)


def show_summary(summary: dict) -> None:
    """The headline table of a run."""
    table = Table("", *SYSTEMS, title=f"{summary['minutes']:.1f} minutes")
    for key, row in summary.items():
        if isinstance(row, dict) and not key.endswith("_by_block"):
            shown = [
                f"{row[s]:,.0f}" if key == "bytes" and s in row else f"{row[s]:.4g}" if s in row else ""
                for s in SYSTEMS
            ]
            table.add_row(key.replace("_", " "), *shown)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None):
    """Print parameters, bytes of every format, tokens, FLOPs and hours; refuse what cannot meet its budget."""
    from vocabshrink.plan import check_budget, plan_tables

    opened = open_run(recipe, overrides)
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in plan_tables(opened.recipe, opened.dir):
        console.print(table)
    check_budget(opened.recipe)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None):
    """Print the resolved recipe, every default written out."""
    from vocabshrink.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or [])), end="")


@app.command("list")
def list_parts():
    """List vocabulary trainers, losses and layer maps."""
    from tokenizer_build.trainers import TRAINERS
    from vocabshrink.layer_map import LAYER_MAPS
    from vocabshrink.losses import LOSSES

    for title, parts in {"vocabulary.trainer": TRAINERS, "losses": LOSSES, "layer_map": LAYER_MAPS}.items():
        table = Table(title, "", box=None, title_justify="left")
        for name, function in parts.items():
            table.add_row(name, (function.__doc__ or "").strip().split("\n")[0])
        Console().print(table)


@app.command()
def harvest(out: Annotated[Path, typer.Argument(help="a .jsonl or .jsonl.gz to write")]):
    """Harvest the documentation of the installed Python packages as a corpus."""
    from vocabshrink.harvest import harvest as harvest_to

    if out.is_file():
        print(f"{out}: harvested before", file=sys.stderr)
        return
    started = time.monotonic()
    counts = harvest_to(out, processes=os.cpu_count() or 1)
    print(
        f"{out}: {counts['words']:,} words in {counts['paragraphs']:,} paragraphs, {time.monotonic() - started:.0f} s"
    )


@app.command()
def search(
    artifact: Annotated[Path, typer.Argument(help="an artifact with an index, or a run's export folder")],
    query: str,
    top: Annotated[int, typer.Option(min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
):
    """Answer from an artifact's own passages. Needs no torch."""
    from vocabshrink.runtime import search as search_index

    folder = artifact / "model" if (artifact / "model" / "MANIFEST.json").is_file() else artifact
    for hit in search_index(folder, query, top):
        print(
            json.dumps(hit, ensure_ascii=False)
            if as_json
            else f"{hit['score']:.3f}  {hit.get('source', '')}\n       {hit['text']}"
        )


def main() -> None:
    """The console script: InputError becomes one sentence and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"vocabshrink: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "a file"
        print(f"vocabshrink: the disk is full (writing {where}): free some space and run again", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        known = {
            "torch": "train",
            "transformers": "train",
            "accelerate": "train",
            "pydantic": "train",
            "yaml": "train",
            "pyarrow": "train",
            "scipy": "train",
            "onnx": "train",
            "matplotlib": "report",
            "jinja2": "report",
        }
        extra = known.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"vocabshrink: this command needs {error.name}: pip install 'vocabshrink[{extra}]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
