"""The model card of a delivery: what it is, where it comes from, what was measured, how to load it, what it cannot do.

Everything in it is read from the manifest and the run; nothing is claimed that the run did not measure.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizer_build.files import write_text
from vocabshrink.runtime.kinds import KINDS

LOADED_BY = {
    "onnxruntime": "onnxruntime and tokenizers (`vocabshrink.load`), transformers.js",
    "transformers": "transformers (`AutoModel`)",
    "sentence-transformers": "sentence-transformers",
    "load_compact": "`vocabshrink.load_compact`, a transformers model",
}
CARD = """\
---
pipeline_tag: {kind.pipeline}
library_name: onnxruntime
---
# {name}

{kind.title} of {bytes:,} bytes, everything that onnxruntime needs included, made from `{teacher}` by recipe `{recipe}`.

```python
from vocabshrink import load

load("{name}").{example}
```

{failures}{quality}{loaders}
{pieces}
- Teacher: `{teacher}`, weights sha256 `{teacher_sha256}`.
- Text: {sources}.
- Weights: {weights}.
- It reads at most {positions} pieces of a text, special tokens included, and no case where the vocabulary is uncased.
- It knows the language and the kind of text of its corpus. Rare words are split into more pieces than its teacher's,
  and only part of what the teacher knew of them whole is learnt again.
- Figures hold for the texts that they were measured on. What the teacher gets wrong or unfairly, it does too.
"""


def write_card(folder: Path, manifest: dict, *, teacher: str, sources: list[str], vocabulary: dict) -> None:
    """Writes README.md beside a delivery's MANIFEST.json. vocabulary: comparison.json of the run's `vocab` stage."""
    kind, failures = KINDS[manifest["task"]], manifest.get("failures", [])
    figures = {name: row for name, row in manifest.get("quality", {}).items() if isinstance(row, dict)}
    systems = list(dict.fromkeys(system for row in figures.values() for system in row))
    quality = [
        [name.replace("_", " "), *(f"{row[system]:.4g}" if system in row else "" for system in systems)]
        for name, row in figures.items()
    ]
    loaders = [(LOADED_BY[name], f"{row['bytes']:,}") for name, row in manifest["loaders"].items() if name in LOADED_BY]
    sides = [(side, vocabulary[side]) for side in ("teacher", "student") if side in vocabulary]
    pieces = [(side, f"{row['size']:,}", f"{row['pieces_per_word']:.4g}") for side, row in sides]
    text = CARD.format(
        kind=kind,
        example=kind.example.format(dimension=manifest.get("dimension")),
        name=folder.name if folder.name != "model" else manifest["recipe"],
        bytes=manifest["delivery_bytes"],
        recipe=manifest["recipe"],
        teacher=teacher,
        teacher_sha256=manifest["teacher_sha256"],
        failures="".join(
            f"{line}\n" for line in ["**Written although it fails its gates:**", *map("- {}".format, failures), ""]
        )
        if failures
        else "",
        quality=table(["", *systems], quality) + "\n" if systems else "",
        loaders=table(["loader", "bytes"], loaders),
        pieces=table(["vocabulary", "pieces", "pieces per word"], pieces),
        sources=", ".join(sources),
        weights=", ".join(f"{part.replace('_', ' ')} {format}" for part, format in manifest["formats"].items()),
        positions=manifest["max_positions"],
    )
    write_text(folder / "README.md", text)


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
