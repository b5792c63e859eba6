"""The one jinja environment: in HTML whatever goes into a template is escaped unless it is `Markup` (the SVGs), and a
name that a template uses and nobody gave is an error."""

from pathlib import Path

import jinja2

from tokenizer_build.files import write_text

OPTIONS = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
OPTIONS |= {"undefined": jinja2.StrictUndefined, "autoescape": jinja2.select_autoescape(["html.jinja"])}
ENVIRONMENT = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), **OPTIONS)


def write_page(path: Path, template: str, **facts) -> None:
    """Render templates/`template`.jinja with `facts` and write it to `path` atomically."""
    write_text(path, ENVIRONMENT.get_template(f"{template}.jinja").render(facts))
