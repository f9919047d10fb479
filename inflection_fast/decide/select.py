"""Selection of the layers to adapt, with a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..timeline import Timeline
from .evidence import STEPS_FOR_CORRELATION
from .extremes import Finding, cliff, maxima, minimum, top
from .heads import collapsed, lazy
from .plan import Plan
from .profile import Signal, entropy_of, gradient_of, score_signal, window_of
from .ski import check_options

__all__ = ["BASELINES", "SelectConfig", "Stack", "baseline", "select", "stack_in"]

# Selections that do not look at the measurement: what every claim about the others is compared with.
BASELINES = ("first", "last", "random", "all")
_METHODS = ("greedy", "maxima", "top", "lazy", "collapsed", *BASELINES)
_COUNTED = ("top", "first", "last", "random")


@dataclass(frozen=True)
class SelectConfig:
    """How layers are chosen. Every choice that arXiv 2511.00797 leaves open is an option here.

    * `"greedy"`: the entropy minimum and the gradient cliff, each widened by `window`
    * `"maxima"`: local maxima of SKI
    * `"top"`: the best `k` layers by SKI
    * `"lazy"`: blocks whose attention is of rank one and in one column in every head (`rank_k90`, `column_mass`)
    * `"collapsed"`: blocks with heads of nearly no attention entropy, named in `Plan.heads`
    * `"first"`, `"last"`, `"random"`, `"all"`: baselines that do not look at the measurement, to compare with
    """

    method: str = "greedy"
    window: int = 1  # greedy: blocks on either side of a pick that are taken too
    alpha: float = 0.5  # weight of the entropy in SKI, in [0, 1]
    k: int | float | None = None  # top, first, last, random: how many layers, or which share of them (a float up to 1)
    cliff: str = "steepest"  # greedy: "steepest" fall of the log gradient on its way down, or its "lowest" point
    normalisation: str = "minmax"  # of SKI: "minmax", "rank" or "zscore"
    log_gradient: bool = True  # SKI from the logarithm of the gradient norms; the cliff always is
    heads: str = "mean"  # entropy of a layer from its heads: their "mean" or their "min"
    steps: tuple[int, int] | float | None = None  # optimizer steps (first, last), or the last share of those measured
    significance: float | None = 0.05  # chance of picking from a profile that is flat; None: pick without asking
    seed: int = 0  # random
    lazy_rank: float = 1.5  # lazy: the largest k* of a block's heads is below
    lazy_mass: float = 0.5  # lazy: share of the energy of attention in one column, at least
    collapsed_entropy: float = 0.05  # collapsed: nats; below, nearly every query attends to one key
    stack: str | None = None  # of several ("encoder", "vision_tower"); None: with most trainable, else most parameters

    def __post_init__(self):
        _expect("method", self.method, _METHODS)
        _expect("cliff", self.cliff, ("steepest", "lowest"))
        _expect("heads", self.heads, ("mean", "min"))
        check_options(self.alpha, self.normalisation)
        if not _is_int(self.window) or self.window < 0:
            raise ValueError(f"window: expected an integer >= 0, got {self.window!r}")
        if not _is_int(self.seed) or self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed!r}")
        if not isinstance(self.log_gradient, bool):
            raise TypeError(f"log_gradient: expected True or False, got {self.log_gradient!r}")
        for name in ("lazy_rank", "lazy_mass", "collapsed_entropy", "significance"):
            value = getattr(self, name)
            optional = name == "significance" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not self.lazy_rank > 0:
            raise ValueError(f"lazy_rank: expected a number > 0, got {self.lazy_rank!r}")
        if not 0 <= self.lazy_mass <= 1:
            raise ValueError(f"lazy_mass: expected a number in [0, 1], got {self.lazy_mass!r}")
        if not self.collapsed_entropy > 0:
            raise ValueError(f"collapsed_entropy: expected a number > 0, got {self.collapsed_entropy!r}")
        if self.stack is not None and not (isinstance(self.stack, str) and self.stack):
            raise ValueError(f"stack: expected the name of a stack of blocks or None, got {self.stack!r}")
        if self.significance is not None and not 0 < self.significance < 0.5:
            raise ValueError(f"significance: expected a number between 0 and 0.5, or None, got {self.significance!r}")
        if (self.k is not None) != (self.method in _COUNTED):
            raise ValueError(
                f"k: expected a number for the methods {list(_COUNTED)} only, got {self.k!r} for {self.method!r}"
            )
        if self.k is not None and not (
            self.k >= 1 if _is_int(self.k) else isinstance(self.k, float) and 0 < self.k <= 1
        ):
            raise ValueError(f"k: expected an integer >= 1 or a share in (0, 1], got {self.k!r}")
        if isinstance(self.steps, list):  # as JSON and YAML have it
            object.__setattr__(self, "steps", tuple(self.steps))
        if self.steps is not None and not _is_window(self.steps):
            raise ValueError(f"steps: expected (first, last) or a share in (0, 1], got {self.steps!r}")


def select(timeline: Timeline, config: SelectConfig | None = None) -> Plan:
    """Choose layers from a timeline (`config` None: `SelectConfig()`).

    Deterministic. Layers are chosen within one stack of the model; others have no score. A minimum, a cliff or a
    maximum must be significant, see `evidence.py`. Otherwise the plan is empty, and its summary says so. `TypeError` if
    `timeline` is no Timeline, `ValueError` if `config` asks for more layers than there are, for a stack that does not
    exist, or for steps that were not measured.
    """
    if not isinstance(timeline, Timeline):
        raise TypeError(f"timeline: expected a Timeline (Timeline.load reads a file), got {type(timeline).__name__}")
    config = config or SelectConfig()
    stack = stack_in(timeline, config.stack)
    within = stack.layers
    k = _count(config.k, stack)
    window = window_of(timeline, config.steps)
    entropy, gradient = entropy_of(timeline, window, within, config.heads), gradient_of(timeline, window, within)
    alpha, absent = _weight(config.alpha, entropy, gradient)
    scores, score = score_signal(entropy, gradient, alpha, config.normalisation, config.log_gradient)

    heads: dict[int, tuple[int, ...]] = {}
    if config.method == "lazy":
        found, scores = lazy(timeline, window, within, config.lazy_rank, config.lazy_mass)
        findings = [found]
    elif config.method == "collapsed":
        found, scores, heads = collapsed(timeline, window, within, config.collapsed_entropy)
        findings = [found]
    elif config.method in BASELINES:
        findings = baseline(config.method, k or len(within), within.tolist(), config.seed)
    elif config.method == "greedy":
        findings = _greedy(entropy, gradient, config)
    elif config.method == "maxima":
        findings = maxima(scores, score, config.significance)
    else:
        findings = top(scores, score, k or 0, config.significance)  # the configuration has a k for this method
    reasons = _reasons(findings, config.window if config.method == "greedy" else 0, within.tolist())
    used = (entropy, gradient) if config.method == "greedy" else (score,)
    ranks_by_ski = config.method not in (*BASELINES, "lazy", "collapsed")
    measured = _measured(timeline, used) + absent if ranks_by_ski else ""
    return Plan(
        layers=tuple(sorted(reasons)),
        summary=" ".join([_headline(sorted(reasons), len(within)), *(found.words for found in findings)])
        + (stack.words + measured),
        reasons=reasons,
        scores=scores,
        profile={
            "entropy": entropy.mean.tolist(),
            "entropy_se": entropy.standard_errors().tolist(),
            "activation_grad": np.exp(gradient.mean).tolist(),
            "log_activation_grad_se": gradient.standard_errors().tolist(),
        },
        config=asdict(config) | {"steps": list(config.steps) if isinstance(config.steps, tuple) else config.steps},
        model=_model(timeline, stack),
        found={finding.name: list(finding.picks) for finding in findings},
        heads=heads,
    )


def _greedy(entropy: Signal, gradient: Signal, config: SelectConfig) -> list[Finding]:
    present = sum(len(signal.layers) > 0 for signal in (entropy, gradient))
    level = config.significance and config.significance / max(present, 1)
    return [minimum(entropy, level), cliff(gradient, level, config.cliff)]


def _weight(alpha: float, entropy: Signal, gradient: Signal) -> tuple[float, str]:
    """The weight of the entropy for the measured signals, and a sentence if it is not `alpha`."""
    if 0 < alpha < 1 and not len(entropy.layers) and len(gradient.layers):
        return 0.0, " Attention entropy was not measured: the scores rest on the activation gradient alone."
    if 0 < alpha < 1 and not len(gradient.layers) and len(entropy.layers):
        return 1.0, " The activation gradient was not measured: the scores rest on the attention entropy alone."
    return alpha, ""


def _reasons(findings: list[Finding], window: int, within: list[int]) -> dict[int, str]:
    sentences: dict[int, list[str]] = {}
    for found in findings:
        for layer, words in found.picks.items():
            sentences.setdefault(layer, []).append(words)
    for found in findings:
        for pick in found.picks:
            at = within.index(pick)
            for place in range(max(0, at - window), min(len(within), at + window + 1)):
                if place != at:
                    layer = within[place]
                    near = "is next to" if abs(place - at) == 1 else f"is within {window} blocks of"
                    sentences.setdefault(layer, []).append(f"Block {layer} {near} block {pick}, the {found.name}.")
    return {layer: " ".join(sentences[layer]) for layer in sorted(sentences)}


def _headline(chosen: list[int], layers: int) -> str:
    if not chosen:
        return f"None of the {layers} blocks was picked."
    return f"{len(chosen)} of {layers} blocks: {', '.join(map(str, chosen))}."


def _measured(timeline: Timeline, used: tuple[Signal, ...]) -> str:
    steps = np.unique(np.concatenate([signal.steps for signal in used]))
    if not len(steps):
        return " The timeline holds no step with values."
    first, last = timeline.steps[steps[0]], timeline.steps[steps[-1]]
    words = f" Decided from {len(steps)} measured steps ({first} to {last})." if len(steps) > 1 else ""
    if 1 < len(steps) < STEPS_FOR_CORRELATION:
        words += " So few steps do not show their correlation, so significance is overestimated."
    without = sorted({int(layer) for s in used if len(s.layers) for layer in set(s.within) - set(s.layers)})
    return words + (f" Blocks without values: {', '.join(map(str, without))}." if without else "")


def _model(timeline: Timeline, stack: Stack) -> dict:
    model, config = timeline.meta.get("model") or {}, timeline.meta.get("config") or {}
    return {
        "model_type": model.get("model_type"),
        "class": model.get("class"),
        "named": bool(config.get("blocks")),  # the blocks were given by name, not found by structure
        "layers": list(timeline.layers),
        **({} if stack.name is None else {"stack": stack.as_dict()}),
    }


def _count(k: int | float | None, stack: Stack) -> int | None:
    layers = len(stack.layers)
    if isinstance(k, float):
        return max(1, math.floor(k * layers + 0.5))
    if k is not None and k > layers:
        whose = "the model" if stack.name is None else f"the stack {stack.name}"
        raise ValueError(f"k: {k} layers were asked for, {whose} has {layers}")
    return k


def _expect(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {list(accepted)}, got {value!r}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_window(steps) -> bool:
    if isinstance(steps, tuple):
        return len(steps) == 2 and all(map(_is_int, steps)) and 0 <= steps[0] <= steps[1]
    return isinstance(steps, float) and 0 < steps <= 1


def baseline(method: str, k: int, layers: Sequence[int], seed: int) -> list[Finding]:
    """The first or last `k` of the blocks `layers`, `k` drawn at random from `seed`, or all of them."""
    count = len(layers)
    places = {
        "first": range(k),
        "last": range(count - k, count),
        "random": sorted(np.random.default_rng(seed).choice(count, k, replace=False).tolist()),
        "all": range(count),
    }[method]
    which = {
        "first": f"one of the first {k} of {count}",
        "last": f"one of the last {k} of {count}",
        "random": f"one of {k} of {count} drawn at random (seed {seed})",
        "all": f"one of all {count}",
    }[method]
    chosen = [int(layers[place]) for place in places]
    picks = {layer: f"Block {layer} is {which}: a baseline, chosen without the measurement." for layer in chosen}
    return [Finding("baseline", f"A baseline ({method}), chosen without the measurement.", picks)]


# ---- the stack that layers are chosen from: a vision tower and a decoder are not ranked against each other -----------


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers of one stack of a model, in their order."""

    layers: np.ndarray  # [N] indices
    name: str | None = None  # None: the only one, or those of a timeline that does not tell stacks apart
    words: str = ""  # which one was chosen and why, where there are several

    def as_dict(self) -> dict:
        """As it stands in `Plan.model`."""
        return {"name": self.name, "layers": self.layers.tolist()}


def stack_in(timeline: Timeline, name: str | None) -> Stack:
    """The stack `name`; None: the one with most parameters that train or, where none trains, most parameters.

    `ValueError` where the timeline has no such stack, or does not say which stacks there are.
    """
    known = timeline.meta.get("stacks") or []
    names = [one["name"] for one in known]
    if name is not None and not known:
        raise ValueError(
            f"stack: this timeline does not say which stacks its blocks are in, so {name!r} cannot be found; it was "
            "written by an earlier version: leave stack out, or measure again"
        )
    if name is not None and name not in names:
        raise ValueError(f"stack: this timeline has no stack {name!r}; it has {', '.join(names)}")
    if len(known) < 2:
        return Stack(np.arange(len(timeline.layers)))
    trains = any(one["trainable"] for one in known)
    size = "trainable" if trains else "parameters"
    chosen = known[names.index(name)] if name is not None else max(known, key=lambda one: one[size])
    why = "as asked for" if name is not None else f"the one with most {'trainable ' if trains else ''}parameters"
    words = f" Chosen within the stack {chosen['name']} ({why}) of {', '.join(names)}."
    return Stack(np.array(chosen["layers"], int), chosen["name"], words)
