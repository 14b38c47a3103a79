"""One look for all charts: drawn once in placeholder colours that the page replaces by its own, light and dark.

The series colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#14171c", "#5f6876", "#dde1e7"
OURS, CONTROL, THIRD = "#0072b2", "#d55e00", "#009e73"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", OURS: "--ours", CONTROL: "--control", THIRD: "--third"}


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings for the charts of the report."""
    settings: Any = {
        "figure.figsize": (4.4, 3.1),
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a $ in a name is a $
    }
    with mpl.rc_context(settings):
        yield


def svg(figure: "Figure", label: str) -> str:
    """The figure as inline SVG: no size of its own, the page's colours and font, readable to a screen reader."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
    text = re.sub(r" xmlns:xlink=\"[^\"]*\"", ' xmlns:xlink="http://www.w3.org/1999/xlink"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    return text
