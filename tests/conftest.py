"""Shared fixtures: a small text, a small WordPiece vocabulary and a tiny BERT, all made here and now."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch


def pytest_configure(config):
    """Hides a GPU from all but the tests that are of one: these expect a CPU's numbers, and must pass beside it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


with suppress(ImportError):  # on a GPU host there is none
    from hypothesis import HealthCheck, settings

    # how long an example takes on a busy machine is no fault of the code
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
torch.set_num_threads(1)  # two threads on a busy two-core machine are many times slower than one

SYLLABLES = ["ka", "lo", "mi", "ne", "ru", "sa", "to", "vi", "we", "zu", "bra", "cli", "dro", "fle", "gri", "pla"]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def made_up_text(lines: int = 400, seed: int = 0) -> list[str]:
    """Sentences over about 300 made-up words with a Zipf-like frequency: compressible, and never shipped."""
    rng = random.Random(seed)
    words = sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(300)})
    weights = [1 / (rank + 3) for rank in range(len(words))]
    out = []
    for _ in range(lines):
        sentence = rng.choices(words, weights, k=rng.randint(6, 20))
        out.append(" ".join(sentence).capitalize() + rng.choice([".", "!", "?", ", 42."]))
    return out


def wordpiece_pieces(lines: list[str], size: int) -> list[str]:
    """A plain vocabulary: special tokens, the alphabet, then the most frequent whole words."""
    counts: dict[str, int] = {}
    for line in lines:
        for word in line.lower().replace(".", " ").replace(",", " ").split():
            counts[word] = counts.get(word, 0) + 1
    alphabet = sorted(set("".join(lines).lower()) - {" "} | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'"))
    pieces = SPECIAL_TOKENS + alphabet + ["##" + c for c in alphabet]
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if word not in pieces:
            pieces.append(word)
    return pieces[:size]


@pytest.fixture(scope="session")
def lines() -> list[str]:
    return made_up_text()


@pytest.fixture(scope="session")
def corpus_file(lines, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_teacher(lines: list[str], folder: Path) -> None:
    """A 4-layer, 32-wide BertForMaskedLM with random weights and a 300-piece tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    pieces = wordpiece_pieces(lines, 300)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def with_prompts(teacher: Path, folder: Path) -> Path:
    """The teacher, with prompts of its own and a default."""
    from tokenizer_build.files import write_json
    from vocabshrink.models.forward import ModuleSettings

    shutil.copytree(teacher, folder)
    said = ModuleSettings(prompts={"query": "ka lo: ", "passage": "mi: "}, default_prompt="query")
    for name, content in said.files(32, 24).items():
        write_json(folder / name, content)
    return folder


def remove_head(teacher: Path, folder: Path) -> None:
    """The same model without its masked-LM head."""
    from transformers import AutoModel

    AutoModel.from_pretrained(teacher, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())


@pytest.fixture(scope="session")
def tiny_teacher(lines, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_teacher(lines, folder)
    return folder


@pytest.fixture(scope="session")
def headless_teacher(tiny_teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("headless")
    remove_head(tiny_teacher, folder)
    return folder


@pytest.fixture(scope="session")
def folders(lines, tmp_path_factory) -> dict[str, Path]:
    """{family: the folder of a tiny teacher}"""
    from families import make_families

    return make_families(lines, tmp_path_factory)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """A function that runs the `main` of a command line as `subprocess.run` would, but here: a process of its own costs
    seconds of imports."""

    def run(main, *arguments, folder: Path | None = None) -> CompletedProcess:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["command", *map(str, arguments)])
            patch.setattr(signal, "signal", lambda *_: None)
            patch.chdir(folder or Path.cwd())
            capsys.readouterr()
            code = 0
            try:
                main()
            except SystemExit as ended:
                code = ended.code or 0
        return CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def dequantize(quantized):
    """The matrix [rows, columns] float32 of what `models.rounding.quantize` gives."""
    scales = np.repeat(quantized.scales.astype(np.float32), quantized.group_size, axis=1)
    return quantized.codes.astype(np.float32) * scales[:, : quantized.codes.shape[1]]
