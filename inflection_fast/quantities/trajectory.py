"""The path of features through the layers: distances, angles and bends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .output import predicts_next
from .quantity import Accumulator, Column, MeasuredModel, ProbeFeatures, Quantity, Sums

__all__ = ["Trajectory", "bends", "bhattacharyya_angle", "tail_exponent"]

TRANSPORT_ROWS = 128  # feature rows whose token distributions are compared
TAIL = (0.1, 0.6)  # part of the singular values, by number, that the contraction is fitted to


def _of_layer(unit: str, label: str, explanation: str, count: str) -> Column:
    return Column(unit=unit, axes=("layer",), label=label, explanation=explanation, count=count)


class Trajectory(Quantity):
    """Features along depth, on the probe set: block l has the output h_l and the input h_(l-1), rows are tokens.

    * `trajectory_distance`: mean over rows of ||h_l - h_(l-1)|| / ||h_(l-1)||;
    * `trajectory_angle`: mean over rows of the angle between h_(l-1) and h_l, in radians;
    * `block_cka`: linear CKA between h_(l-1) and h_l, debiased or not as `MonitorConfig.cka_debiased` says;
    * `trajectory_bend`: at which tolerance the Ramer-Douglas-Peucker algorithm drops layer l from the path of the mean
      features (arXiv 2604.19321, "RDP LoRA"): its distance from the chord between its kept neighbours over the length
      of the longest chord. The layers with the largest bends are the breakpoints; the ends have no bend;
    * `contraction`: alpha_l = -d log s_k / d log k over the tail of the singular values s_k of the centred features of
      block l (SPINAL, arXiv 2601.06238); larger is fewer directions;
    * `transport`: mean over rows of 2 arccos(sum_v sqrt(p_(l-1)(v) p_l(v))), p_l the token distribution that the
      model's head makes of h_l (SPINAL); missing for models that do not predict the next token.

    What SPINAL's abstract does not say and is chosen here: the tail is the 10th to the 60th percent of the singular
    values by number, the fit is least squares, and features go to the head through the model's final norm where one is
    found. The first block of a stack has no features before it: distance, angle, CKA and transport are missing there.

    Cost per layer: CKA and singular values of min(N, D)^2 max(N, D) operations, and 128 rows through the head; on a GPU
    the singular values wait for it. Memory: 8 (L + 9) bytes per layer, and logits of 256 rows.
    """

    name = "trajectory"

    columns = {
        "trajectory_distance": _of_layer(
            "1",
            "relative distance along depth",
            "Distance from a block's input to its output over the input's norm.",
            "pairs",
        ),
        "trajectory_angle": _of_layer(
            "rad", "angle along depth", "Angle between a block's input and output features, mean over tokens.", "pairs"
        ),
        "block_cka": _of_layer(
            "1", "CKA of a block's input and output", "Linear CKA between a block's input and output features.", "pairs"
        ),
        "trajectory_bend": _of_layer(
            "1",
            "bend of the path of features",
            "Distance of a layer's mean features from the chord of its neighbours on the simplified path.",
            "measured",
        ),
        "contraction": _of_layer(
            "1",
            "spectral tail exponent",
            "Exponent of the fall of the singular values of a block's features.",
            "measured",
        ),
        "transport": _of_layer(
            "rad",
            "transport of the token distribution",
            "Angle between the token distributions that the head makes of a block's input and output.",
            "transported",
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Find the head."""
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._config, self._head = model.config, head_of(model.model) if predicts_next(model.model) else None
        self._stack_of = [getattr(block, "stack", "") for block in model.blocks]
        layers = len(model.blocks)
        self.axes = {"other_layer": layers}
        alike = partial(Accumulator, held="alike")
        names = ("distance", "angle", "cka", "pairs", "contraction", "measured", "transport", "transported", "stack")
        self.accumulators = {name: alike("layer") for name in names} | {"gram": alike(("layer", "other_layer"))}

    def on_probe(self, sums: Sums, probe: ProbeFeatures) -> None:
        """Write everything."""
        apart = [
            [i for i in of if self._stack_of[i] == stack]
            for of in probe.stacks
            for stack in dict.fromkeys(self._stack_of)
        ]
        for layers in filter(None, apart):
            before: Tensor | None = None
            for layer in layers:
                features = probe.features[layer].float()
                centred = features - features.mean(0)
                sums["measured"][layer].fill_(1)
                sums["stack"][layer].fill_(layers[0])
                gram = gram_of(centred)
                self.later(sums, partial(_write_contraction, layer, min(len(gram), len(centred) - 1)), gram)
                if before is not None:
                    self._write_pair(sums, layer, before, features)
                before = features
            means = torch.stack([probe.features[layer].double().mean(0) for layer in layers])
            centred = means - means[0]  # the path's start is its origin, so that no offset eats the digits
            key = tuple(layers)
            if key not in self._indices:  # brought to the device once: a copy from the host takes its time
                self._indices[key] = torch.tensor(layers).to(means.device, non_blocking=True)
            index = self._indices[key]
            sums["gram"][index[:, None], index] = (centred @ centred.mT).to(sums["gram"].device, non_blocking=True)

    def _write_pair(self, sums: Sums, layer: int, before: Tensor, after: Tensor) -> None:
        x, y = before.double(), after.double()
        norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
        sums["distance"][layer] = ((y - x).norm(dim=-1) / norm_x).mean()
        # atan2 keeps its digits at small angles, where arccos of a cosine near 1 has none.
        u, v = x / norm_x[:, None], y / norm_y[:, None]
        sums["angle"][layer] = (2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))).mean()
        sums["cka"][layer] = ops.linear_cka(before, after, debiased=self._config.cka_debiased)
        sums["pairs"][layer].fill_(1)
        if self._head is not None:
            rows = _spread(len(before), TRANSPORT_ROWS, before.device)
            sums["transport"][layer] = bhattacharyya_angle(*(self._head(h[rows]) for h in (before, after))).mean()
            sums["transported"][layer].fill_(1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What was written, and the bends of each stack's path."""
        bend = np.full(len(sums["measured"]), np.nan)
        measured = np.flatnonzero(sums["measured"] > 0)
        for start in np.unique(sums["stack"][measured]):
            layers = measured[sums["stack"][measured] == start]
            bend[layers] = bends(sums["gram"][np.ix_(layers, layers)])
        return {
            "trajectory_distance": sums["distance"],
            "trajectory_angle": sums["angle"],
            "block_cka": sums["cka"],
            "trajectory_bend": bend,
            "contraction": sums["contraction"],
            "transport": sums["transport"],
        }


def bends(gram: np.ndarray) -> np.ndarray:
    """The largest tolerance at which the Ramer-Douglas-Peucker algorithm keeps each point of a path.

    Args:
        gram: [L, L] inner products of the points, from any origin.

    Returns:
        [L], in units of the largest distance between two points; NaN at both ends, which are always kept. No bend is
        larger than that of the point that split its stretch, because it is reached only after it.
    """
    found = np.full(len(gram), np.nan)
    own = np.diagonal(gram)
    size = np.sqrt(max((own[:, None] + own - 2 * gram).max(), 0.0)) if len(gram) else 0.0  # of squared distances
    stretches = [(0, len(gram) - 1, np.inf)]
    while stretches:
        first, last, limit = stretches.pop()
        if last - first < 2:
            continue
        between = np.arange(first + 1, last)
        distance = _from_chord(gram, first, last, between)
        at = int(np.argmax(distance))
        split, kept = int(between[at]), min(float(distance[at]), limit)
        found[split] = kept / size if size > 0 else 0.0
        stretches += [(first, split, kept), (split, last, kept)]
    return found


def _from_chord(gram: np.ndarray, first: int, last: int, points: np.ndarray) -> np.ndarray:
    """Distances of points from the line segment between two others."""
    chord = gram[last, last] + gram[first, first] - 2 * gram[first, last]
    to_point = np.diagonal(gram)[points] + gram[first, first] - 2 * gram[first, points]
    along = gram[points, last] - gram[points, first] - gram[first, last] + gram[first, first]
    share = np.clip(along / chord, 0.0, 1.0) if chord > 0 else np.zeros(len(points))
    return np.sqrt(np.maximum(to_point - 2 * share * along + share**2 * chord, 0.0))


def tail_exponent(centred: Tensor) -> Tensor:
    """-slope of log s_k against log k, least squares over the tail of the singular values of [N, D]; float64 []."""
    gram = gram_of(centred)
    return _tail_exponent(gram, min(len(gram), len(centred) - 1))  # centring takes one rank away


def gram_of(centred: Tensor) -> Tensor:
    """The smaller Gram matrix of [N, D], float64, whose eigenvalues are the squared singular values."""
    x = centred.double()
    return x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x


def _write_contraction(layer: int, count: int, sums: Sums, gram: Tensor) -> None:
    sums["contraction"][layer].copy_(_tail_exponent(gram, count))


def _tail_exponent(gram: Tensor, count: int) -> Tensor:
    broken = ~torch.isfinite(gram).all()
    squares = torch.linalg.eigvalsh(gram.masked_fill(broken, 0.0)).flip(0)
    begin, end = int(TAIL[0] * count), max(int(TAIL[1] * count), int(TAIL[0] * count) + 2)
    if end > count:
        return gram.new_full((), torch.nan)
    k = torch.arange(begin + 1, end + 1, dtype=torch.float64, device=gram.device).log()
    s = squares[begin:end].clamp(min=0.0).log() / 2
    k = k - k.mean()
    return (-(k * s).sum() / k.square().sum()).masked_fill(broken, torch.nan)


def bhattacharyya_angle(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """2 arccos(sum_v sqrt(p_v q_v)) of softmax distributions [..., V], in [0, pi]: the Fisher-Rao distance."""
    half_p, half_q = ((x.float().log_softmax(-1) / 2).exp() for x in (p_logits, q_logits))
    # As an angle between unit vectors by their difference, since arccos near 1 loses half of the digits.
    return 4 * torch.asin(((half_p - half_q).norm(dim=-1) / 2).clamp(max=1.0))


def _spread(rows: int, wanted: int, device: torch.device) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, wanted), device=device).round().long()


_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "norm_f")


def head_of(model: nn.Module):
    """What makes token logits of features [N, D] of the last width: final norm and output embeddings; None: neither."""
    whole = next((m for m in model.modules() if callable(getattr(m, "get_output_embeddings", None))), None)
    if whole is None:
        return None
    get_head: Callable[[], object] = getattr(whole, "get_output_embeddings")  # noqa: B009  (no attribute of all modules)
    head = get_head()
    if not isinstance(head, nn.Linear):
        return None
    base = getattr(whole, getattr(whole, "base_model_prefix", ""), whole)
    base = getattr(base, "decoder", base)
    norm = next((m for name, m in base.named_children() if name in _NORMS), None)

    def logits(features: Tensor) -> Tensor:
        features = features.to(head.weight.dtype)
        return nn.functional.linear(features if norm is None else norm(features), head.weight, head.bias)

    return logits
