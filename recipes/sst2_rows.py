"""The rows that sst2_7mb.yaml and sst2_2mb.yaml learn from: SST-2's own with the stored logits of a BERT-base, and
sentences and clauses of unlabelled film reviews with those of an encoder fine-tuned on SST-2 here for one epoch.

    python recipes/sst2_rows.py --teacher sentence-transformers/all-mpnet-base-v2 --task tasks/sst2 \\
      --logits LOGITS.safetensors --texts reviews.parquet --out data
                                  # data/sst2/*.jsonl and data/logits.safetensors, by data/teacher and data/labelled

Reviews are written as SST-2 is (lower case, punctuation and contractions apart) and cut to its lengths; what also
stands in its validation or test is left out. On one core with AMX the epoch takes about half an hour and 100,000
sentences ten minutes. Killed and called again, it goes on.
"""

import argparse
import random
import re
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tokenizer_build.corpus import read_lines
from tokenizer_build.files import read_jsonl, write_jsonl
from vocabshrink.api import run_recipe
from vocabshrink.data.vectors import sentences_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import parse_recipe
from vocabshrink.stages.tasks import label_texts, write_logits

TUNING = {"epochs": 1, "batch_size": 32, "max_length": 64, "learning_rate": 3e-5, "warmup": 0.05}
CLAUSES = 0.35  # of the sentences are cut to one clause, since SST-2's training rows are phrases
WORDS = (4, 24)


def as_sst2(text: str) -> str:
    """A sentence as SST-2 writes it: `it 's a film , but n't one`."""
    text = re.sub(r"<br ?/?>", " ", text)
    text = re.sub(r"([.,;:!?()\"]+)", r" \1 ", text)
    text = re.sub(r"(\w)('s|'re|'ve|'ll|'d|'m)\b", r"\1 \2", re.sub(r"n't\b", " n't", text))
    return " ".join(text.lower().split())


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def draw(texts: list[str], held_out: set[str], number: int) -> list[str]:
    """`number` of the distinct sentences and clauses, in random order."""
    rng, found = random.Random(0), {}
    for sentence in map(as_sst2, chain.from_iterable(map(sentences_of, read_lines(texts, "text")))):
        if rng.random() < CLAUSES:
            sentence = rng.choice(re.split(r" [,;:] | -- | but | and ", sentence)).strip(" ,;:-")
        if WORDS[0] <= len(sentence.split()) <= WORDS[1] and letters(sentence) not in held_out:
            found[sentence] = None
    return rng.sample(list(found), min(number, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    for name in ("--task", "--logits", "--out"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--texts", required=True, nargs="+")
    parser.add_argument("--number", type=int, default=100_000)
    given = parser.parse_args()
    files = {split: given.task / f"{split}.jsonl" for split in ("train", "validation", "test")}
    tuning = {
        "name": "teacher",
        "teacher": {"model": given.teacher},
        "corpus": {"sources": given.texts},
        "tasks": {"sst2": {split: str(file.absolute()) for split, file in files.items()}},
        "finetune": {"teacher": TUNING, "phases": [{"losses": {"soft_labels": 1.0}}]},
        "evaluation": {"sentences": 0},
        "delivery": None,
    }
    run = RunDir(given.out / "teacher")
    run_recipe(parse_recipe(tuning, "sst2_rows.py"), run, only="task_teacher")
    held_out = {letters(row["sentence1"]) for split in ("validation", "test") for _, row in read_jsonl(files[split])}
    labelled, asked = given.out / "labelled", {"texts": given.texts, "number": given.number}
    teacher = run.stage("task_teacher") / "sst2/model"
    section = label_texts(str(teacher), lambda: draw(given.texts, held_out, given.number), labelled, asked)
    of_bert, answers = load_file(given.logits), load_file(section["logits"])
    of_mpnet = np.concatenate([answers["train.logits"], answers["validation.logits"]])
    # one temperature serves both teachers if their logits lie as far apart
    apart = [float(np.abs(logits[:, 1] - logits[:, 0]).mean()) for logits in (of_bert["train.logits"], of_mpnet)]
    joined = np.concatenate([of_bert["train.logits"], of_mpnet * min(apart[0] / apart[1], 1.5)]).astype(np.float32)
    number_of = {label: number for number, label in enumerate(section["labels"])}
    new = chain.from_iterable(read_jsonl(section[split]) for split in ("train", "validation"))
    rows = [row for _, row in read_jsonl(files["train"])] + [row | {"label": number_of[row["label"]]} for _, row in new]
    (given.out / "sst2").mkdir(parents=True, exist_ok=True)
    write_jsonl(given.out / "sst2/train.jsonl", rows)
    for file in (files["validation"], files["test"], given.task / "meta.json"):
        shutil.copy(file, given.out / "sst2")
    logits = {"train": joined, "validation": of_bert["validation.logits"]}
    write_logits(given.out / "logits.safetensors", logits)


if __name__ == "__main__":
    main()
