"""Measures mixed, masked batches on one core against tokenising the text again each epoch, as data collators do.

The peer is transformers' fast tokenizers and its masked-LM collator, for both vocabularies, from text in memory, on
the same lines and batch sizes. It gets off lightly: it draws no mixture and does not mask the same words on both sides.

    python tests/bench/batches.py --corpus docs.jsonl --teacher FOLDER --out artifacts/bench/batches.json
"""

import argparse
import json
import os
import resource
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
from tokenizer_build.tokenizer import save_tokenizer
from tokenizer_build.trainers import TRAINERS
from vocabshrink.batches import Batcher, PieceTable, cut_segments
from vocabshrink.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.run_dir import write_json
from vocabshrink.teacher import resolve_model

MAX_LENGTH, BATCH = 128, 256
ENCODE = """
import resource, sys
from itertools import islice
from tokenizer_build.corpus import read_blocks
from vocabshrink.lexicon import encode_corpus
corpus, teacher, student, folder, blocks, size = sys.argv[1:]
share = 10 if size == "small" else 1
blocks_read = (block[: len(block) // share] for block in islice(read_blocks([corpus]), int(blocks)))
encode_corpus(blocks_read, teacher, student, folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def encoding_peak(corpus: str, teacher: Path, student: Path, folder: Path, blocks: int, size: str) -> float:
    """Peak megabytes of a process that encodes the corpus: a tenth of each block ("small") or all of it."""
    command = [sys.executable, "-c", ENCODE, corpus, str(teacher), str(student), str(folder), str(blocks), size]
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
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8, help="of 4 M characters")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    teacher = resolve_model(arguments.teacher)
    with tempfile.TemporaryDirectory() as place:
        student, encoded = Path(place) / "vocab", Path(place) / "encode"
        lines = [line for block in islice(read_blocks([arguments.corpus]), arguments.blocks) for line in block]
        pieces = TRAINERS["fewest"](count_block(lines), 5000, required=(), teacher_vocabulary=None)
        save_tokenizer(pieces, student)
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
        peaks = {
            size: round(
                encoding_peak(arguments.corpus, teacher, student, Path(place) / size, arguments.blocks, size), 1
            )
            for size in ("small", "whole")
        }
    result = {
        "tokens_per_second": round(sorted(speeds)[1]),
        "ratio_to_retokenising": round(sorted(ratios)[1], 1),
        "encoding_peak_mb": {"tenth": peaks["small"], "whole": peaks["whole"]},
    }
    write_json(arguments.out, result)
    print(f"mixed, masked batches   {result['tokens_per_second'] / 1e6:.1f} M tokens/s on one core (bar: 5 M)")
    print(f"against re-tokenising   {result['ratio_to_retokenising']:.1f}x (bar: 20x)")
    print(f"peak memory of encoding {peaks['small']:.0f} MB of a tenth of the text, {peaks['whole']:.0f} MB of all")
    print(json.dumps(result))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"(this process: {own:.0f} MB)")


if __name__ == "__main__":
    main()
