"""Writes the HTML pages: one jinja environment for the report, ablations, tune and browser pages.

Everything that goes into a template is escaped unless it is `Markup` (the SVGs of drawing.py), and a name that a
template uses and nobody gave is an error instead of an empty place on the page.
"""

from pathlib import Path

import jinja2

from tokenizer_build.files import write_text

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)


def write_page(path: Path, template: str, **facts) -> None:
    """Render templates/`template`.html.jinja with `facts` and write the page to `path` atomically."""
    write_text(path, ENVIRONMENT.get_template(f"{template}.html.jinja").render(facts))
