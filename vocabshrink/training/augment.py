"""Data augmentation of a task's training rows, as TinyBERT does it (Jiao et al. 2020, algorithm 1).
Every word of a row is replaced, with probability p, by one of K candidates. A word that is one piece of the teacher's
vocabulary is masked, alone, and the teacher's masked-LM head names the K most probable words in its place. A word of
several pieces takes the K words nearest to their mean in the teacher's own table (the paper downloads GloVe), each
piece weighted by its letters. Such a mean knows what `movie ##go ##ers` is near to, but nothing of `un ##fu ##nn ##y`,
so a word whose first piece has less than half of its letters is masked as a whole instead; a teacher without a head
leaves it. Numbers, signs and what touches an apostrophe (`n't`, `'s`) stay, because they decide labels; so does what
the teacher does not read as one word: runs of Chinese, letters with combining marks. Not done: the other sentence of a
pair as context, from which the masked word would be copied."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from tokenizers import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenizer_build.files import hash_of, read_jsonl, write_jsonl, write_text
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.data.tasks import Rows, Task
from vocabshrink.models.families import positions_of
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.spelling import as_wordpiece, first_known
from vocabshrink.models.teacher import Teacher
from vocabshrink.run.recipe import AugmentSection

WORD = re.compile(r"(?<![\w'’])[^\W\d_]+(?![\w'’])")
ROWS_IN_BLOCK = 64  # what a crash loses
PIECES_IN_PASS = 8192  # padding included

Sentence = tuple[str, ...]  # one text, or the tokens of a token task


def augment_task(
    task: Task, teacher: Teacher, out: Path, section: AugmentSection, work: Path, progress: Callable = lambda rows: None
) -> dict:
    """Writes up to `section.copies` changed copies of every training row to `out`. Finished blocks of rows are kept in
    `work`, from which a killed call goes on. progress: given the rows of each block. A row of `out` is {"sentence1",
    "sentence2" for pairs, "label", "source" (the training row, from 0)} or, for token tasks, {"tokens", "slots" (the
    labels), "source"}. Returns {"rows", "written"}."""
    rows, finder, blocks = task.splits["train"], CandidateFinder(teacher, section.candidates), []
    targets = [np.asarray(target).tolist() for target in rows.targets]
    decides = [section.model_dump(), teacher.head is None, list(rows.first), rows.second, targets]
    work = work / hash_of(decides)
    for start in range(0, len(rows), ROWS_IN_BLOCK):
        blocks.append(work / f"{start}.jsonl")
        if not blocks[-1].is_file():
            block = range(start, min(start + ROWS_IN_BLOCK, len(rows)))
            sentences = list(dict.fromkeys(s for row in block for s in sentences_of(rows, row)))
            found = dict(zip(sentences, finder(sentences), strict=True))
            write_jsonl(blocks[-1], (copy for row in block for copy in copies_of(task, row, found, section)))
            progress(len(block))
    text = "".join(block.read_text(encoding="utf-8") for block in blocks)
    write_text(out, text)
    return {"rows": len(rows), "written": text.count("\n")}


def augmented_rows(task: Task, path: Path) -> Rows:
    """The training rows of a task, then their copies in a file of `augment_task`."""
    rows, copies = task.splits["train"], [copy for _, copy in read_jsonl(path)]
    sources = np.concatenate((np.arange(len(rows)), [copy["source"] for copy in copies])).astype(np.int64)
    text = "tokens" if task.kind == "tokens" else "sentence1"
    second = None if rows.second is None else [*rows.second, *(copy["sentence2"] for copy in copies)]
    targets = rows.targets[sources] if isinstance(rows.targets, np.ndarray) else [rows.targets[i] for i in sources]
    return Rows([*rows.first, *(copy[text] for copy in copies)], second, targets)


def sentences_of(rows: Rows, row: int) -> list[Sentence]:
    texts = [rows.first[row]] if rows.second is None else [rows.first[row], rows.second[row]]
    return [(text,) if isinstance(text, str) else tuple(text) for text in texts]


@dataclass
class Word:
    """A word: text[start:end] of one part of a sentence. pieces: its ids, from index `first` of the sentence's on; none
    where the teacher does not read it as one word. letters: of each piece."""

    part: int
    start: int
    end: int
    pieces: tuple[int, ...]
    letters: tuple[int, ...]
    first: int
    candidates: list[str] = field(default_factory=list)


def copies_of(task: Task, row: int, found: dict[Sentence, list[Word]], section: AugmentSection) -> list[dict]:
    """The distinct changed copies of a training row, as rows of the file."""
    rows, random = task.splits["train"], np.random.default_rng((0, row))
    sentences, target = sentences_of(rows, row), rows.targets[row]
    words = [(number, w) for number, sentence in enumerate(sentences) for w in found[sentence] if w.candidates]
    chosen = random.random((section.copies, len(words))) < section.p
    draws = random.integers(np.array([len(word.candidates) for _, word in words], np.int64), size=chosen.shape)
    distinct = {}
    for places, drawn in zip(chosen, draws, strict=True):
        changes = [[] for _ in sentences]
        for place in np.flatnonzero(places):
            number, word = words[place]
            changes[number].append((word, word.candidates[drawn[place]]))
        distinct[tuple(map(replace, sentences, changes))] = True
    distinct.pop(tuple(sentences), None)
    if task.kind == "tokens":
        return [{"tokens": list(c), "slots": [task.labels[i] for i in target], "source": row} for (c,) in distinct]
    label = float(target) if task.kind == "regression" else task.labels[int(target)]
    names = ("sentence1", "sentence2")
    return [dict(zip(names, map("".join, copy), strict=False)) | {"label": label, "source": row} for copy in distinct]


def replace(sentence: Sentence, replacements: list[tuple[Word, str]]) -> Sentence:
    """The sentence with each word's replacement in its place, capital letters as they were."""
    parts = list(sentence)
    for word, new in reversed(replacements):  # from the end, so that the offsets before it stay
        text = parts[word.part]
        old = text[word.start : word.end]
        if old[0].isupper():
            new = new.upper() if old.isupper() and len(old) > 1 else new[0].upper() + new[1:]
        parts[word.part] = text[: word.start] + new + text[word.end :]
    return tuple(parts)


class CandidateFinder:
    """Finds what may stand for each word of a sentence: whole words of two letters or more. The teacher is moved to the
    accelerator's device; nearest words are found on the CPU, in float64, where no rounding decides."""

    def __init__(self, teacher: Teacher, count: int):
        self.teacher, self.count, self.device = teacher, count, PartialState().device
        for module in filter(None, (teacher.backbone, teacher.head)):
            module.to(self.device)
        self.tokenizer = tokenizer = load_tokenizer(teacher.folder)
        self.mask, self.unknown = first_known(tokenizer, "[MASK]", "<mask>"), first_known(tokenizer, "[UNK]", "<unk>")
        texts = {i: as_wordpiece(piece, tokenizer) for piece, i in tokenizer.get_vocab().items()}
        words = {i: text for i, text in sorted(texts.items()) if text and text.isalpha() and len(text) > 1}
        self.ids, self.words = torch.tensor(list(words), dtype=torch.long).to(self.device), list(words.values())
        self.near: dict[tuple[int, ...], list[str]] = {}
        # [V, D_E], and its rows of whole words [W, D_E] at length one
        self.table = teacher.table.weight.detach().cpu().double()
        self.whole = F.normalize(self.table[list(words)], dim=-1)

    @torch.no_grad()
    def __call__(self, sentences: list[Sentence]) -> list[list[Word]]:
        """The words of each sentence, in order, with their candidates."""
        encodings = self.tokenizer.encode_batch([" ".join(sentence) for sentence in sentences])
        found = [words_of(sentence, encoding) for sentence, encoding in zip(sentences, encodings, strict=True)]
        nearest, masked, most = [], [], positions_of(self.teacher.config)
        for encoding, words in zip(encodings, found, strict=True):
            head = self.teacher.head and self.mask is not None and len(encoding.ids) <= most
            for word in (word for word in words if word.pieces):
                spelt = self.unknown not in word.pieces and 2 * word.letters[0] >= sum(word.letters)
                if head and (len(word.pieces) == 1 or not spelt):
                    masked.append((encoding.ids, word))
                elif spelt:
                    nearest.append(word)
        self.predict(masked)
        self.look_up(nearest)
        for sentence, words in zip(sentences, found, strict=True):
            for word in words:  # never the word itself, however capitalised
                own = sentence[word.part][word.start : word.end].casefold()
                word.candidates = [new for new in word.candidates if new.casefold() != own][: self.count]
        return found

    def look_up(self, nearest: list[Word]) -> None:
        """Gives each word those whose piece embeddings are nearest to the mean of its own, by cosine."""
        if new := {word.pieces: word.letters for word in nearest if word.pieces not in self.near}:
            means = [torch.tensor(letters).double() @ self.table[list(pieces)] for pieces, letters in new.items()]
            self.near |= zip(new, self.best(F.normalize(torch.stack(means), dim=-1) @ self.whole.T), strict=True)
        for word in nearest:
            word.candidates = self.near[word.pieces]

    def predict(self, masked: list[tuple[list[int], Word]]) -> None:
        """Gives each word of (sentence's pieces, word) the most probable words in its place."""
        waiting = sorted(masked, key=lambda item: len(item[0]))
        while waiting:  # long ones first: what does not fit in memory fails at once
            size = max(PIECES_IN_PASS // len(waiting[-1][0]), 1)
            part, waiting = waiting[-size:], waiting[:-size]
            rows = [torch.tensor([*ids[: w.first], self.mask, *ids[w.first + len(w.pieces) :]]) for ids, w in part]
            ids = pad_sequence(rows, batch_first=True, padding_value=-1)
            side, width = Pieces(ids.clamp_min(0), (ids >= 0).long(), ids), ids.shape[1]
            places = torch.tensor([row * width + word.first for row, (_, word) in enumerate(part)]).to(self.device)
            _ = side.lengths  # while they are on the host
            hidden = run_backbone(self.teacher.backbone, side.to(self.device)).hidden[-1]
            states = hidden.flatten(0, 1).index_select(0, places)
            logits = self.teacher.head(states.float(), self.teacher.table.weight).index_select(1, self.ids)
            for (_, word), best in zip(part, self.best(logits), strict=True):
                word.candidates = best

    def best(self, scores: Tensor) -> list[list[str]]:
        """[n, W] -> the words of the highest scores, two more than asked for: `The` and `the` may have to go."""
        top = scores.topk(min(self.count + 2, scores.shape[1])).indices
        return [[self.words[i] for i in row] for row in top.cpu().tolist()]


def words_of(sentence: Sentence, encoding: Encoding) -> list[Word]:
    """The words of a sentence in order. encoding: of its parts with spaces between. A word has no pieces where one
    reaches over its edges or the tokenizer's own words begin inside it: no mask and no mean stands for it then."""
    text, ids, numbers, words, begin = " ".join(sentence), encoding.ids, encoding.word_ids, [], 0
    # of each piece, without the space that some families count to it; special tokens span nothing
    spans = [(end - len(text[start:end].lstrip()), end) for start, end in encoding.offsets]
    for part, of_part in enumerate(sentence):
        for match in WORD.finditer(of_part):
            start, end = begin + match.start(), begin + match.end()
            inside = [i for i, span in enumerate(spans) if span[0] < end and span[1] > start]
            whole = inside and (spans[inside[0]][0], spans[inside[-1]][1]) == (start, end)
            marks = any(unicodedata.category(c)[0] == "M" for c in text[max(start - 1, 0) : end + 1])
            if not whole or marks or len({numbers[i] for i in inside}) > 1:
                inside = []
            pieces, letters = tuple(ids[i] for i in inside), tuple(spans[i][1] - spans[i][0] for i in inside)
            words.append(Word(part, *match.span(), pieces, letters, min(inside, default=0)))
        begin += len(of_part) + 1
    return words
