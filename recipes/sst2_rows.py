"""The rows that sst2_7mb.yaml and sst2_2mb.yaml learn from: SST-2's own with the stored logits of a BERT-base, and
sentences and clauses of unlabelled film reviews with those of an encoder fine-tuned on SST-2 here for one epoch.

    python recipes/sst2_rows.py --teacher sentence-transformers/all-mpnet-base-v2 --task tasks/sst2 \\
      --logits LOGITS.safetensors --texts reviews.parquet --out data
                                  # data/sst2/*.jsonl, data/logits.safetensors, data/teacher/

Reviews are written as SST-2 is (lower case, punctuation and contractions apart) and cut to its lengths; what also
stands in its validation or test is left out. On one core with AMX the epoch takes about half an hour and 100,000
sentences ten minutes.
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from tokenizer_build.corpus import read_lines
from tokenizer_build.files import read_jsonl
from vocabshrink.data.vectors import sentences_of
from vocabshrink.models.loading import resolve_model

BATCH, RATE, WARMUP, LONGEST = 32, 3e-5, 100, 64
CLAUSES = 0.35  # of the sentences are cut to one clause, since SST-2's training rows are phrases
WORDS = (4, 24)


def as_sst2(text: str) -> str:
    """A sentence as SST-2 writes it: `it 's a film , but n't one`."""
    text = re.sub(r"<br ?/?>", " ", text)
    text = re.sub(r"([.,;:!?()\"]+)", r" \1 ", text)
    text = re.sub(r"(\w)('s|'re|'ve|'ll|'d|'m)\b", r"\1 \2", re.sub(r"n't\b", " n't", text))
    return " ".join(text.lower().split())


def draw(texts: list[str], held_out: set[str], number: int) -> list[str]:
    """`number` distinct sentences and clauses, each of those that there are with the same chance, in random order."""
    rng, kept, known = random.Random(0), [], set()
    for line in read_lines(texts, "text"):
        for sentence in map(as_sst2, sentences_of(line)):
            if rng.random() < CLAUSES:
                sentence = rng.choice(re.split(r" [,;:] | -- | but | and ", sentence)).strip(" ,;:-")
            if not WORDS[0] <= len(sentence.split()) <= WORDS[1] or sentence in known or letters(sentence) in held_out:
                continue
            known.add(sentence)
            if len(kept) < number:
                kept.append(sentence)
            elif (at := rng.randrange(len(known))) < number:  # Vitter's algorithm R
                kept[at] = sentence
    rng.shuffle(kept)
    return kept


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


class Classifier:
    """An encoder with a new head of two labels."""

    def __init__(self, name: str):
        folder = resolve_model(name)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def logits(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, truncation=True, max_length=LONGEST, padding="longest", return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch).logits.float()

    def train(self, rows: list[dict]) -> None:
        """One epoch in batches of like lengths; the piece table stays as it is."""
        self.model.get_input_embeddings().requires_grad_(False)
        rng, batches = random.Random(0), list(by_length([row["sentence1"] for row in rows], BATCH))
        rng.shuffle(batches)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, min(WARMUP, len(batches) // 10), len(batches))
        self.model.train()
        for step, chosen in enumerate(batches, 1):
            labels = torch.tensor([int(rows[i]["label"]) for i in chosen])
            loss = F.cross_entropy(self.logits([rows[i]["sentence1"] for i in chosen]), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                print(f"step {step} of {len(batches)}: loss {loss.item():.4f}", flush=True)

    @torch.inference_mode()
    def answers(self, texts: list[str]) -> np.ndarray:
        """[N, 2] logits."""
        self.model.eval()
        found = np.empty((len(texts), 2), np.float32)
        for chosen in by_length(texts, 2 * BATCH):
            found[chosen] = self.logits([texts[i] for i in chosen]).numpy()
        return found


def by_length(texts: list[str], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    for name in ("--task", "--logits", "--out"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--texts", required=True, nargs="+")
    parser.add_argument("--number", type=int, default=100_000)
    given = parser.parse_args()
    splits = {
        name: [row for _, row in read_jsonl(given.task / f"{name}.jsonl")] for name in ("train", "validation", "test")
    }
    held_out = {letters(row["sentence1"]) for name in ("validation", "test") for row in splits[name]}
    drawn, of_bert = draw(given.texts, held_out, given.number), load_file(given.logits)
    torch.manual_seed(0)
    classifier = Classifier(given.teacher)
    classifier.train(splits["train"])
    right = classifier.answers([row["sentence1"] for row in splits["validation"]]).argmax(1)
    print(
        "the teacher's accuracy on validation:", np.mean(right == [int(row["label"]) for row in splits["validation"]])
    )
    classifier.model.save_pretrained(given.out / "teacher")
    classifier.tokenizer.save_pretrained(given.out / "teacher")
    answers = classifier.answers(drawn)
    # one temperature serves both teachers if their logits lie as far apart
    apart = [float(np.abs(logits[:, 1] - logits[:, 0]).mean()) for logits in (of_bert["train.logits"], answers)]
    logits = np.concatenate([of_bert["train.logits"], answers * min(apart[0] / apart[1], 1.5)]).astype(np.float32)
    rows = splits["train"] + [{"sentence1": t, "label": int(a)} for t, a in zip(drawn, answers.argmax(1), strict=True)]
    (given.out / "sst2").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (given.out / "sst2/train.jsonl").write_text(lines, encoding="utf-8")
    for name in ("validation.jsonl", "test.jsonl", "meta.json"):
        shutil.copy(given.task / name, given.out / "sst2")
    save_file(
        {"train.logits": logits, "validation.logits": of_bert["validation.logits"]}, given.out / "logits.safetensors"
    )


if __name__ == "__main__":
    main()
