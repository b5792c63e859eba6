"""The model card of a delivery: what it is, where it comes from, what was measured, how to load it, what it cannot do.

Everything in it is read from the manifest and the run; nothing is claimed that the run did not measure.
"""

from pathlib import Path

from tokenizer_build.files import write_text

KINDS = {
    "embedding": ("sentence-similarity", "A sentence embedder", 'embed(["a text"])  # [1, {dimension}] float32'),
    "classification": (
        "text-classification",
        "A text classifier",
        'classify(["a text"])  # labels, scores [1, labels]',
    ),
    "tokens": ("token-classification", "A tagger of words", 'label_tokens(["a text"])  # word, label, score'),
    "fill-mask": ("fill-mask", "A masked language model", 'fill_mask(["a [MASK]"])  # piece, score, text'),
}
LOADERS = {
    "onnxruntime": "onnxruntime and tokenizers (`vocabshrink.load`), transformers.js",
    "transformers": "transformers (`AutoModel`)",
    "sentence-transformers": "sentence-transformers",
    "load_compact": "`vocabshrink.quantize.load_compact`, a transformers model",
}
LIMITS = """\
- It reads at most {positions} pieces of a text, special tokens included, and no case where the vocabulary is uncased.
- It knows the language and the kind of text of its corpus; rare words are split into more pieces than its teacher's,
  and what the teacher knew of them whole is learnt again only in part.
- Figures hold for the texts that they were measured on. What the teacher gets wrong or unfairly, it does too.
"""


def write_card(folder: Path, manifest: dict, *, teacher: str, sources: list[str], vocabulary: dict) -> None:
    """Writes README.md beside a delivery's MANIFEST.json. vocabulary: comparison.json of the run's `vocab` stage."""
    pipeline, kind, call = KINDS[manifest["task"]]
    name, formats = folder.name if folder.name != "model" else manifest["recipe"], manifest["formats"]
    library = "onnxruntime"
    lines = ["---", f"pipeline_tag: {pipeline}", f"library_name: {library}", "---", f"# {name}", ""]
    lines += [
        f"{kind} of {manifest['delivery_bytes']:,} bytes, everything that onnxruntime needs included, made from "
        f"`{teacher}` by recipe `{manifest['recipe']}`.",
        "",
        "```python",
        "from vocabshrink import load",
        "",
        f'load("{name}").{call.format(dimension=manifest.get("dimension"))}',
        "```",
        "",
    ]
    if failures := manifest.get("failures"):
        lines += ["**Written although it fails its gates:**", *(f"- {sentence}" for sentence in failures), ""]
    lines += table_of(manifest.get("quality", {}))
    lines += ["| loader | bytes |", "|---|--:|"]
    loaders = {k: v for k, v in manifest["loaders"].items() if k in LOADERS}
    lines += [f"| {LOADERS[loader]} | {found['bytes']:,} |" for loader, found in loaders.items()] + [""]
    sizes = {side: vocabulary[side] for side in ("teacher", "student") if side in vocabulary}
    lines += ["| vocabulary | pieces | pieces per word |", "|---|--:|--:|"]
    lines += [f"| {side} | {row['size']:,} | {row['pieces_per_word']:.4g} |" for side, row in sizes.items()] + [""]
    lines += [
        f"- Teacher: `{teacher}`, weights sha256 `{manifest['teacher_sha256']}`.",
        f"- Text: {', '.join(sources)}.",
        "- Weights: " + ", ".join(f"{part.replace('_', ' ')} {format}" for part, format in formats.items()) + ".",
        LIMITS.format(positions=manifest["max_positions"]),
    ]
    write_text(folder / "README.md", "\n".join(lines))


def table_of(quality: dict[str, dict[str, float]]) -> list[str]:
    """Figures by system as lines of Markdown."""
    rows = {name: row for name, row in quality.items() if isinstance(row, dict)}
    systems = list(dict.fromkeys(system for row in rows.values() for system in row))
    if not systems:
        return []
    lines = ["| | " + " | ".join(systems) + " |", "|---|" + "--:|" * len(systems)]
    for name, row in rows.items():
        cells = [f"{row[system]:.4g}" if system in row else "" for system in systems]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return [*lines, ""]
