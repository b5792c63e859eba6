"""The lexicon: a corpus as a stream of word ids, and the pieces of each word in both vocabularies.

A corpus is tokenised once. Every line becomes a row of word ids in a memory-mapped file, and the lexicon lists the
teacher pieces and the student pieces of each word; from then on any segmentation, mixed ones included, is a gather.
A *word* is the smallest stretch of text at whose edges both tokenizers cut, and its identity is its two
segmentations: "The" and "the" are one word if both vocabularies are uncased.

This is exact by construction: lines are cut into chunks only where neither tokenizer can see across the cut (before a
space that follows a visible character; for two BERT tokenizers also beside ASCII punctuation), each distinct chunk is
tokenised by the real tokenizers, and its pieces are only grouped, never reordered or dropped. The pieces of a line's
words, joined, are therefore what the tokenizer gives for the line (with special tokens in the text read as text).
`check_family` refuses tokenizers for which that cannot be promised, and the first lines of every corpus are compared.

Cost: one dictionary look-up per chunk (about 2 million words per second and core once warm) and one call of each
tokenizer per distinct chunk. Memory holds one block, a bounded cache of chunks and the lexicon; only the lexicon
grows. Not done: tokenizers that read whole sentences (no split at spaces), dropping words seen once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import unicodedata
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, filterfalse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.files import naming_full_disk, read_json, write_json

CACHED_CHUNKS = 1_000_000  # about 250 MB; Zipf's law makes a refill after clearing cheap
CACHED_CHARACTERS = 1_000  # longer chunks are not words of a language and will not come again
CHECKED_CHARACTERS = 500_000  # of the first block, compared with whole-line tokenisation
LOCAL_NORMALIZERS = re.compile("BertNormalizer|NFK?[CD]|Lowercase|StripAccents|Nmt|Strip|Precompiled")
PRE_TOKENIZERS_AT_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "ByteLevel")
EDGES = (" ", "  ", "   ", " \t", "\t ", "\u00a0 ", " \u00a0", "\u200b ", ". ", " '", "▁ ", " ▁", "é ", " \u0301")
ROLES = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}  # RoBERTa's names

CHUNK = re.compile(r" *[^ ]+| +")
DOUBTFUL = re.compile(r"[^ -~](?= )")  # a character that may not be a safe place to cut, before a space
BERT_CHUNK = re.compile(r"[^ !-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")  # one ASCII punctuation mark, or none
SENTENCE_END = re.compile("[.!?…‼‽⁇⁈⁉。！．？｡؟۔।॥]+")


@dataclass(frozen=True)
class Lexicon:
    """A word *is* its two segmentations; the tables are CSR: word w has ids[offsets[w]:offsets[w + 1]].

    `meta` has "teacher" and "student", each as of `_describe`, and the totals that `encode_corpus` returns.
    """

    teacher_offsets: np.ndarray  # [W + 1] int64
    teacher_ids: np.ndarray  # int32, concatenated pieces
    student_offsets: np.ndarray  # [W + 1] int64
    student_ids: np.ndarray  # int32
    counts: np.ndarray  # [W] int64, occurrences in the stream
    ends_sentence: np.ndarray  # [W] bool, the surface is a run of . ! ? or of their equivalents
    words: list[str]  # the surface at the first occurrence, white space stripped
    meta: dict

    @classmethod
    def load(cls, folder: Path) -> Lexicon:
        """Reads what `encode_corpus` wrote. Raises InputError if the folder is not a finished lexicon."""
        meta = read_json(folder / "meta.json")
        # split on "\n" alone: JSON keeps U+2028 and its like as they are, and str.splitlines cuts there
        words = ",".join((folder / "words.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
        return cls(**load_file(folder / "lexicon.safetensors"), words=json.loads(f"[{words}]"), meta=meta)


@dataclass(frozen=True)
class WordStream:
    """The corpus as word ids; line i is word_ids[line_offsets[i]:line_offsets[i + 1]], in corpus order."""

    word_ids: np.ndarray  # [N] uint32, memory-mapped
    line_offsets: np.ndarray  # [L + 1] int64, memory-mapped

    @classmethod
    def load(cls, folder: Path) -> WordStream:
        """Maps what `encode_corpus` wrote. Raises InputError if the folder is not a finished lexicon."""
        read_json(folder / "meta.json")
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("word_ids", "line_offsets")))


def within_rows(lengths: np.ndarray) -> np.ndarray:
    """The position of every element in its row of a CSR table: [0 .. lengths[0] - 1, 0 .. lengths[1] - 1, ...]."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def encode_corpus(
    blocks: Iterable[list[str]],
    teacher_tokenizer: str | Path,
    student_tokenizer: str | Path,
    folder: Path,
    *,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Writes the lexicon and word stream of `blocks` (lists of lines) into `folder`; returns the totals.

    Tokenizers are folders or tokenizer.json files. The files are byte-identical for every number of processes (words
    are numbered by first occurrence) and for every way of cutting the lines into blocks. An empty line stays as a line
    without words. `progress` is called with the number of words of each block written. Other files in `folder` stay,
    and a run that fails leaves the earlier ones. Totals: lines, words, distinct_words, teacher_pieces, student_pieces
    (both over the whole stream). Raises InputError for a tokenizer that cannot be handled exactly, a corpus without
    words, a full disk.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a process; and spawn inherits it
    paths = tokenizer_file(teacher_tokenizer), tokenizer_file(student_tokenizer)
    teacher, student = map(_describe, paths)
    # a teacher alone on a task stands on both sides
    if student["family"] != "wordpiece" and student["sha256"] != teacher["sha256"]:
        raise InputError(f"{paths[1]} is a {student['family']} tokenizer; give the student a WordPiece vocabulary")
    partial = folder / ".partial"  # one name, so that the next run removes what a killed one left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with naming_full_disk(folder):
            totals = _write(_encode_blocks(blocks, paths, processes), partial, progress or (lambda words: None))
            write_json(partial / "meta.json", {"teacher": teacher, "student": student} | totals)
            (folder / "meta.json").unlink(missing_ok=True)  # goes first and comes last: no half-written run loads
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "meta.json"):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return totals


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json of a folder, or the file itself. Raises InputError if there is none."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no tokenizer.json; AutoTokenizer's save_pretrained writes one")
    return file


def check_family(path: str | Path) -> str:
    """How this tokenizer keeps words apart: "wordpiece", "byte-level", "metaspace" or "words".

    Raises InputError, with the reason, for one that cannot be cut at spaces exactly: that reads whole sentences or
    single characters, whose parts are not known to act locally, or that is random.
    """
    path = tokenizer_file(path)
    spec = json.loads(_load(path).to_str())
    if reason := _unfit(spec) or _inexact(path):
        raise InputError(f"{path} cannot be encoded word by word: {reason}; choose another teacher")
    if spec["model"]["type"] == "WordPiece":
        return "wordpiece"
    kinds = {part["type"] for part in _parts(spec["pre_tokenizer"], "pretokenizers")}
    return "byte-level" if "ByteLevel" in kinds else "metaspace" if "Metaspace" in kinds else "words"


def _parts(spec: dict | None, key: str) -> list[dict]:
    """The normalizers or pre-tokenizers of a tokenizer.json, sequences flattened."""
    if spec is None or spec["type"] != "Sequence":
        return [spec] if spec else []
    return [leaf for part in spec[key] for leaf in _parts(part, key)]


def _unfit(spec: dict) -> str | None:
    """Why the parts of this tokenizer.json are not known to act within words; None if they are."""
    blanks = (" {2,}", r"\s{2,}|[\n\r\t]", r"\s+")  # these match within one run of white space
    for part in _parts(spec["normalizer"], "normalizers"):
        pattern = part.get("pattern", {})
        text = pattern.get("String", " " if pattern.get("Regex") in blanks else "  ")
        harmless = part["type"] == "Replace" and (text in (" ", "▁") or not re.search(r"[\s▁]", text))
        if not (harmless or LOCAL_NORMALIZERS.fullmatch(part["type"])):
            return f"its normalizer {part['type']} {pattern or ''} may look across spaces"
    apart = False
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        kind = part["type"]
        if kind not in (*PRE_TOKENIZERS_AT_SPACES, "Punctuation", "Digits"):
            return f"its pre-tokenizer {kind} is not known to act within words"
        apart |= kind in PRE_TOKENIZERS_AT_SPACES and part.get("split", True) and part.get("use_regex", True)
    if not apart:
        return "no pre-tokenizer keeps its words apart, it reads whole sentences"
    if spec["model"]["type"] not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        return f"its model {spec['model']['type']} is unknown"
    if spec["model"].get("dropout") or spec["model"].get("alpha"):
        return "it samples its segmentations"
    for token in spec["added_tokens"]:
        if not token["special"] and (token["rstrip"] or re.search(r"\s", token["content"])):
            return f"its added token {token['content']!r} reaches across spaces"
    return None


def _inexact(path: Path) -> str | None:
    """Backstop to `_unfit`: why words and lines with every kind of edge between them are tokenised differently."""
    encoder = _Encoder(path, path)
    if not all(encoder.splitter.safe(chr(c)) for c in range(33, 127)):
        return "its normalizer changes a word by what stands beside it"
    forms = ("a{0}b", "{0}a b{0}", "a's{0}12{0}{0}B!? (c)", "{0}")
    lines = [form.format(middle) for middle in EDGES for form in forms]
    different = _first_difference(encoder, lines, encoder.encode(lines))
    return f"it gives the words of {different[1]!r} other pieces alone than in the line" if different else None


def _load(path: Path) -> Tokenizer:
    """The tokenizer as it segments plain text: special tokens are text, and nothing is cut, padded or added."""
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        # without the post-processor the offsets of byte-level pieces keep their space, and nothing overlaps
        plain = spec | {"truncation": None, "padding": None, "post_processor": None}
        tokenizer = Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"{path} is not a file that the tokenizers library reads: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _describe(path: Path) -> dict:
    """What meta.json says of a tokenizer; special: ids of pad, unk, cls, sep and mask, or None."""
    family, tokenizer = check_family(path), _load(path)
    config_file = path.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    special = {}
    for role, name in ROLES.items():
        named = config.get(f"{role}_token")
        names = (named["content"] if isinstance(named, dict) else named or "", f"[{role.upper()}]", name)
        special[role] = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    return {
        "size": tokenizer.get_vocab_size(with_added_tokens=True),
        "special": special,
        "double_sep": special["cls"] is not None and tokenizer.id_to_token(special["cls"]) == "<s>",  # between a pair
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "lowercase": tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a",
        "family": family,
    }


class _Splitter:
    """Cuts lines into chunks (spaces and what follows them) where no tokenizer can see across the cut."""

    def __init__(self, tokenizers: list[Tokenizer]):
        self.normalizers = [t.normalizer for t in tokenizers if t.normalizer is not None]
        self.known: dict[str, bool] = {}
        # BERT's normalizer maps character by character and its pre-tokenizer isolates punctuation and drops white
        # space. Cutting there too halves the distinct chunks ("word", not "word," and "(word").
        if all(
            isinstance(t.normalizer, BertNormalizer)
            and isinstance(t.pre_tokenizer, BertPreTokenizer)
            and all(token.special for token in t.get_added_tokens_decoder().values())
            for t in tokenizers
        ):
            self.chunks = BERT_CHUNK.findall

    def safe(self, character: str) -> bool:
        """Whether a line may be cut between this character and a following space.

        It must be visible (what counts as white space differs between tokenizers, and runs of white space are
        tokenised as one), and normalising the two sides separately must equal normalising the whole.
        """
        if character not in self.known:
            self.known[character] = unicodedata.category(character)[0] in "LNPS" and all(
                n.normalize_str(f"a{character} b") == n.normalize_str(f"a{character}") + n.normalize_str(" b")
                and n.normalize_str(character).strip()
                and not n.normalize_str(f"a{character}")[-1].isspace()
                for n in self.normalizers
            )
        return self.known[character]

    def chunks(self, line: str) -> list[str]:
        chunks = CHUNK.findall(line)
        if line.isascii() and line.isprintable():
            return chunks
        unsafe = {c for c in set(DOUBTFUL.findall(line)) if not self.safe(c)}
        if not unsafe:
            return chunks
        groups: list[list[str]] = [[]]
        for chunk in chunks:
            if groups[-1] and groups[-1][-1][-1] not in unsafe:
                groups.append([])
            groups[-1].append(chunk)
        return ["".join(group) for group in groups]


class _Encoder:
    """One process' tokenizers and caches: blocks of lines to word ids, numbered as this process met them.

    A word's key is the bytes of int32 [number of teacher pieces, *teacher pieces, *student pieces].
    """

    def __init__(self, teacher: Path, student: Path):
        self.teacher, self.student = _load(teacher), _load(student)
        self.splitter = _Splitter([self.teacher, self.student])
        self.words: dict[bytes, int] = {}
        self.chunks: dict[str, tuple[int, ...]] = {}  # the cache
        self.new: list[tuple[bytes, str]] = []

    def encode(self, lines: list[str]) -> tuple[int, list[tuple[bytes, str]], np.ndarray, np.ndarray]:
        """(this process, its new words as (key, surface), own word ids uint32 [n], words per line int64)."""
        if len(self.chunks) > CACHED_CHUNKS:
            self.chunks.clear()
        self.new = []
        chunked = list(map(self.splitter.chunks, lines))
        flat = list(chain.from_iterable(chunked))
        missing = list(filterfalse(self.chunks.__contains__, dict.fromkeys(flat)))
        self._learn(missing)
        words = list(map(self.chunks.__getitem__, flat))
        for chunk in missing:
            if len(chunk) > CACHED_CHARACTERS:
                del self.chunks[chunk]
        word_ids = np.fromiter(chain.from_iterable(words), np.uint32)
        ends = np.cumsum(np.fromiter(chain([0], map(len, words)), np.int64, 1 + len(words)))
        lengths = np.diff(ends[np.cumsum([0, *map(len, chunked)])])
        return os.getpid(), self.new, word_ids, lengths

    def _learn(self, chunks: list[str]) -> None:
        for start in range(0, len(chunks), 2048):
            part = chunks[start : start + 2048]
            try:
                pairs = [t.encode_batch(part, add_special_tokens=False) for t in (self.teacher, self.student)]
            except TypeError:  # what the library raises for a lone surrogate
                wrong = next(c for c in part if re.search(r"[\ud800-\udfff]", c))[:80]
                raise InputError(f"the corpus has a lone surrogate in {wrong!r}; mend its encoding") from None
            for chunk, teacher, student in zip(part, *pairs, strict=True):
                numbers = []
                for left, right, surface in _words(chunk, teacher, student):
                    key = array("i", (len(left), *left, *right)).tobytes()
                    if key not in self.words:
                        self.words[key] = len(self.words)
                        self.new.append((key, surface))
                    numbers.append(self.words[key])
                self.chunks[chunk] = tuple(numbers)


def _words(chunk: str, teacher: Encoding, student: Encoding) -> Iterator[tuple[list[int], list[int], str]]:
    """The words of a chunk as (teacher pieces, student pieces, surface): cut wherever both tokenizers cut.

    A side without pieces for a word (its normalizer removed it, or it is white space) has an empty list.
    """
    if chunk.isascii() and chunk.removeprefix(" ").isalpha():  # most chunks, and one word to every family
        yield teacher.ids, student.ids, chunk.strip()
        return
    (teacher_cuts, student_cuts), i, j, last = (_cuts(e, len(chunk)) for e in (teacher, student)), 0, 0, None
    while i < len(teacher_cuts) and j < len(student_cuts):  # intersects two sorted lists of intervals
        (t, t_low, t_high), (s, s_low, s_high) = teacher_cuts[i], student_cuts[j]
        if max(t_low, s_low) <= min(t_high, s_high):
            if last is not None and last[:2] != (t, s):
                surface = chunk[last[2] : max(t_low, s_low)]
                yield teacher.ids[last[0] : t], student.ids[last[1] : s], surface.strip() or surface
            last = (t, s, min(t_high, s_high))
        if t_high <= s_high:
            i += 1
        else:
            j += 1


def _cuts(encoding: Encoding, length: int) -> list[tuple[int, int, int]]:
    """Where this tokenizer cuts the chunk: (pieces before the cut, lowest, highest position of the cut).

    A cut has a range of positions where it lies in text without pieces, such as a space. Pre-tokens that share a
    character (a normalizer made several of one) have no cut between them.
    """
    offsets, pre_tokens = encoding.offsets, encoding.word_ids
    edges = [0, *(k for k in range(1, len(offsets)) if pre_tokens[k] != pre_tokens[k - 1]), len(offsets)]
    lows = list(accumulate((end for _, end in offsets), max, initial=0))  # lows[k]: end of the first k pieces
    highs = list(accumulate((start for start, _ in reversed(offsets)), min, initial=length))[::-1]
    return [(k, lows[k], highs[k]) for k in dict.fromkeys(edges) if lows[k] <= highs[k]]


def _encode_blocks(blocks: Iterable[list[str]], paths: tuple[Path, Path], processes: int) -> Iterator[tuple]:
    """`_Encoder.encode` of every block, in order. Raises InputError with the first line that is not exact."""
    blocks, encoder = iter(blocks), _Encoder(*paths)
    first = next(blocks, [])
    result = encoder.encode(first)
    if different := _first_difference(encoder, first, result):
        fault = f"the {different[0]}'s tokenizer gives the words of {different[1][:200]!r} other pieces alone"
        raise InputError(f"{fault} than in the line; choose another teacher")
    yield result
    if processes == 1:
        yield from map(encoder.encode, blocks)
        return
    del encoder
    # spawn, not fork: the tokenizers library and torch hold threads. Blocks wait in a short queue, so that the corpus
    # is read no faster than it is encoded.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = deque()
        for block in blocks:
            waiting.append(pool.submit(_encode_in_worker, paths, block))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder_of_worker = cache(_Encoder)


def _encode_in_worker(paths: tuple[Path, Path], lines: list[str]) -> tuple:
    return _encoder_of_worker(*paths).encode(lines)


def _first_difference(encoder: _Encoder, lines: list[str], result: tuple) -> tuple[str, str] | None:
    """(side, line) of the first line to which a whole tokenizer gives other pieces than its words have."""
    _, new, word_ids, lengths = result
    keys = [np.frombuffer(key, np.int32).tolist() for key, _ in new]
    ends, characters = np.cumsum(lengths), 0
    for line, start, end in zip(lines, ends - lengths, ends, strict=True):
        words = [keys[w] for w in word_ids[start:end]]
        pieces = {"teacher": (key[1 : 1 + key[0]] for key in words), "student": (key[1 + key[0] :] for key in words)}
        for side, ids in pieces.items():
            if getattr(encoder, side).encode(line, add_special_tokens=False).ids != list(chain.from_iterable(ids)):
                return side, line
        characters += len(line)
        if characters > CHECKED_CHARACTERS:
            break
    return None


def _write(results: Iterable[tuple], folder: Path, progress: Callable[[int], None]) -> dict:
    """Renumbers each process' words by first occurrence in the stream and writes all but meta.json."""
    numbers: dict[bytes, int] = {}
    surfaces: list[str] = []
    global_ids: dict[int, np.ndarray] = {}  # process -> its word number -> the stream's
    counts = np.zeros(0, np.int64)
    words = lines = 0
    with open(folder / "word_ids.npy", "wb") as ids_file, open(folder / "line_offsets.npy", "wb") as lines_file:
        _npy_header(ids_file, np.uint32, 0)
        _npy_header(lines_file, np.int64, 0)
        lines_file.write(np.zeros(1, np.int64).tobytes())
        for process, new, local_ids, lengths in results:
            for key, surface in new:
                if numbers.setdefault(key, len(numbers)) == len(surfaces):
                    surfaces.append(surface)
            fresh = np.fromiter((numbers[key] for key, _ in new), np.uint32, len(new))
            global_ids[process] = np.concatenate((global_ids.get(process, fresh[:0]), fresh))
            word_ids = global_ids[process][local_ids]
            ids_file.write(word_ids.data)
            lines_file.write((words + np.cumsum(lengths, dtype=np.int64)).data)
            block_counts = np.bincount(word_ids, minlength=len(numbers))
            block_counts[: len(counts)] += counts
            counts = block_counts
            words, lines = words + len(word_ids), lines + len(lengths)
            progress(len(word_ids))
        _npy_header(ids_file, np.uint32, words)
        _npy_header(lines_file, np.int64, lines + 1)
    if not words:
        raise InputError("the corpus holds no words; check its files and the name of the text column")
    ends = np.array([bool(SENTENCE_END.fullmatch(surface)) for surface in surfaces])
    tables = _tables(numbers) | {"counts": counts, "ends_sentence": ends}
    save_file(tables, folder / "lexicon.safetensors")
    with open(folder / "words.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(surface, ensure_ascii=False) + "\n" for surface in surfaces)
    totals = {"lines": lines, "words": words, "distinct_words": len(numbers)}
    for side in ("teacher", "student"):
        totals[f"{side}_pieces"] = int(counts @ np.diff(tables[f"{side}_offsets"]))
    return totals


def _tables(keys: dict[bytes, int]) -> dict[str, np.ndarray]:
    """CSR tables of both sides from the words' keys (see _Encoder)."""
    data = np.frombuffer(b"".join(keys), np.int32)
    lengths = np.fromiter(map(len, keys), np.int64, len(keys)) // 4
    teacher = data[np.cumsum(lengths) - lengths].astype(np.int64)
    place = within_rows(lengths)
    is_student = place > np.repeat(teacher, lengths)
    tables = {"teacher_ids": data[(place > 0) & ~is_student], "student_ids": data[is_student]}
    for side, sizes in (("teacher", teacher), ("student", lengths - 1 - teacher)):
        tables[f"{side}_offsets"] = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    return tables


def _npy_header(file, dtype: type, length: int) -> None:
    """Writes the .npy header at the start of the file; numpy pads it, so that any length fits its bytes."""
    file.seek(0)
    header = np.lib.format.header_data_from_array_1_0(np.zeros(0, dtype)) | {"shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
