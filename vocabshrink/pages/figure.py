"""Matplotlib figures as SVGs that are coloured by the CSS variables of the page they stand on, and so follow its theme:
--ink, --grid and --series-0 to -7. One saved alone brings defaults."""

import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib draws with these colours, each of which is replaced by its CSS variable in the text of the SVG.
INK, GRID, SERIES = "#010101", "#020202", tuple(f"#0303{index:02x}" for index in range(8))
VARIABLES = {INK: "--ink, #24272b", GRID: "--grid, #d5d8dc"}
COLOURS = ["#1f5fa8", "#c8553d", "#3a7d44", "#8a6bb1", "#b8860b", "#17868b", "#a23e6d", "#5b6470"]
VARIABLES |= {colour: f"--series-{index}, {COLOURS[index]}" for index, colour in enumerate(SERIES)}
STYLE = Path(__file__).parent / "templates" / "figure.mplstyle"


def svg_of(name: str, draw: Callable[[Axes], None], size: tuple = (4.6, 2.5), alone: bool = False) -> Markup:
    """An inline SVG of what `draw` puts on the axes of a figure of `size` inches. name: unique among the figures of a
    page: it keeps their identifiers apart. alone: with default colours."""
    with rc_context({"svg.hashsalt": name}, STYLE):
        figure, file = Figure(figsize=size, layout="constrained"), io.StringIO()
        draw(figure.subplots())
        without = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same figures give the same page
        figure.savefig(file, format="svg", transparent=True, metadata=without)
    prefix = f"f{zlib.crc32(name.encode()):08x}-"  # identifiers are unique within a file, not on a page of many figures
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{prefix}", file.getvalue().partition("<svg ")[2])
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg)  # the page decides how large it is
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable if alone else variable.partition(',')[0]})")
    return Markup(f'<svg role="img" {svg}')
