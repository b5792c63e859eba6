"""Benchmark of a language: a delivered model beside its multilingual teacher, and beside what needs no training.

    python tests/bench/languages.py --teacher FOLDER --language de=TEXT... --rated de=stsb_de/test.jsonl ...
                                    [--delivered de=ARTIFACT] [--delivered en_de_fr=ARTIFACT]
                                    [--prompt 'query: '] [--pieces 24000] [--out artifacts/bench/languages.json]

All figures are Spearman's correlation on rated pairs. trimmed: the teacher with its own most frequent pieces on the
language's text alone, as many as the delivery has, nothing trained (lm-vocab-trimmer's way). static: model2vec on the
trimmed teacher (a table of all of its pieces would leave seven dimensions), int8, as many principal components as fill
7 MB. A delivery of several languages, EN_DE_FR, is measured in each. Figures that are there already are kept.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tokenizer_build.corpus import read_lines
from tokenizer_build.files import read_json, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.held_out import Embed, read_rated_pairs, spearman
from vocabshrink.data.tasks import Rows
from vocabshrink.models.forward import module_settings, torch_embedder
from vocabshrink.models.loading import load_model

BUDGET = 7_000_000
LINES = 200_000  # of a language, that its pieces are counted on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--language", nargs="+", action="append", default=[], metavar="NAME=TEXT")
    parser.add_argument("--rated", nargs="+", required=True, metavar="NAME=ROWS")
    parser.add_argument("--delivered", action="append", default=[], metavar="NAME=ARTIFACT")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--pieces", type=int, default=24_000)
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/languages.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rated = {name: read_rated_pairs(path) for name, path in (word.split("=", 1) for word in arguments.rated)}
    report = read_json(arguments.out) if arguments.out.is_file() else {}
    for first, *more in arguments.language:
        language, _, source = first.partition("=")
        row = report.setdefault(language, {})
        if "static" not in row:
            row |= peers(arguments.teacher, [source, *more], rated[language], arguments.prompt, arguments.pieces)
            write_json(arguments.out, report)
        print(language, json.dumps(row), flush=True)
    for name, artifact in (word.split("=", 1) for word in arguments.delivered):
        if name in rated:
            report.setdefault(name, {}).update(delivered(Path(artifact), rated[name]))
        else:
            figures = {language: delivered(Path(artifact), rated[language]) for language in name.split("_")}
            report[name] = {language: {**report.get(language, {}), **row} for language, row in figures.items()}
        write_json(arguments.out, report)
        print(name, json.dumps(report[name]), flush=True)


def peers(teacher: Path, sources: list[str], rated: Rows, prompt: str, pieces: int) -> dict:
    """{"teacher", "trimmed", "static": Spearman, "pieces"}"""
    row = {"teacher": spearman(rated, embedder(teacher, prompt))}
    with tempfile.TemporaryDirectory() as place:
        pieces = trim(teacher, sources, pieces, Path(place))
        row["trimmed"] = spearman(rated, embedder(Path(place), prompt))
        row["static"] = spearman(rated, static(Path(place), pieces))
    return {key: round(value, 4) for key, value in row.items()} | {"pieces": pieces}


def embedder(folder: Path, prompt: str) -> Embed:
    said = module_settings(folder)
    return torch_embedder(load_model(folder), folder, said, max_length=128, prompt=prompt)


def delivered(artifact: Path, rated: Rows) -> dict:
    """{"delivered": Spearman, "bytes", "pieces"}"""
    from vocabshrink.runtime.delivery import load

    model = load(artifact)
    pieces = load_tokenizer(artifact).get_vocab_size()
    return {"delivered": round(spearman(rated, model.embed), 4), "bytes": model.manifest["delivery_bytes"]} | {
        "pieces": pieces
    }


def trim(teacher: Path, sources: list[str], pieces: int, folder: Path) -> int:
    """Writes the teacher with its special tokens and its most frequent pieces on the text, at most `pieces` in all; how
    many there are."""
    from transformers import AutoModel, PreTrainedTokenizerFast

    tokenizer, counts = load_tokenizer(teacher), Counter()
    lines = [line for _, line in zip(range(LINES), read_lines(sources), strict=False)]
    for start in range(0, len(lines), 1000):
        for encoding in tokenizer.encode_batch(lines[start : start + 1000], add_special_tokens=False):
            counts.update(encoding.ids)
    spec = json.loads(tokenizer.to_str())
    special = [token["id"] for token in spec["added_tokens"]]
    kept = special + [i for i, _ in counts.most_common() if i not in set(special)]
    new = {old: number for number, old in enumerate(sorted(kept[:pieces]))}
    vocabulary = spec["model"]["vocab"]
    spec["model"]["vocab"] = [vocabulary[old] for old in new if old < len(vocabulary)]
    spec["model"]["unk_id"] = new[spec["model"]["unk_id"]]
    for token in spec["added_tokens"]:
        token["id"] = new[token["id"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [new[i] for i in token["ids"]]
    model = AutoModel.from_pretrained(teacher, dtype=torch.float32)
    table = torch.nn.Embedding(len(new), model.config.hidden_size)
    table.weight.data = model.get_input_embeddings().weight.data[list(new)]
    model.set_input_embeddings(table)
    model.config.vocab_size, model.config.pad_token_id = len(new), new[model.config.pad_token_id]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names).save_pretrained(folder)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling"):
        if (teacher / name).exists():
            os.symlink((teacher / name).resolve(), folder / name)
    return len(new)


def static(teacher: Path, pieces: int) -> Embed:
    """model2vec's vectors of the trimmed teacher, as wide as the budget allows beside its tokenizer."""
    from model2vec.distill import distill

    width = (BUDGET - (teacher / "tokenizer.json").stat().st_size) // pieces
    model = distill(str(teacher), pca_dims=min(width, 256), quantize_to="int8")
    return model.encode


if __name__ == "__main__":
    main()
