"""One diagnostic, declared once: what it listens to, what it sums, and what the sums mean.

A quantity is a subclass of `Quantity`. It overrides the taps that it listens to; nothing is attached for the others.
Its accumulators are views of one piece of memory on the device, which holds the sums of all quantities of a measured
step. A tap writes to them in place; the monitor joins what micro-batches and ranks have written, brings it to the host
in one copy, and hands it to `values`, in a thread on which the training does not wait. Everything else follows from
the declaration: memory, joining, timeline, alerts, report.

Rules for taps, which run in the middle of the training:

* They write to accumulators in place (`add_`, `copy_`, `index_add_`, `sums["x"][layer] = ...`), by operations on the
  device. No shape depends on the batch, and nothing synchronises: no `.item()`, `.cpu()`, `bool(tensor)`, `nonzero()`.
  A number of the host is written by `fill_` or added by `+=`; `sums["x"][layer] = 1` would copy it to the device.
* They get detached tensors under `torch.no_grad()`, this rank's part of those that ranks have divided, and change none.
* If a tap raises, its quantity has no values in this step, and one warning is logged. The others go on.
* **Pieces.** A micro-batch is a forward of the model under autograd and the backward pass that follows. Each has
  accumulators of its own, which begin at 0 (sum) or -inf (max), and is left out if no backward pass goes through it.
  So a tap adds up, or takes the maximum over, what it is called with during one micro-batch, and sees no other.
* **Once.** `on_attention`, `on_attention_call`, `on_block`, `on_submodule` and `on_model_output` are called in the
  forward alone, once for each call, also where activation checkpointing runs a block again. `on_output_gradient` and
  `on_parameter_gradient` may come again for the same place, where two backward passes go through one graph: they write
  (`sums["squares"][layer] = ...`), they do not add, and the last one counts.
* `on_backward_end`, `before_update`, `after_update` and `on_probe` see the whole step, not a piece. `on_backward_end`
  is called after every backward pass, and gradients add up over them: it writes, and the last call counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..timeline.columns import AlertRule, Column
from .protocols import Call, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..blocks import Block
    from ..ops import AttentionStats

__all__ = [
    "Accumulator",
    "AlertRule",
    "AttentionRows",
    "AttentionSeen",
    "BlockForward",
    "Column",
    "MeasuredModel",
    "ModelOutput",
    "OutputGradient",
    "ParameterGradient",
    "Parameters",
    "ProbeFeatures",
    "Quantity",
    "SubmoduleForward",
    "Sums",
    "Update",
]

# The accumulators of a quantity by name, to be written in place: `sums["x"] += y`, `sums["x"][layer] = y`, ...
Sums = MutableMapping[str, Tensor]
DTYPES = ("float64", "float32")
JOINS = ("sum", "max")
HELD = ("heads", "output", "batch", "part", "alike")


@dataclass(frozen=True)
class Accumulator:
    """Memory on the device that a tap adds to.

    `axes` are its dimensions: "layer" (first), "head", or names of the quantity's own `axes`. () is one number. A layer
    with fewer heads than the widest uses the first ones, and the others stay as they began.

    `held` says what the ranks that share one batch (tensor parallelism) have of it, so that joining counts all once.
    Ranks with batches of their own always add up; nothing here matters on one process.

    * "heads": sums over the attention heads that this rank holds ("layer" is the first axis);
    * "output": sums over a block's output or the gradient there, which ranks hold alike or have split by positions;
    * "batch": from inputs, logits or loss, alike on all ranks of a batch;
    * "part": this rank's own part of a whole, such as the squares of its shards; see `Parameters.squares`;
    * "alike": every rank has the same number, and it is that of the whole: rank 0's counts.

    Raises:
        ValueError: names the field, what came and what is accepted.
    """

    axes: str | tuple[str, ...] = ("layer",)  # a tuple from then on
    dtype: str = "float64"  # float32 is for what needs no more than seven digits: the memory is copied every step
    join: str = "sum"  # or "max"
    held: str = "batch"
    # Sums of this power of gradients, which the monitor divides by (loss scale * number of batches of the step's ranks)
    # to that power; with held="part" by the loss scale alone. 0: no gradients.
    gradient_power: int = 0

    def __post_init__(self):
        object.__setattr__(self, "axes", (self.axes,) if isinstance(self.axes, str) else tuple(self.axes))
        for field, accepted in (("dtype", DTYPES), ("join", JOINS), ("held", HELD)):
            if getattr(self, field) not in accepted:
                raise ValueError(f"{field}: expected one of {accepted}, got {getattr(self, field)!r}")
        if len(set(self.axes)) < len(self.axes) or "layer" in self.axes[1:]:
            raise ValueError(f"axes: expected distinct names, 'layer' first, got {self.axes}")
        if self.join == "max" and self.dtype != "float32":
            raise ValueError("dtype: maxima are kept in 'float32'")


# ---- what taps are called with ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredModel:
    """What a quantity may know before the first step; see `Quantity.prepare`."""

    model: nn.Module  # what the training loop calls
    blocks: tuple[Block, ...]  # L blocks in forward order; one module may be several (layers that run repeatedly)
    device: object  # torch.device of the accumulators
    config: Settings  # the MonitorConfig
    ranks: int = 1  # processes that train together
    data_ranks: int = 1  # those, or groups of them, that have a batch of their own


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Statistics of the sampled query rows of `G` layers of equal shape, which all quantities share."""

    layers: tuple[int, ...]  # G
    index: Tensor  # [G] int64, the same on the device of the accumulators
    heads: slice  # where the H heads stand on the accumulators' axis "head": sums["x"][:, rows.heads]
    stats: Sequence[AttentionStats]  # G statistics of [B, H, R] float32, R sampled rows
    valid: Tensor | None  # [B, R] bool: rows that are tokens, not padding; None: all
    ignored: Tensor  # [G, B, H, R] bool: rows that do not count, being padding or without any key
    # [R] float64: query positions that each sampled row stands for. Summed over B and, so weighted, over R, a value of
    # a row is an estimate of its sum over all valid query rows.
    weights: Tensor
    difference_weights: Tensor  # [R - 1] float64 of squared differences between neighbours; empty: all rows are there

    def stacked(self, *names: str) -> Tensor:
        """[len(names), G, B, H, R]: those statistics of all layers, in new memory on the accumulators' device."""
        flat = torch.stack([getattr(one, name).to(self.index.device) for name in names for one in self.stats])
        return flat.unflatten(0, (len(names), len(self.stats)))

    def over_batch(self, values: Tensor) -> Tensor:
        """[..., G, H, R] float64: `values` [..., G, B, H, R] summed over the sequences in which the row counts."""
        # Filled, not multiplied: what padding holds may be NaN.
        return values.masked_fill(self.ignored, 0.0).sum(-3).double()

    def counted(self) -> Tensor:
        """[G, H, R] float64: the number of sequences in which a row counts."""
        return (self.ignored.shape[1] - self.ignored.sum(1)).double()

    def total(self, values: Tensor) -> Tensor:
        """[..., G, H] float64: the sum of `values` [..., G, B, H, R] over all valid query rows."""
        return self.over_batch(values) @ self.weights

    def number(self) -> Tensor:
        """[G, H] float64: how many valid query rows there are, of all sequences."""
        return self.counted() @ self.weights


@dataclass(frozen=True, eq=False)
class AttentionSeen:
    """One call of attention by one layer, with the tensors that it attends with."""

    layer: int
    heads: slice  # as in `AttentionRows`
    call: Call
    rows: Tensor | None  # [R] int64, the sampled query positions; None: all of them
    stats: AttentionStats  # of those rows, [B, H, R] float32
    valid: Tensor | None  # [B, R] bool; None: all
    weights: Tensor  # [R] float64


@dataclass(frozen=True, eq=False)
class BlockForward:
    """What went into a block and what came out of it."""

    layer: int
    input: Tensor | None  # [B, T, D], the hidden state; None where the block was given none
    output: Tensor  # [B, T, D] as a rule: the first floating-point tensor that the block returned
    tokens: Tensor | None  # [B, T] bool, True at tokens; None: all, or nobody knows
    module: nn.Module
    micro_batch: int  # of the step, from 0


@dataclass(frozen=True, eq=False)
class SubmoduleForward:
    """A forward of a module inside a block that `Quantity.submodules` asked for."""

    layer: int
    name: str  # the key in what `submodules` returned
    module: nn.Module
    args: tuple  # what it was called with; not detached
    kwargs: dict
    output: object  # what it returned; not detached
    tokens: Tensor | None  # [B, T] bool, as in `BlockForward`


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """The gradient of the loss with respect to a block's output, in one micro-batch. Loss scales are still in it."""

    layer: int
    gradient: Tensor  # [B, T, D] as a rule
    micro_batch: int
    # Of how many sequences `gradient` holds the gradients of a random sample, [n, T, D]; None: it holds all. Only where
    # all that listen `take_samples`; see MonitorConfig.frozen_share.
    sequences: int | None = None


@dataclass(frozen=True, eq=False)
class ParameterGradient:
    """The gradient of one parameter in one micro-batch, before it is added to `parameter.grad` and before DDP's mean.

    Only parameters inside blocks, each once, for the first layer that has it. Under FSDP2 `parameter` is the shard that
    the model has, and `gradient` whole. Loss scales are still in it.
    """

    layer: int
    name: str  # inside the block
    parameter: nn.Parameter
    gradient: Tensor
    micro_batch: int
    # What its squares count for in a sum over the ranks of one batch: 1 / their number where all of them hold it.
    share: float = 1.0


class Parameters(Protocol):
    """The parameters of the blocks, each once, for the first layer that has it."""

    layers: tuple[int, ...]
    names: tuple[str, ...]  # inside the block
    parameters: tuple[nn.Parameter, ...]  # with `grad`, where there is one, whole over the micro-batches so far

    @property
    def trained(self) -> tuple[int, ...]:
        """Layers with trainable parameters."""

    def gradients(self) -> tuple[list[int], list[str], list[Tensor]]:
        """(layers, names, gradients) of the trainable ones that have a gradient; of a sparse one its values.

        Gradients may be DTensors, as parameters may.
        """

    def squares(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """[L] float64: this rank's part (held="part") of the summed squares of `tensors`, by layer, DTensors or not.

        Over all ranks they add up to the squares of the whole tensors: shards add, what several hold counts once.
        """

    def marked(self, layers: Iterable[int]) -> Tensor:
        """[L] float64 on the device: 1 at `layers`, else 0. Kept from step to step: nothing is copied from the host."""


@dataclass(frozen=True, eq=False)
class Update:
    """An optimizer step, from both sides."""

    parameters: Parameters
    # Those of torch.optim that have stepped on parameters of the model; empty before the step, or if it was another
    # kind of optimizer or a scaler skipped the step. Their `state` and `param_groups` are what they keep.
    optimizers: tuple[Optimizer, ...]


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What the model was called with and what it returned, in one micro-batch."""

    inputs: dict  # arguments of the model's forward by name
    output: object  # as it was returned; not detached
    logits: Tensor | None  # [..., classes], what it returned under that name, else None
    labels: Tensor | None  # what it was given under that name, else None
    loss: Tensor | None  # [] what it returned under that name, else None
    tokens: Tensor | None  # [B, T] bool; None: all, or nobody knows
    micro_batch: int
    untold_padding: bool = False  # there was a mask of tokens, and some attention whose rows it does not fit


@dataclass(frozen=True, eq=False)
class ProbeFeatures:
    """What a run of the probe set has shown of each block."""

    features: tuple[Tensor, ...]  # L tensors [N, D]: the kept rows of the block's outputs over the whole probe set
    sequences: tuple[Tensor, ...]  # L tensors [N] int64: which sequence of the probe set a row is of
    reference: tuple[Tensor, ...] | None  # the same rows of the reference state; see MonitorConfig.cka_reference
    stacks: tuple[tuple[int, ...], ...]  # layers whose features have equal shapes and rows
    indices: tuple[Tensor, ...]  # the same, each as int64 on the device


# ---- the base class --------------------------------------------------------------------------------------------------


class Quantity:
    """One diagnostic of a model that trains. Subclasses state `name`, `accumulators`, `columns`, taps and `values`.

    An instance holds settings. The monitor works with a shallow copy of its own, made before `prepare`, so that one
    instance may serve several monitors, and what taps keep on `self` belongs to one.
    """

    name: ClassVar[str] = ""  # [a-z][a-z0-9_]*
    # What the taps listen to: "training", the batches that the model trains on; or "probe", the fixed probe set of the
    # Monitor, whenever it is run: in evaluation mode, gradients as far as blocks' outputs, the same rows every time.
    data: ClassVar[str] = "training"
    take_samples: ClassVar[bool] = False  # `on_output_gradient` looks at `OutputGradient.sequences`
    # Its cadence in optimizer steps where MonitorConfig.every is one number; None: that number.
    every: int | None = None
    # Sizes of axes of its own: a number, or the names of the places. May be set in `prepare`.
    axes: Mapping[str, int | Sequence[str]] = {}
    accumulators: Mapping[str, Accumulator] = {}  # may be set in `prepare`
    columns: Mapping[str, Column] = {}  # may be set in `prepare`

    def prepare(self, model: MeasuredModel) -> None:
        """Called once when a monitor is entered, on the monitor's copy: the place for shapes that depend on the model.

        What it sets must be equal on all ranks. `ValueError` refuses the model, in a sentence for the user.
        """

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The columns, from the accumulators as they are for the whole step, joined over micro-batches and ranks.

        Runs on the host in the monitor's thread, with NumPy's warnings about invalid numbers off. `sums` are float64.
        A column that is not in the result has no value; nor has a place where its `count` is 0, whatever is returned.
        """
        raise NotImplementedError(f"quantity {self.name!r}: values() turns its sums into its columns")

    # ---- taps: override those that are needed ------------------------------------------------------------------------

    def on_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """Statistics of attention rows, for several layers at once. `held` of what follows from them is "heads"."""

    def on_cross_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """As `on_attention`, of attention to the output of another stack (decoders of T5, BART, Whisper)."""

    def on_attention_call(self, sums: Sums, seen: AttentionSeen) -> None:
        """One call of attention, while its tensors are there. `held` is "heads"."""

    def on_block(self, sums: Sums, block: BlockForward) -> None:
        """After the forward of a block. `held` is "output"."""

    def submodules(self, block: Block) -> Mapping[str, nn.Module]:
        """Which modules inside `block` call `on_submodule`, by a name of the quantity's choice: routers, MLPs, ..."""
        return {}

    def on_submodule(self, sums: Sums, seen: SubmoduleForward) -> None:
        """After the forward of a module that `submodules` asked for."""

    def on_model_output(self, sums: Sums, output: ModelOutput) -> None:
        """After the forward of the model. `held` is "batch"."""

    def on_output_gradient(self, sums: Sums, seen: OutputGradient) -> None:
        """When a gradient arrives at a block's output. Writes, does not add. `held` is "output"."""

    def on_parameter_gradient(self, sums: Sums, seen: ParameterGradient) -> None:
        """When backward has the gradient of a parameter of a block. Writes, does not add. `held` is "part"."""

    def on_backward_end(self, sums: Sums, parameters: Parameters) -> None:
        """After a backward pass, when `grad` of all parameters is complete and not yet clipped. Writes."""

    def before_update(self, sums: Sums, update: Update) -> None:
        """In `Monitor.step`: gradients and loss scale are as the optimizer will find them, before clipping or after."""

    def after_update(self, sums: Sums, update: Update) -> None:
        """After the optimizer has stepped: before the next forward, `Monitor.step` or `Monitor.close`.

        A step in which some quantity listens to this is appended to the timeline only then.
        """

    def on_probe(self, sums: Sums, probe: ProbeFeatures) -> None:
        """After a run of the probe set. `held` is "alike"."""

    def later(self, sums: Sums, finish: Callable[..., None], *tensors: Tensor) -> None:
        """Leave work that would wait for a device, such as eigenvalues, to the thread that finishes rows.

        For taps of the probe set and of the whole step. `finish(sums, *tensors)` gets the sums of the step and copies
        on the host. `tensors` are not written to any more. Without a monitor it is called at once.
        """
        finish(sums, *tensors)

    # ---- slow work on parameters, in a thread of its own -------------------------------------------------------------

    def wants(self, layer: int, name: str, parameter: nn.Parameter) -> bool:
        """Whether `in_background` looks at a parameter of a block; each counts once, for the first layer with it."""
        return False

    def in_background(self, layer: int, name: str, weight: Tensor) -> Mapping[str, np.ndarray]:
        """What a parameter adds to the accumulators: arrays of their shapes, by name. `held` is "part".

        Called in a thread of the lowest importance with a copy of the whole weight on the host, as it was at a step at
        which the quantity was due. Ranks divide the parameters among them. The result is in the next measured step
        after it is done. `weight` may be changed.
        """
        raise NotImplementedError(f"quantity {self.name!r}: in_background() measures what wants() asks for")
