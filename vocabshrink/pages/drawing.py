"""Figures of the HTML pages: SVGs whose colours are the page's CSS variables, so that they follow its theme.

Every page that shows one defines --ink, --grid and --series-0 to -7. A figure that also stands alone in a file brings
defaults for them.
"""

import io
import re
from collections.abc import Callable

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

# What matplotlib draws with: each stands for its variable until the text is written.
INK, GRID, SERIES = "#010101", "#020202", tuple(f"#0303{index:02x}" for index in range(8))
DEFAULTS = ("#24272b", "#d5d8dc")
DEFAULTS += ("#1f5fa8", "#c8553d", "#3a7d44", "#8a6bb1", "#b8860b", "#17868b", "#a23e6d", "#5b6470")
ROOT = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg_of(
    name: str, draw: Callable[[Figure], None], size: tuple[float, float] = (5.2, 2.7), *, alone: bool = False
) -> Markup:
    """An inline SVG of what `draw` puts on a figure of `size` inches.

    name: unique among the figures of a page, whose identifiers it begins. alone: with default colours.
    """
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "axes.axisbelow": True,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Identifiers are unique in a file of its own, not among the many figures of one page.
    slug = re.sub(r"[^A-Za-z0-9-]", lambda match: f"_{ord(match.group()):x}", name)
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{slug}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'{ROOT} \1 role="img">', svg, count=1)
    names = ("ink", "grid", *(f"series-{index}" for index in range(8)))
    for colour, name, default in zip((INK, GRID, *SERIES), names, DEFAULTS, strict=True):
        svg = svg.replace(colour, f"var(--{name}, {default})" if alone else f"var(--{name})")
    return Markup(svg)
