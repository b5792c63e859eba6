"""The model card of a delivery: what it is, where it comes from, what was measured, how to load it, what it cannot do.

Everything in it is read from the manifest and the run; nothing is claimed that the run did not measure.
"""

from pathlib import Path

import jinja2

from tokenizer_build.files import write_text
from vocabshrink.runtime.kinds import KINDS


def write_card(folder: Path, manifest: dict, *, teacher: str, sources: list[str], vocabulary: dict) -> None:
    """Writes README.md beside a delivery's MANIFEST.json. vocabulary: comparison.json of the run's `vocab` stage."""
    quality = {name: row for name, row in manifest.get("quality", {}).items() if isinstance(row, dict)}
    facts = {"manifest": manifest, "teacher": teacher, "sources": sources, "vocabulary": vocabulary, "quality": quality}
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(template).render(
        name=folder.name if folder.name != "model" else manifest["recipe"],
        kind=KINDS[manifest["task"]],
        systems=list(dict.fromkeys(system for row in quality.values() for system in row)),
        **facts,
    )
    write_text(folder / "README.md", text)
