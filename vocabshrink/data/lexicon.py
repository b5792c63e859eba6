"""The lexicon: a corpus as a stream of word ids, and the pieces of each word in both vocabularies.

A corpus is tokenised once: every line becomes a row of word ids in a memory-mapped file, and the lexicon lists each
word's pieces on both sides; from then on any segmentation, mixed ones included, is a gather. A *word* is the smallest
stretch of text at whose edges both tokenizers cut, and its identity is its two segmentations.

This is exact by construction: lines are cut into chunks only where neither tokenizer can see across the cut (before a
space that follows a visible character; for two BERT tokenizers also beside ASCII punctuation), each distinct chunk is
tokenised by the real tokenizers, and its pieces are only grouped. In scripts without spaces between words, of which a
line would be one word, they also end where pieces of both do. `check_family` refuses tokenizers for which exactness
cannot be promised, and the first lines of every corpus are compared with the pieces of whole lines.

Cost: a look-up for each chunk (2 million words a second and core, once warm), and both tokenizers for each new one."""

import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, chain, filterfalse, pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from tokenizer_build.count import map_in_order
from tokenizer_build.errors import InputError
from tokenizer_build.files import naming_bad_disk, read_json, read_values, stamp, write_json, write_jsonl
from tokenizer_build.tokenizer import load_tokenizer, shared_tokenizer

CACHED_CHUNKS = 1_000_000  # about 250 MB; Zipf's law makes a refill after clearing cheap
CACHED_CHARACTERS = 1_000  # longer chunks are not words of a language and will not come again
CHECKED_CHARACTERS = 500_000  # of the first block, compared with whole-line tokenisation
AT_SPACES = "BertPreTokenizer|Whitespace|WhitespaceSplit|Metaspace|ByteLevel"  # pre-tokenizers that cut there
LOCAL = {  # parts of a tokenizer that are known to act within words
    "normalizer": "BertNormalizer|NFK?[CD]|Lowercase|StripAccents|Nmt|Strip|Precompiled",
    "pre_tokenizer": f"{AT_SPACES}|Punctuation|Digits",
}
EDGES = (" ", "  ", "   ", " \t", "\t ", "\u00a0 ", " \u00a0", "\u200b ", ". ", " '", "▁ ", " ▁", "é ", " \u0301")
ROLES = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}  # RoBERTa's names
CHUNK = re.compile(r" *[^ ]+| +")
DOUBTFUL = re.compile(r"[^ -~](?= )")  # a character that may not be a safe place to cut, before a space
BERT_CHUNK = re.compile(r"[^ !-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")  # one ASCII punctuation mark, or none
# no spaces between words: Thai to Burmese, Khmer, the Tai scripts, kana and Han
UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\u3040-\u9fff\uff66-\uff9f\U00020000-\U0003ffff]")
SENTENCE_END = re.compile("[.!?…‼‽⁇⁈⁉。！．？｡؟۔।॥]+")


@dataclass(frozen=True)
class Lexicon:
    """The pieces of each word in CSR tables: word w has ids[offsets[w]:offsets[w + 1]]."""

    teacher_offsets: np.ndarray  # [W + 1] int64
    teacher_ids: np.ndarray  # int32, concatenated pieces
    student_offsets: np.ndarray  # [W + 1] int64
    student_ids: np.ndarray  # int32
    counts: np.ndarray  # [W] int64, occurrences in the stream
    ends_sentence: np.ndarray  # [W] bool, the surface is a run of . ! ? or of their equivalents
    words: list[str]  # the surface at the first occurrence, white space stripped
    meta: dict  # teacher and student as of `describe_tokenizer`, and what `encode_corpus` returns

    @classmethod
    def load(cls, folder: Path) -> "Lexicon":
        """Reads what `encode_corpus` wrote. Raises InputError if the folder is not a finished lexicon."""
        meta, words = read_json(folder / "meta.json"), read_values(folder / "words.jsonl")
        return cls(**load_file(folder / "lexicon.safetensors"), words=words, meta=meta)

    @property
    def student_counts(self) -> np.ndarray:
        """[V_S] how often the text has each of the student's pieces; [CLS] and [SEP] stand around every line."""
        student, occurrences = self.meta["student"], np.repeat(self.counts, np.diff(self.student_offsets))
        counts = np.bincount(self.student_ids, occurrences, student["size"])
        counts[[student["special"]["cls"], student["special"]["sep"]]] = self.meta["lines"]
        return counts


@dataclass(frozen=True)
class WordStream:
    """The corpus as word ids; line i is word_ids[line_offsets[i]:line_offsets[i + 1]], in corpus order."""

    word_ids: np.ndarray  # [N] uint32, memory-mapped
    line_offsets: np.ndarray  # [L + 1] int64, memory-mapped

    @classmethod
    def load(cls, folder: Path) -> "WordStream":
        """Maps what `encode_corpus` wrote, into a folder of which `Lexicon.load` says whether it is whole."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("word_ids", "line_offsets")))


def within_rows(lengths: np.ndarray) -> np.ndarray:
    """The position of every element in its row of a CSR table: [0 .. lengths[0] - 1, 0 .. lengths[1] - 1, ...]."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def encode_corpus(
    blocks: Iterable[list[str]], teacher: str | Path, student: str | Path, folder: Path, *, processes=1, progress=None
) -> dict:
    """Writes the lexicon and word stream of `blocks` (lists of lines) into `folder`; returns the totals: lines, words,
    distinct_words, and the stream's teacher_pieces and student_pieces. Words are numbered by first occurrence, so that
    the files do not depend on processes and blocks. `progress` is called with the words of each block written. Raises
    InputError for no words and for a tokenizer that cannot be handled exactly."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a process; and spawn inherits it
    of_teacher, of_student = map(describe_tokenizer, (teacher, student))
    # a teacher alone on a task stands on both sides
    if of_student["family"] != "wordpiece" and of_student["sha256"] != of_teacher["sha256"]:
        raise InputError(f"{student} is a {of_student['family']} tokenizer; give the student a WordPiece vocabulary")
    blocks, encoder = iter(blocks), _Encoder(teacher, student)
    encoder.check(first := next(blocks, []), encoded := encoder.encode(first))
    results = chain([encoded], map_in_order(encoder.encode, blocks, processes))
    with naming_bad_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("meta.json", "word_ids.npy", "line_offsets.npy"):  # these may be mapped, meta.json comes last
            (folder / old).unlink(missing_ok=True)
        totals = _write(results, folder, progress or (lambda words: None))
        write_json(folder / "meta.json", {"teacher": of_teacher, "student": of_student} | totals)
    return totals


def check_family(folder: Path) -> str:
    """How a folder's tokenizer keeps words apart: "wordpiece", "byte-level", "metaspace" or "words". Raises InputError,
    with the reason, for one that is not known to be cut at spaces exactly."""
    encoder = _Encoder(folder, folder)
    spec = json.loads(encoder.tokenizers[0].to_str())
    for reason in _reasons(spec, encoder):
        raise InputError(f"{folder} cannot be encoded word by word: {reason}; choose another teacher")
    lines = [form.format(edge) for edge in EDGES for form in ("a{0}b", "{0}a b{0}", "a's{0}12{0}{0}B!? (c)", "{0}")]
    encoder.check(lines, encoder.encode(lines))  # a backstop to `_reasons`
    if spec["model"]["type"] == "WordPiece":
        return "wordpiece"
    kinds = {part["type"] for part in _parts(spec["pre_tokenizer"])}
    return "byte-level" if "ByteLevel" in kinds else "metaspace" if "Metaspace" in kinds else "words"


def _parts(spec: dict | None) -> list[dict]:
    """The normalizers or pre-tokenizers of a tokenizer.json, sequences flattened."""
    if spec is None or spec["type"] != "Sequence":
        return [spec] if spec else []
    return [leaf for part in spec.get("normalizers") or spec["pretokenizers"] for leaf in _parts(part)]


def _reasons(spec: dict, encoder: "_Encoder") -> Iterator[str]:
    """Why the parts of this tokenizer.json are not known to act within words."""
    blanks = (" {2,}", r"\s{2,}|[\n\r\t]", r"\s+")  # these match within one run of white space
    at_spaces = False  # whether a pre-tokenizer so far cuts there
    for name, local in LOCAL.items():
        for part in _parts(spec[name]):
            pattern = part.get("pattern", {})
            text = pattern.get("String", " " if pattern.get("Regex") in blanks else "  ")
            harmless = part["type"] == "Replace" and (text in (" ", "▁") or not re.search(r"[\s▁]", text))
            harmless |= part["type"] == "Split" and at_spaces  # cuts words further
            if not (harmless or re.fullmatch(local, part["type"])):
                yield f"its {name} {part['type']} {pattern or ''} is not known to act within words"
            cuts = re.fullmatch(AT_SPACES, part["type"]) and part.get("split", True) and part.get("use_regex", True)
            at_spaces |= name == "pre_tokenizer" and bool(cuts)
    if not at_spaces:
        yield "no pre-tokenizer keeps its words apart, it reads whole sentences"
    if spec["model"].get("dropout") or spec["model"].get("alpha"):
        yield "it samples its segmentations"
    for token in spec["added_tokens"]:
        if not token["special"] and (token["rstrip"] or re.search(r"\s", token["content"])):
            yield f"its added token {token['content']!r} reaches across spaces"
    if not all(map(encoder.safe, map(chr, range(33, 127)))):
        yield "its normalizer changes a word by what stands beside it"


def describe_tokenizer(folder: str | Path) -> dict:
    """What meta.json says of a folder's tokenizer, only to be read; special: ids of pad, unk (or None), cls, sep, mask.
    Raises InputError as `check_family` does, and for a tokenizer that lacks one of the others."""
    return _described(Path(folder), stamp(Path(folder)))


@lru_cache(8)
def _described(folder: Path, files: tuple) -> dict:
    family, tokenizer, config_file = check_family(folder), shared_tokenizer(folder), folder / "tokenizer_config.json"
    config, special = read_json(config_file) if config_file.is_file() else {}, {}
    for role, name in ROLES.items():
        named = config.get(f"{role}_token")
        names = (named["content"] if isinstance(named, dict) else named or "", f"[{role.upper()}]", name)
        special[role] = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if lacking := [role for role, number in special.items() if number is None and role != "unk"]:
        raise InputError(f"{folder}: the tokenizer has no {lacking[0]} token: add one to tokenizer.json")
    double = tokenizer.id_to_token(special["cls"]) == "<s>"  # between a pair
    found = {"size": tokenizer.get_vocab_size(with_added_tokens=True), "special": special, "double_sep": double}
    return found | {"sha256": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(), "family": family}


@cache
def _encoder_of_worker(*paths: Path) -> "_Encoder":
    return _Encoder(*paths)


class _Encoder:
    """One process' tokenizers and caches: blocks of lines to word ids, numbered as this process met them. A word's key
    is the bytes of int32 [number of teacher pieces, *teacher pieces, *student pieces]."""

    def __reduce__(self):
        return _encoder_of_worker, self.paths  # what is sent to another process is that process' own encoder

    def __init__(self, *paths: Path):
        loaded = {path: load_tokenizer(path) for path in dict.fromkeys(paths)}  # XLM-R's takes seconds
        self.paths, self.tokenizers = paths, [loaded[path] for path in paths]  # of teacher and student
        for tokenizer in self.tokenizers:
            tokenizer.post_processor = None  # offsets of byte-level pieces keep their space, and nothing overlaps
        self.normalizers = [t.normalizer for t in self.tokenizers if t.normalizer is not None]
        self.words: dict[bytes, int] = {}
        self.safe = cache(self.safe)
        self.cache: dict[str, tuple[int, ...]] = {}  # the words of a chunk
        # BERT's normalizer maps character by character and its pre-tokenizer isolates punctuation and drops white
        # space. Cutting there too halves the distinct chunks ("word", not "word," and "(word").
        parts = [(t.normalizer, t.pre_tokenizer, *t.get_added_tokens_decoder().values()) for t in self.tokenizers]
        kinds = [isinstance(n, BertNormalizer) and isinstance(p, BertPreTokenizer) for n, p, *_ in parts]
        if all(kinds) and all(token.special for _, _, *added in parts for token in added):
            self.chunks = BERT_CHUNK.findall

    def safe(self, character: str) -> bool:
        """Whether a line may be cut between this character and a following space: it must be visible, since
        tokenizers differ in what is white space, and normalising each side must equal normalising the whole."""
        return unicodedata.category(character)[0] in "LNPS" and all(
            n.normalize_str(f"a{character} b") == n.normalize_str(f"a{character}") + n.normalize_str(" b")
            and n.normalize_str(character).strip()
            and not n.normalize_str(f"a{character}")[-1].isspace()
            for n in self.normalizers
        )

    def chunks(self, line: str) -> list[str]:
        """Cuts a line into chunks (spaces and what follows them) where no tokenizer can see across the cut."""
        chunks = CHUNK.findall(line)
        if line.isascii() and line.isprintable():
            return chunks
        unsafe = {c for c in set(DOUBTFUL.findall(line)) if not self.safe(c)}
        groups = chunks[:1]
        for chunk in chunks[1:]:
            if groups[-1][-1] in unsafe:
                groups[-1] += chunk
            else:
                groups.append(chunk)
        return groups

    def encode(self, lines: list[str]) -> tuple[int, list[tuple[bytes, str]], np.ndarray, np.ndarray]:
        """(this process, its new words as (key, surface), own word ids uint32 [n], words per line int64)."""
        if len(self.cache) > CACHED_CHUNKS:
            self.cache.clear()
        chunked = list(map(self.chunks, lines))
        flat = list(chain.from_iterable(chunked))
        missing = list(filterfalse(self.cache.__contains__, dict.fromkeys(flat)))
        new = [word for start in range(0, len(missing), 2048) for word in self._learn(missing[start : start + 2048])]
        words = list(map(self.cache.__getitem__, flat))
        for chunk in missing:
            if len(chunk) > CACHED_CHARACTERS:
                del self.cache[chunk]
        word_ids = np.fromiter(chain.from_iterable(words), np.uint32)
        ends = np.cumsum(np.fromiter(chain([0], map(len, words)), np.int64, 1 + len(words)))
        return os.getpid(), new, word_ids, np.diff(ends[np.cumsum([0, *map(len, chunked)])])

    def _learn(self, chunks: list[str]) -> Iterator[tuple[bytes, str]]:
        """Caches the chunks' words; yields those that are new."""
        pairs = [tokenizer.encode_batch(chunks, add_special_tokens=False) for tokenizer in self.tokenizers]
        for chunk, teacher, student in zip(chunks, *pairs, strict=True):
            numbers = []
            for left, right, surface in _words(chunk, teacher, student):
                key = array("i", (len(left), *left, *right)).tobytes()
                if key not in self.words:
                    self.words[key] = len(self.words)
                    yield key, surface
                numbers.append(self.words[key])
            self.cache[chunk] = tuple(numbers)

    def check(self, lines: list[str], encoded: tuple) -> None:
        """Raises InputError if a tokenizer gives one of the first lines other pieces than `encode` gave its words."""
        _, new, word_ids, lengths = encoded
        keys, ends, characters = [np.frombuffer(key, np.int32).tolist() for key, _ in new], np.cumsum(lengths), 0
        for line, start, end in zip(lines, ends - lengths, ends, strict=True):
            words = [(pieces[:size], pieces[size:]) for size, *pieces in (keys[w] for w in word_ids[start:end])]
            for side, (path, tokenizer) in enumerate(zip(self.paths, self.tokenizers, strict=True)):
                pieces = list(chain.from_iterable(word[side] for word in words))
                if tokenizer.encode(line, add_special_tokens=False).ids != pieces:
                    raise InputError(f"{path} cuts {line[:200]!r} unlike its words alone; choose another teacher")
            characters += len(line)
            if characters > CHECKED_CHARACTERS:
                break


def _words(chunk: str, teacher: Encoding, student: Encoding) -> Iterator[tuple[list[int], list[int], str]]:
    """The words of a chunk, cut wherever both tokenizers cut: (teacher pieces, student pieces, surface)."""
    if chunk.isascii() and chunk.removeprefix(" ").isalpha():  # most chunks, and one word to every family
        yield teacher.ids, student.ids, chunk.strip()
        return
    (teacher_cuts, student_cuts), i, j, last = (_cuts(e, chunk) for e in (teacher, student)), 0, 0, None
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


def _cuts(encoding: Encoding, chunk: str) -> list[tuple[int, int, int]]:
    """Where this tokenizer cuts the chunk: (pieces before the cut, lowest, highest position of the cut), which differ
    in text without pieces, such as a space. What shares a character has no cut between."""
    offsets, pre_tokens, length = encoding.offsets, encoding.word_ids, len(chunk)
    inner = [bool(UNSPACED.search(chunk, max(0, start - 1), start + 1)) for start, _ in offsets]
    edges = [0, *(k for k in range(1, len(offsets)) if pre_tokens[k] != pre_tokens[k - 1] or inner[k]), len(offsets)]
    lows = list(accumulate((end for _, end in offsets), max, initial=0))  # lows[k]: end of the first k pieces
    highs = list(accumulate((start for start, _ in reversed(offsets)), min, initial=length))[::-1]
    return [(k, lows[k], highs[k]) for k in dict.fromkeys(edges) if lows[k] <= highs[k]]


def sentence_lengths(line: str, tokenizer: Tokenizer) -> list[int]:
    """The words of each sentence of a line where this tokenizer alone cuts it: beside another there may be fewer."""
    cuts = [low for _, low, _ in _cuts(tokenizer.encode(line, add_special_tokens=False), line)]
    kinds = ("." if SENTENCE_END.fullmatch(line[a:b].strip()) else "w" for a, b in pairwise(cuts))
    return list(map(len, re.findall(r"w+\.*|\.+", "".join(kinds))))


def _write(results: Iterable[tuple], folder: Path, progress: Callable[[int], None]) -> dict:
    """Renumbers each process' words by first occurrence in the stream and writes all but meta.json."""
    numbers: dict[bytes, int] = {}
    surfaces: list[str] = []
    global_ids: dict[int, np.ndarray] = {}  # process -> its word number -> the stream's
    counts = np.zeros(0, np.int64)
    words = lines = 0
    with open(folder / "word_ids.npy", "wb") as ids_file, open(folder / "line_offsets.npy", "wb") as lines_file:
        _npy_header(ids_file, "<u4", 0)
        _npy_header(lines_file, "<i8", 0)
        lines_file.write(bytes(8))
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
            counts, words, lines = block_counts, words + len(word_ids), lines + len(lengths)
            progress(len(word_ids))
        _npy_header(ids_file, "<u4", words)
        _npy_header(lines_file, "<i8", lines + 1)
    if not words:
        raise InputError("the corpus holds no words; check its files and the name of the text column")
    # CSR tables of both sides from the words' keys (see _Encoder)
    data = np.frombuffer(b"".join(numbers), np.int32)
    sizes = np.fromiter(map(len, numbers), np.int64, len(numbers)) // 4
    teacher, place = data[np.cumsum(sizes) - sizes].astype(np.int64), within_rows(sizes)
    is_student = place > np.repeat(teacher, sizes)
    ends = np.array([bool(SENTENCE_END.fullmatch(surface)) for surface in surfaces])
    tables = {"teacher_ids": data[(place > 0) & ~is_student], "student_ids": data[is_student]}
    for side, lengths in (("teacher", teacher), ("student", sizes - 1 - teacher)):
        tables[f"{side}_offsets"] = np.append(0, np.cumsum(lengths))
    save_file(tables | {"counts": counts, "ends_sentence": ends}, folder / "lexicon.safetensors")
    write_jsonl(folder / "words.jsonl", surfaces)
    pieces = {f"{side}_pieces": int(counts @ np.diff(tables[f"{side}_offsets"])) for side in ("teacher", "student")}
    return {"lines": lines, "words": words, "distinct_words": len(numbers)} | pieces


def _npy_header(file, dtype: str, length: int) -> None:
    """Writes the .npy header at the start of the file; numpy pads it, so that any length fits its bytes."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (length,)})
