"""The style of all pictures: sizes, colours, axes, marks. matplotlib is imported inside functions.

Pictures are `Figure` objects without pyplot, so there is no global state and no choice of a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "colour_bar", "figure", "hatch", "layer_axis", "layer_colour", "legend", "no_values", "save", "save_vectors",
    "spread_layers", "style_axes",
]  # fmt: skip

# Colours of Okabe and Ito, which differ with every common colour blindness and in grey.
BLUE, ORANGE, CHOSEN = "#0072B2", "#E69F00", "#D55E00"
TEXT_COLOUR, GREY = "#222222", "#8a8a8a"
NO_VALUE: dict[str, Any] = {"facecolor": "#eeeeee", "edgecolor": "#b5b5b5", "hatch": "//////", "linewidth": 0}
TEXT_BOX: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 3}  # behind text on a pattern
MAP = "viridis"  # lightness increases evenly, also in grey
DPI = 200
SMALL, NORMAL, TITLE = 8, 9, 10.5
MAX_LABELS = 16  # labels of more points would touch
TRACED = 6  # lines of layers in one chart: more would hide each other


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def style_axes(ax: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title on the left, labels, thin spines on two sides."""
    ax.set_title(title, loc="left", fontsize=TITLE, color=TEXT_COLOUR, pad=8)
    ax.set_xlabel(x, fontsize=NORMAL, color=TEXT_COLOUR)
    ax.set_ylabel(y, fontsize=NORMAL, color=TEXT_COLOUR)
    ax.tick_params(labelsize=SMALL, colors=TEXT_COLOUR, width=0.6, length=3, which="major")
    ax.tick_params(width=0.4, length=2, which="minor")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_linewidth(0.6)
        spine.set_color(TEXT_COLOUR)


def layer_axis(axis: Any, layers: int) -> None:
    """Integer ticks, at every layer if there is room."""
    from matplotlib.ticker import MaxNLocator

    if layers <= MAX_LABELS:
        axis.set_ticks(range(layers))
    else:
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def legend(ax: Axes, handles: Sequence[Any]) -> None:
    """A legend in one row above the axes on the right."""
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


def hatch(ax: Axes) -> None:
    """Hatch the background, which shows where there is no value."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, zorder=0, **NO_VALUE))


def colour_bar(mesh: Any, ax: Axes, unit: str, pad: float) -> Any:
    """The colour bar of a map, labelled with its unit."""
    bar = ax.figure.colorbar(mesh, ax=ax, pad=pad, fraction=0.05)
    bar.set_label(unit, fontsize=NORMAL, color=TEXT_COLOUR)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=3)
    bar.outline.set_visible(False)
    return bar


def no_values(ax: Axes) -> None:
    """Say on an axis that there are no values."""
    ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center", bbox=TEXT_BOX)


def spread_layers(count: int) -> list[int]:
    """At most `TRACED` layers of `count`, spread evenly."""
    return sorted(set(np.linspace(0, count - 1, min(TRACED, count)).round().astype(int).tolist()))


def layer_colour(share: float) -> Any:
    """The colour of a layer from the first (0, dark) to the last (1), without the lightest colours of the map."""
    import matplotlib

    return matplotlib.colormaps[MAP](0.85 * share)


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG without date and version, so equal numbers give equal bytes. Tick labels have no offset."""
    _plain_numbers(drawn)
    drawn.savefig(path, format="png", metadata={"Software": None})


def save_vectors(drawn: Figure, path: Path) -> None:
    """Write `path` with the endings .svg and .pdf, text as text; equal numbers give equal bytes."""
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
