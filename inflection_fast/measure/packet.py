"""What a measured step adds up to: one piece of memory, and the row of a timeline that follows from it.

The sums of pieces add and their maxima combine by max, so micro-batches, shards and ranks may cut a step anywhere. What
is not linear in the pieces (means, square roots, standard errors) is left to `row_of`, a pure function of the copied
numbers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["ATTENTION_PARTS", "ATTENTION_SUMS", "Packet", "row_of"]

# Per layer and head, over valid query rows: how many, and their entropy.
ATTENTION_SUMS = ("count", "entropy")
# What is reported beside the mean entropy: of what else the rows have a mean, and the parts of the variance of the mean
# entropy, which is quadratic in that mean and so needs three sums (of dy^2, dy dv and dv^2, see HeadMeans).
ATTENTION_PARTS = ("collision", "sink", "yy", "yv", "vv")

Fields = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape, in the order of their memory


def _sum_fields(layers: int, heads: int, probe: bool) -> Fields:
    per_layer = (
        "activation_squares",  # squared l2 norms of dL/d(output of the block)
        "parameter_squares",  # squared l2 norms over the block's parameters
        "delta_cka",
        "delta_cka_se",
        # How many pieces are in each of those; a value without any is NaN.
        "activation_count",
        "parameter_count",
        "delta_cka_count",
        "delta_cka_se_count",
    )
    per_step = (
        "probe_ms",
        "loss",
        "skipped",  # of ranks that found gradients which are not finite
        "probe_ms_count",
        "loss_count",
        "skipped_count",
    )
    # float64: squares of scaled gradients are large, and no micro-batch is to be lost in the sum of all before it
    shapes = {"attention": (len(ATTENTION_SUMS), layers, heads)}
    shapes |= dict.fromkeys(per_layer, (layers,)) | dict.fromkeys(per_step, ())
    if probe:
        shapes["probe_attention"] = (len(ATTENTION_SUMS), layers, heads)
        shapes |= dict.fromkeys(("probe_activation_squares", "probe_activation_count"), (layers,))
    return {name: ("float64", shape) for name, shape in shapes.items()}


def _part_fields(layers: int, heads: int) -> Fields:
    # float32: off by 6e-8 a micro-batch, where a standard error from 64 rows is itself known to a tenth
    return {"attention_parts": ("float32", (len(ATTENTION_PARTS), layers, heads))}


def _max_fields(layers: int, heads: int) -> Fields:
    return {"max_logit": ("float32", (layers, heads))}


class Packet:
    """The local sums and maxima of a measured step: preallocated bytes, copied as a whole, with named views.

    `packet["attention"]` is the view of that name: `attention` [2, L, H] in the order of `ATTENTION_SUMS`,
    `attention_parts` [5, L, H] in that of `ATTENTION_PARTS`, `max_logit` [L, H], those of the loss, of skipping and of
    the probe's time [], every other one [L]; where attention or gradients of a probe set are measured, three more that
    begin with "probe_", `probe_attention` like `attention`. Writing to a view writes to `data`, of which `sums`
    (float64), `parts` (float32) and `maxima` (float32) are views too: the whole of each kind, flat.
    """

    def __init__(self, layers: int, heads: int, device: torch.device | str, *, probe: bool = False):
        fields = _sum_fields(layers, heads, probe) | _part_fields(layers, heads) | _max_fields(layers, heads)
        self._name(torch.zeros(_bytes(fields), dtype=torch.uint8, device=device), layers, heads, probe)
        self.reset()

    @classmethod
    def like(cls, other: Packet, data: Tensor) -> Packet:
        """A packet of the size of `other`, whose numbers are in the given memory, uint8."""
        packet = cls.__new__(cls)
        packet._name(data, other.layers, other.heads, other.probe)
        return packet

    def _name(self, data: Tensor, layers: int, heads: int, probe: bool) -> None:
        self.data, self.layers, self.heads, self.probe = data, layers, heads, probe
        self._views = _all_views(data, layers, heads, probe)
        sums = _bytes(_sum_fields(layers, heads, probe))
        parts = sums + _bytes(_part_fields(layers, heads))
        self.sums = data[:sums].view(torch.float64)
        self.parts, self.maxima = data[sums:parts].view(torch.float32), data[parts:].view(torch.float32)

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def measured(self) -> set[str]:
        """Signals of which there is any piece at all, on the host; the others are NaN because nobody looked."""
        counts = {name.removesuffix("_count"): self[name] for name in self._views if name.endswith("_count")}
        counted = {name for name, count in counts.items() if (count > 0).any()}
        norms = {f"{name}_grad" for name in counted & {"activation", "parameter"}}
        heads = {"entropy", "max_logit"} if (self["attention"][0] > 0).any() else set()
        return norms | heads | (counted & {"loss", "skipped"})

    def reset(self) -> None:
        """Forget everything."""
        self.data.zero_()
        self.maxima.fill_(-torch.inf)

    def spoil(self) -> None:
        """Make every sum NaN, so that whatever it is added to is NaN too."""
        self.sums.fill_(torch.nan)
        self.parts.fill_(torch.nan)


def row_of(data: np.ndarray, layers: int, heads: int, *, probe: bool = False) -> dict[str, np.ndarray]:
    """The signals of a timeline, from the bytes of a `Packet` made with the same arguments, on the host.

    Entropy, collision and sink are means over valid query rows, and the standard error is that of a ratio of two
    estimated totals, which is linearised at the mean. Gradient norms are roots of the summed squares; delta-CKA and the
    loss are means over the pieces that have them. A signal without a single piece is NaN.
    """
    views = _all_views(data, layers, heads, probe)
    sum_of = dict(zip(ATTENTION_SUMS, views["attention"], strict=True))
    sum_of |= dict(zip(ATTENTION_PARTS, views["attention_parts"].astype(np.float64), strict=True))
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf of a run that diverges are values like others
        count = _where(sum_of["count"] > 0, sum_of["count"])
        mean = sum_of["entropy"] / count
        variance = sum_of["yy"] - 2 * mean * sum_of["yv"] + mean**2 * sum_of["vv"]
        row = {
            "entropy": mean,
            "entropy_se": np.sqrt(np.maximum(variance, 0)) / count,  # a sum of squares, but for rounding
            "max_logit": _where(sum_of["count"] > 0, views["max_logit"].astype(np.float64)),
            "collision": sum_of["collision"] / count,
            "sink": sum_of["sink"] / count,
            "activation_grad": _where(views["activation_count"] > 0, np.sqrt(views["activation_squares"])),
            "parameter_grad": _where(views["parameter_count"] > 0, np.sqrt(views["parameter_squares"])),
            **{name: _mean(views, name) for name in ("delta_cka", "delta_cka_se", "probe_ms", "loss")},
            "skipped": _where(views["skipped_count"] > 0, np.minimum(views["skipped"], 1.0)),
        }
        if probe:
            count, entropy = views["probe_attention"]
            norm = np.sqrt(views["probe_activation_squares"])
            row["probe_entropy"] = entropy / _where(count > 0, count)
            row["probe_activation_grad"] = _where(views["probe_activation_count"] > 0, norm)
        return row


def _mean(views: dict[str, np.ndarray], name: str) -> np.ndarray:
    count = views[f"{name}_count"]
    return views[name] / _where(count > 0, count)


def _where(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(known, values, np.nan)


def _bytes(fields: Fields) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in fields.values())


def _all_views(data, layers: int, heads: int, probe: bool) -> dict:
    """Named pieces of `data`, a tensor or an array of bytes, in order."""
    library = torch if isinstance(data, Tensor) else np
    views, start = {}, 0
    for fields in (_sum_fields(layers, heads, probe), _part_fields(layers, heads), _max_fields(layers, heads)):
        for name, (dtype, shape) in fields.items():
            end = start + _bytes({name: (dtype, shape)})
            views[name] = data[start:end].view(getattr(library, dtype)).reshape(shape)
            start = end
    return views
