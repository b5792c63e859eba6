"""Measures mixed, masked batches on one core against tokenising the text again each epoch, as data collators do.

The peer is transformers' fast tokenizers and its masked-LM collator, for both vocabularies, from text in memory, on
the same lines and batch sizes. It gets off lightly: it draws no mixture and does not mask the same words on both sides.

    python tests/bench/batches.py --corpus docs.jsonl --teacher FOLDER --out artifacts/bench/batches.json
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling
from transformers.utils import logging

from tokenizer_build.corpus import read_blocks
from tokenizer_build.count import count_block
from tokenizer_build.files import write_json
from tokenizer_build.tokenizer import make_tokenizer, save_tokenizer
from tokenizer_build.trainers import train_vocabulary
from vocabshrink.data.batches import Batcher, PieceTable, cut_segments
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.models.loading import resolve_model

MAX_LENGTH, BATCH = 128, 256
ENCODE = """
import sys
from itertools import islice
from tokenizer_build.corpus import read_blocks
from vocabshrink.data.lexicon import encode_corpus
teacher, student, folder, blocks, *corpus = sys.argv[1:]
encode_corpus(islice(read_blocks(corpus), int(blocks)), teacher, student, folder)
# not getrusage: its peak would include that of the process that started this one
print(next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def encoding_peak(corpus: list[str], teacher: Path, student: Path, folder: Path, blocks: int) -> float:
    """Peak megabytes of a process that encodes so many blocks of the corpus."""
    command = [sys.executable, "-c", ENCODE, str(teacher), str(student), str(folder), str(blocks), *corpus]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def tokens_per_second(make_batch, seconds: float) -> float:
    """Tokens a second (special tokens counted, padding not) of `make_batch(i) -> tokens` over some seconds."""
    make_batch(0)
    tokens, index, started = 0, 1, time.perf_counter()
    while time.perf_counter() - started < seconds:
        tokens += make_batch(index)
        index += 1
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=10, help="of 4 M characters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    teacher = resolve_model(arguments.teacher)
    with tempfile.TemporaryDirectory() as place:
        student, encoded = Path(place) / "vocab", Path(place) / "encode"
        lines = [line for block in islice(read_blocks(arguments.corpus), arguments.blocks) for line in block]
        pieces = train_vocabulary(count_block(lines), 5000)
        save_tokenizer(make_tokenizer(pieces), student)
        encode_corpus([lines], teacher, student, encoded)
        lexicon, stream = Lexicon.load(encoded), WordStream.load(encoded)
        training, _ = cut_segments(
            stream, lexicon, unit="line", max_pieces=MAX_LENGTH - 2, min_words=4, held_out_every=1_000_000
        )
        batcher = Batcher(
            PieceTable(lexicon),
            stream,
            lexicon,
            training,
            batch_size=BATCH,
            seed=0,
            sides=("mixed", "student"),
            mask=0.15,
            max_pieces=MAX_LENGTH - 2,
        )

        def ours(index: int) -> int:
            batch = batcher.batch(index)
            return int(batch.mixed.attention_mask.sum() + batch.student.attention_mask.sum())

        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, student)]
        collators = [DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15) for tokenizer in tokenizers]

        def peer(index: int) -> int:
            start = index * BATCH % max(1, len(lines) - BATCH)
            tokens = 0
            for tokenizer, collate in zip(tokenizers, collators, strict=True):
                encoded = tokenizer(lines[start : start + BATCH], truncation=True, max_length=MAX_LENGTH)
                batch = collate([{"input_ids": ids} for ids in encoded["input_ids"]])
                tokens += int(batch["attention_mask"].sum())
            return tokens

        ratios, speeds = [], []
        for _ in range(3):  # in turn, so that a drifting machine moves both
            speeds.append(tokens_per_second(ours, 3))
            ratios.append(speeds[-1] / tokens_per_second(peer, 6))
        peaks = [
            encoding_peak(arguments.corpus, teacher, student, Path(place) / f"{blocks}", blocks)
            for blocks in (1, arguments.blocks)
        ]
    result = {
        "tokens_per_second": round(sorted(speeds)[1]),
        "ratio_to_retokenising": round(sorted(ratios)[1], 1),
        "encoding_peak_mb": {"1": round(peaks[0], 1), f"{arguments.blocks}": round(peaks[1], 1)},
    }
    write_json(arguments.out, result)
    print(f"mixed, masked batches   {result['tokens_per_second'] / 1e6:.1f} M tokens/s on one core (bar: 5 M)")
    print(f"against re-tokenising   {result['ratio_to_retokenising']:.1f}x (bar: 20x)")
    print(f"peak memory of encoding {peaks[0]:.0f} MB for 1 block, {peaks[1]:.0f} MB for {arguments.blocks}")


if __name__ == "__main__":
    main()
