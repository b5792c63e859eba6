"""Benchmark of the vocabulary: pieces per word and time against WordPieceTrainer, and memory of counting.

    python tests/bench/vocab.py --corpus PATH... --teacher FOLDER [--out artifacts/bench/vocab.json]
                                [--megabytes 60] [--processes 1]

Both sides get the same text, the same cores and, since unknown words count as one piece, the same alphabet.
Pieces per word compare vocabularies trained on the same word counts; the ratio of times is for reading,
counting and training 5,000 pieces from the same text file. All times are by the clock: measure on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (4000, 5000, 8000)
BARS = {"ratio": 0.98, "overlap": 0.93, "build_seconds": 10.0, "count_and_build_ratio": 1.0}

PEAK = """
import sys
from tokenizer_build.count import count_words
count_words(sys.argv[1:])
# not getrusage: its peak would include that of the process that started this one
print(next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/vocab.json"))
    parser.add_argument("--megabytes", type=float, default=60.0, help="millions of characters, from all paths alike")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.processes)  # read when `tokenizers` first starts threads
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        text, tenth = Path(folder) / "text.txt", Path(folder) / "tenth.txt"
        write_text(arguments.corpus, arguments.megabytes * 1e6, text)
        write_text(arguments.corpus, arguments.megabytes * 1e5, tenth)
        peaks = {name: peak_of_counting(tenth, times) for name, times in (("1x", 1), ("10x", 10))}
        from vocabshrink.models.loading import resolve_model

        result = measure_all(text, str(resolve_model(arguments.teacher)), arguments.processes)
    result["counting_peak_mb"] = peaks
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_tables(result)


def write_text(corpus: list[str], characters: float, path: Path) -> None:
    from tokenizer_build.corpus import expand, read_lines

    files = expand(corpus)
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for file in files:
            written = 0
            for line in read_lines([file]):
                written += out.write(line + "\n")
                if written >= characters / len(files):
                    break


def peak_of_counting(text: Path, times: int) -> float:
    """Megabytes at the peak of a process that counts the text so many times over (Linux)."""
    out = subprocess.run([sys.executable, "-c", PEAK, *[str(text)] * times], capture_output=True, text=True, check=True)
    return round(float(out.stdout), 1)


def measure_all(text: Path, teacher: str, processes: int) -> dict:
    from tokenizer_build.compare import measure
    from tokenizer_build.count import count_words
    from tokenizer_build.tokenizer import load_tokenizer, make_tokenizer
    from tokenizer_build.trainers import alphabet, teacher_pieces, train_vocabulary

    vocabulary = load_tokenizer(teacher).get_vocab()
    start = time.perf_counter()
    counts = count_words([text], processes=processes)
    count_seconds = time.perf_counter() - start
    print(f"{counts.total():,} words, {len(counts):,} distinct: counted in {count_seconds:.1f} s", flush=True)
    characters = len(alphabet(counts))
    result: dict = {"pieces_per_word": {}, "teacher_overlap": {}}
    for size in SIZES:
        start, start_processor = time.perf_counter(), time.process_time()
        pieces = train_vocabulary(counts, size, teacher_vocabulary=vocabulary)
        seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
        ours = measure(counts, make_tokenizer(pieces))
        theirs = measure(counts, trained_on_counts(counts, size, characters))
        x, y = theirs["pieces_per_word"], ours["pieces_per_word"]
        result["pieces_per_word"][str(size)] = {"wordpiece": x, "fewest": y, "ratio": y / x}
        print(f"{size}: unknown words {ours['unknown_rate']:.4%}, theirs {theirs['unknown_rate']:.4%}", flush=True)
        if size == 5000:
            own = set(teacher_pieces(pieces))
            result["teacher_overlap"][str(size)] = len(own & vocabulary.keys()) / len(own)
            result["build_seconds"], our_seconds = seconds, count_seconds + seconds
            print(f"build: {processor:.1f} s of one core, {seconds:.1f} s by the clock")
    their_seconds = seconds_on_text(text, 5000, characters)
    print(f"count + build: {our_seconds:.1f} s by the clock, theirs {their_seconds:.1f} s")
    result["count_and_build_ratio"] = our_seconds / their_seconds
    return result


def wordpiece_trainer(size: int, characters: int):
    from tokenizers.trainers import WordPieceTrainer

    from tokenizer_build.tokenizer import SPECIAL_TOKENS

    return WordPieceTrainer(
        vocab_size=size, special_tokens=SPECIAL_TOKENS, limit_alphabet=characters, show_progress=False
    )


def trained_on_counts(counts, size: int, characters: int):
    """Their trainer reads running text only, so every word is written as often as it was counted."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    def text():
        for word, count in counts.items():
            for _ in range(count // 1000):
                yield f"{word} " * 1000
            yield f"{word} " * (count % 1000)

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(text(), wordpiece_trainer(size, characters))
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    trained.normalizer, trained.pre_tokenizer = (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    return trained


def seconds_on_text(text: Path, size: int, characters: int) -> float:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    start = time.perf_counter()
    tokenizer.train([str(text)], wordpiece_trainer(size, characters))
    return time.perf_counter() - start


def print_tables(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "WordPieceTrainer", "fewest", "ratio or value", "bar", "")

    def row(name: str, value: float, bar: float, at_most: bool, *pair: str) -> None:
        met = value <= bar if at_most else value >= bar
        table.add_row(
            name, *(pair or ("", "")), f"{value:.4f}", f"{'<=' if at_most else '>='} {bar}", "met" if met else "MISSED"
        )

    for size, values in result["pieces_per_word"].items():
        pair = f"{values['wordpiece']:.4f}", f"{values['fewest']:.4f}"
        row(f"pieces per word at {size}", values["ratio"], BARS["ratio"], True, *pair)
    row("overlap with the teacher at 5000", result["teacher_overlap"]["5000"], BARS["overlap"], False)
    row("build, seconds", result["build_seconds"], BARS["build_seconds"], True)
    row("count + build, time", result["count_and_build_ratio"], BARS["count_and_build_ratio"], True)
    Console(width=110).print(table)
    peaks = result["counting_peak_mb"]
    print(f"peak memory of counting: {peaks['1x']:.0f} MB; of ten times the text: {peaks['10x']:.0f} MB")


if __name__ == "__main__":
    main()
