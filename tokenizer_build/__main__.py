"""The command line: `python -m tokenizer_build count`, then `train` and `compare` on what it counted."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from tokenizer_build.compare import compare as compare_tokenizers
from tokenizer_build.compare import markdown
from tokenizer_build.corpus import read_lines
from tokenizer_build.count import count_words, read_counts, write_counts
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer, save_tokenizer
from tokenizer_build.trainers import TRAINERS, check_trainer, train_tokenizer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True, highlight=False)

Output = Annotated[Path, typer.Option("--output", "-o", help="What to write: a parquet file, a tokenizer's folder.")]
Cased = Annotated[bool, typer.Option("--cased", help="Keep upper case and accents.")]


@app.command()
def count(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, globs, datasets:NAME[:CONFIG]:SPLIT.")],
    output: Output,
    column: Annotated[str, typer.Option(help="The field of records that holds the text.")] = "text",
    cased: Cased = False,
    processes: Annotated[int, typer.Option(min=1, help="The result is the same for any number.")] = os.cpu_count() or 1,
):
    """Count the words of a corpus of any size."""
    shown = TextColumn("counting: {task.completed:,} words")
    with Progress(shown, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        advance = partial(bar.advance, bar.add_task(""))
        counts = count_words(sources, column=column, lowercase=not cased, processes=processes, progress=advance)
    write_counts(counts, output)
    print(f"{counts.total():,} words, {len(counts):,} distinct")


@app.command()
def train(
    counts: Annotated[list[Path], typer.Argument(help="Counts written by `count`, which are added up.")],
    output: Output,
    size: Annotated[int, typer.Option(min=1, help="Pieces in the vocabulary, at most.")] = 5000,
    trainer: Annotated[str, typer.Option(help=f"One of {', '.join(TRAINERS)}.")] = "fewest",
    teacher: Annotated[Path | None, typer.Option(help="Tokenizer whose pieces are candidates.")] = None,
    require: Annotated[Path | None, typer.Option(help="Text file of words that must be pieces, one per line.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest input of the model, in pieces.")] = 512,
    cased: Cased = False,
):
    """Learn a vocabulary and write tokenizer.json, tokenizer_config.json and vocab.txt."""
    check_trainer(trainer)
    words, compared = read_counts(*counts), {"teacher": load_tokenizer(teacher)} if teacher else {}
    if not cased and any(word.isascii() and word != word.lower() for word in words):
        raise InputError(f"{counts[0]} was counted with --cased: give --cased here too, or count again")
    required = list(read_lines([require])) if require else []
    known = compared["teacher"].get_vocab() if teacher else {}
    options = {"required": required, "teacher_vocabulary": known, "lowercase": not cased}
    compared[str(output)] = tokenizer = train_tokenizer(words, size, trainer, **options)
    save_tokenizer(tokenizer, output, max_length=max_length)
    print(markdown(compare_tokenizers(words, compared)), end="")


@app.command()
def compare(
    counts: Annotated[Path, typer.Argument(help="Counts written by `count`.")],
    tokenizers: Annotated[list[Path], typer.Argument(help="Folders or tokenizer.json files; the first is the base.")],
):
    """Compare tokenizers of any family: pieces per word, one-piece words, unknown words, overlap with the first."""
    loaded = {str(path): load_tokenizer(path) for path in tokenizers}
    print(markdown(compare_tokenizers(read_counts(counts), loaded)), end="")


def main() -> None:
    try:
        app(prog_name="python -m tokenizer_build")
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        messages.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
