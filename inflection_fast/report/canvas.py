"""One look for every picture: sizes, colours, axes, marks. matplotlib is imported by those who draw, when they draw.

Everything goes through `Figure` objects: no pyplot, so no global state, no backend to choose, nothing left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["dress", "figure", "layer_axis", "legend", "save", "save_vectors"]

# Okabe and Ito's colours: told apart with every common colour blindness, and in grey.
BLUE, ORANGE, CHOSEN = "#0072B2", "#E69F00", "#D55E00"
INK, GREY = "#222222", "#8a8a8a"
NO_VALUE: dict[str, Any] = {"facecolor": "#eeeeee", "edgecolor": "#b5b5b5", "hatch": "//////", "linewidth": 0}
PLATE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 3}  # behind text on a pattern
MAP = "viridis"  # even steps of lightness, so it survives grey printing
DPI = 200
SMALL, NORMAL, TITLE = 8, 9, 10.5
MAX_LABELS = 16  # more labelled points than this and the labels touch


def figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches whose parts keep clear of each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def dress(ax: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title on the left, labels, thin spines on two sides."""
    ax.set_title(title, loc="left", fontsize=TITLE, color=INK, pad=8)
    ax.set_xlabel(x, fontsize=NORMAL, color=INK)
    ax.set_ylabel(y, fontsize=NORMAL, color=INK)
    ax.tick_params(labelsize=SMALL, colors=INK, width=0.6, length=3, which="major")
    ax.tick_params(width=0.4, length=2, which="minor")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_linewidth(0.6)
        spine.set_color(INK)


def layer_axis(axis: Any, layers: int) -> None:
    """Whole numbers only, every layer named while there is room."""
    from matplotlib.ticker import MaxNLocator

    if layers <= MAX_LABELS:
        axis.set_ticks(range(layers))
    else:
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def legend(ax: Axes, handles: Sequence[Any]) -> None:
    """A legend in one row above the axes on the right, where it covers no data."""
    if handles:
        ax.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=SMALL,
            handletextpad=0.4,
            columnspacing=1.2,
            borderaxespad=0.3,
        )


def save(drawn: Figure, path: Path) -> None:
    """Writes a PNG that is the same to the byte for the same numbers: no date, no version inside.

    Axes are labelled with the numbers themselves, not with what is left of them after an offset in the corner.
    """
    _plain_numbers(drawn)
    drawn.savefig(path, format="png", metadata={"Software": None})


def save_vectors(drawn: Figure, path: Path) -> None:
    """Writes `path` with the endings .svg and .pdf, text as text; the same to the byte for the same numbers."""
    import matplotlib

    _plain_numbers(drawn)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "pdf.fonttype": 42}):
        drawn.savefig(path.with_name(f"{path.name}.svg"), format="svg", metadata={"Date": None, "Creator": None})
        nothing = {"Creator": None, "Producer": None, "CreationDate": None}
        drawn.savefig(path.with_name(f"{path.name}.pdf"), format="pdf", metadata=nothing)


def _plain_numbers(drawn: Figure) -> None:
    from matplotlib.ticker import ScalarFormatter

    for ax in drawn.axes:
        for formatter in (ax.xaxis.get_major_formatter(), ax.yaxis.get_major_formatter()):
            if isinstance(formatter, ScalarFormatter):
                formatter.set_useOffset(False)
