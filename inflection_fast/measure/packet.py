"""What a measured step adds up to: one tensor of sums, one of maxima, and the row of a timeline that follows from them.

The sums of pieces add and their maxima combine by max, so micro-batches, shards and ranks may cut a step anywhere: to
join ranks is one all-reduce of each tensor, before they are copied to the host. What is not linear in the pieces
(means, square roots, standard errors) is left to `row_of`, a pure function of the copied numbers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["ATTENTION_SUMS", "Packet", "row_of"]

# Per layer and head, over valid query rows: how many; of what; and the parts of the variance of the mean entropy, which
# is quadratic in that mean and so needs three sums (of dy^2, dy dv and dv^2, see HeadMeans).
ATTENTION_SUMS = ("count", "entropy", "collision", "sink", "yy", "yv", "vv")


def _sum_shapes(layers: int, heads: int, probe: bool) -> dict[str, tuple[int, ...]]:
    shapes = {
        "attention": (len(ATTENTION_SUMS), layers, heads),
        "activation_squares": (layers,),  # squared l2 norms of dL/d(output of the block)
        "parameter_squares": (layers,),  # squared l2 norms over the block's parameters
        "delta_cka": (layers,),
        "delta_cka_se": (layers,),
        "probe_ms": (),
        "loss": (),
        "skipped": (),  # of ranks that found gradients which are not finite
        # How many pieces are in each of those; a value without any is NaN.
        "activation_count": (layers,),
        "parameter_count": (layers,),
        "delta_cka_count": (layers,),
        "delta_cka_se_count": (layers,),
        "probe_ms_count": (),
        "loss_count": (),
        "skipped_count": (),
    }
    if probe:
        shapes |= {
            "probe_attention": (2, layers, heads),  # count and entropy, over the probe set
            "probe_activation_squares": (layers,),
            "probe_activation_count": (layers,),
        }
    return shapes


def _max_shapes(layers: int, heads: int) -> dict[str, tuple[int, ...]]:
    return {"max_logit": (layers, heads)}


class Packet:
    """The local sums (float64) and maxima (float32) of a measured step: two preallocated tensors with named views.

    `packet["attention"]` is the view of that name: `attention` [7, L, H] in the order of `ATTENTION_SUMS`, `max_logit`
    [L, H], those of the loss, of skipping and of the probe's time [], every other one [L]; where attention or gradients
    of a probe set are measured, three more that begin with "probe_", `probe_attention` [2, L, H]. Writing to a view
    writes to `sums` or `maxima`.
    """

    def __init__(self, layers: int, heads: int, device: torch.device | str, *, probe: bool = False):
        # float64: the variance of a mean is a small difference of large sums, and squares of scaled gradients are large
        sums = torch.zeros(_size(_sum_shapes(layers, heads, probe)), dtype=torch.float64, device=device)
        maxima = torch.zeros(_size(_max_shapes(layers, heads)), dtype=torch.float32, device=device)
        self._name(sums, maxima, layers, heads, probe)
        self.reset()

    @classmethod
    def like(cls, other: Packet, sums: Tensor, maxima: Tensor) -> Packet:
        """A packet of the size of `other`, whose numbers are in the given memory."""
        packet = cls.__new__(cls)
        packet._name(sums, maxima, other.layers, other.heads, other.probe)
        return packet

    def _name(self, sums: Tensor, maxima: Tensor, layers: int, heads: int, probe: bool) -> None:
        self.sums, self.maxima, self.layers, self.heads, self.probe = sums, maxima, layers, heads, probe
        self._views = _views(sums, _sum_shapes(layers, heads, probe)) | _views(maxima, _max_shapes(layers, heads))

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
        self.sums.zero_()
        self.maxima.fill_(-torch.inf)


def row_of(
    sums: np.ndarray, maxima: np.ndarray, layers: int, heads: int, *, probe: bool = False
) -> dict[str, np.ndarray]:
    """The signals of a timeline, from the numbers of a `Packet` made with the same arguments, on the host.

    Entropy, collision and sink are means over valid query rows, and the standard error is that of a ratio of two
    estimated totals, which is linearised at the mean. Gradient norms are roots of the summed squares; delta-CKA and the
    loss are means over the pieces that have them. A signal without a single piece is NaN.
    """
    views = _views(sums, _sum_shapes(layers, heads, probe)) | _views(maxima, _max_shapes(layers, heads))
    sum_of = dict(zip(ATTENTION_SUMS, views["attention"], strict=True))
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


def _size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _views(flat, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Named pieces of `flat`, a tensor or an array, in order."""
    views, start = {}, 0
    for name, shape in shapes.items():
        views[name] = flat[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return views
