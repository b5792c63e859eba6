"""The HTML pages by one jinja environment, in which whatever is not `Markup` (the SVGs of drawing.py) is escaped, and a
name that a template uses and nobody gave is an error instead of an empty place on the page."""

from pathlib import Path

import jinja2

from tokenizer_build.files import write_text

LOADER = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
ENVIRONMENT = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)


def write_page(path: Path, template: str, **facts) -> None:
    """Render templates/`template`.html.jinja with `facts` and write the page to `path` atomically."""
    write_text(path, ENVIRONMENT.get_template(f"{template}.html.jinja").render(facts))
