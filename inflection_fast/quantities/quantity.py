"""The base class of a diagnostic: its taps, its accumulators, and its columns.

A quantity is a subclass of `Quantity`. It overrides the taps that it needs; the model gets hooks for these alone. Its
accumulators are views of one piece of memory on the device, which holds the sums of all quantities of a measured step.
Taps write to them in place. The monitor joins the sums of micro-batches and ranks, copies them to the host at once,
and calls `values` in a thread for which the training does not wait. Memory, joining, timeline, alerts and report follow
from the declaration.

Rules for taps, which run during the training:

* They write to accumulators in place (`add_`, `copy_`, `index_add_`, `sums["x"][layer] = ...`), by operations on the
  device. No shape depends on the batch, and nothing synchronises: no `.item()`, `.cpu()`, `bool(tensor)`, `nonzero()`.
  Write a Python number by `fill_` or add it by `+=`; `sums["x"][layer] = 1` would copy it to the device.
* They get detached tensors under `torch.no_grad()`, of sharded ones this rank's part, and must not change them.
* If a tap raises, its quantity has no values in this step, and one warning is logged. The others go on.
* **Pieces.** A micro-batch is a forward of the model under autograd and the backward pass that follows. Each has
  accumulators of its own, which start at 0 (sum) or -inf (max), and does not count without a backward pass. So a tap
  sums, or takes the maximum, over its calls in one micro-batch.
* **Once.** `on_attention`, `on_attention_call`, `on_block`, `on_submodule` and `on_model_output` are called in the
  forward alone, once for each call, also if activation checkpointing runs a block again. `on_output_gradient` and
  `on_parameter_gradient` may be called again for the same layer, if two backward passes go through one graph: they
  write (`sums["squares"][layer] = ...`) instead of adding, and the last call counts.
* `on_backward_end`, `before_update`, `after_update` and `on_probe` get the whole step, not a piece. `on_backward_end`
  is called after every backward pass, with gradients accumulated so far: it writes, and the last call counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..timeline.columns import AlertRule, Column
from .calls import AttentionCall, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..blocks import Block
    from ..ops import AttentionStats

__all__ = [
    "Accumulator", "AlertRule", "AttentionRows", "AttentionSeen", "BlockForward", "Column", "MeasuredModel",
    "ModelOutput", "OutputGradient", "ParameterGradient", "Parameters", "ProbeFeatures", "Quantity",
    "SubmoduleForward", "Sums", "Update",
]  # fmt: skip

# The accumulators of a quantity by name, written in place: `sums["x"] += y`, `sums["x"][layer] = y`, ...
Sums = MutableMapping[str, Tensor]
DTYPES = ("float64", "float32")
JOINS = ("sum", "max")
HELD = ("heads", "output", "batch", "part", "alike")


@dataclass(frozen=True)
class Accumulator:
    """Memory on the device that a tap adds to.

    `axes` are its dimensions: "layer" (first), "head", or names of the quantity's own `axes`. () is one number. A layer
    with fewer heads than the widest uses the first ones; the others keep their initial values.

    `held` says which part of it each rank of one batch (tensor parallelism) has, so that joining counts all once.
    Ranks with different batches always add. On one process it has no effect.

    * "heads": sums over the attention heads that this rank holds ("layer" is the first axis);
    * "output": sums over a block's output or its gradient, which are equal on all ranks or split by positions;
    * "batch": from inputs, logits or loss, equal on all ranks of a batch;
    * "part": this rank's part of a whole, such as the squares of its shards; see `Parameters.squares`;
    * "alike": every rank has the value of the whole; that of rank 0 counts.

    Raises:
        ValueError: names the field, what came and what is accepted.
    """

    axes: str | tuple[str, ...] = ("layer",)  # a tuple from then on
    dtype: str = "float64"  # or "float32", if seven digits are enough: the memory is copied in every measured step
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


# ---- arguments of taps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredModel:
    """The model and settings, before the first step; see `Quantity.prepare`."""

    model: nn.Module  # what the training loop calls
    blocks: tuple[Block, ...]  # L blocks in forward order; one module may be several (layers that run repeatedly)
    device: object  # torch.device of the accumulators
    config: Settings  # the MonitorConfig
    ranks: int = 1  # processes that train together
    data_ranks: int = 1  # processes, or groups of them, with a batch of their own


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Statistics of the sampled query rows of `G` layers of equal shape."""

    layers: tuple[int, ...]  # G
    index: Tensor  # [G] int64, the same on the device of the accumulators
    heads: slice  # the H heads on the axis "head" of accumulators: sums["x"][:, rows.heads]
    stats: Sequence[AttentionStats]  # G statistics of [B, H, R] float32, R sampled rows
    valid: Tensor | None  # [B, R] bool: rows that are tokens, not padding; None: all
    ignored: Tensor  # [G, B, H, R] bool: rows that do not count, being padding or without any key
    # [R] float64: the number of query positions that each sampled row represents. The sum over B and the weighted sum
    # over R estimate the sum over all valid query rows.
    weights: Tensor
    difference_weights: Tensor  # [R - 1] float64, of squared differences between neighbours; empty: all rows

    def stacked(self, *names: str) -> Tensor:
        """[len(names), G, B, H, R]: these statistics of all layers, in new memory on the accumulators' device."""
        flat = torch.stack([getattr(one, name).to(self.index.device) for name in names for one in self.stats])
        return flat.unflatten(0, (len(names), len(self.stats)))

    def over_batch(self, values: Tensor) -> Tensor:
        """[..., G, H, R] float64: `values` [..., G, B, H, R] summed over the sequences in which the row counts."""
        # Filled, not multiplied: padding may be NaN.
        return values.masked_fill(self.ignored, 0.0).sum(-3).double()

    def counted(self) -> Tensor:
        """[G, H, R] float64: the number of sequences in which a row counts."""
        return (self.ignored.shape[1] - self.ignored.sum(1)).double()

    def total(self, values: Tensor) -> Tensor:
        """[..., G, H] float64: the sum of `values` [..., G, B, H, R] over all valid query rows."""
        return self.over_batch(values) @ self.weights

    def number(self) -> Tensor:
        """[G, H] float64: the number of valid query rows of all sequences."""
        return self.counted() @ self.weights


@dataclass(frozen=True, eq=False)
class AttentionSeen:
    """One attention call of one layer, with its tensors."""

    layer: int
    heads: slice  # as in `AttentionRows`
    call: AttentionCall
    rows: Tensor | None  # [R] int64, the sampled query positions; None: all of them
    stats: AttentionStats  # of those rows, [B, H, R] float32
    valid: Tensor | None  # [B, R] bool; None: all
    weights: Tensor  # [R] float64


@dataclass(frozen=True, eq=False)
class BlockForward:
    """Input and output of a block."""

    layer: int
    input: Tensor | None  # [B, T, D], the hidden state; None: there is none, or it was changed in place
    output: Tensor  # [B, T, D] as a rule: the first floating-point tensor that the block returned
    tokens: Tensor | None  # [B, T] bool, True at tokens; None: all, or not known
    module: nn.Module
    micro_batch: int  # of the step, from 0


@dataclass(frozen=True, eq=False)
class SubmoduleForward:
    """A forward of a module inside a block that `Quantity.submodules` asked for."""

    layer: int
    name: str  # the key in what `submodules` returned
    module: nn.Module
    args: tuple  # not detached
    kwargs: dict
    output: object  # not detached
    tokens: Tensor | None  # [B, T] bool, as in `BlockForward`


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """The gradient of the loss with respect to a block's output, in one micro-batch. Loss scales are still in it."""

    layer: int
    gradient: Tensor  # [B, T, D] as a rule
    micro_batch: int
    # The number of sequences that `gradient` [n, T, D] is a random sample of; None: it has all. Only if all quantities
    # that listen `take_samples`; see MonitorConfig.frozen_share.
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
    # Weight of its squares in a sum over the ranks of one batch: 1 / their number if all hold it.
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
        """[L] float64 on the device: 1 at `layers`, else 0; cached, without a copy from the host."""


@dataclass(frozen=True, eq=False)
class Update:
    """An optimizer step, before or after it."""

    parameters: Parameters
    # The torch optimizers that have stepped on parameters of the model; empty before the step, for other kinds of
    # optimizers, or if a scaler skipped the step.
    optimizers: tuple[Optimizer, ...]


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Inputs and output of the model in one micro-batch."""

    inputs: dict  # arguments of the model's forward by name
    output: object  # not detached
    logits: Tensor | None  # [..., classes], the output of that name
    labels: Tensor | None  # the input of that name
    loss: Tensor | None  # [], the output of that name
    tokens: Tensor | None  # [B, T] bool; None: all, or not known
    micro_batch: int
    untold_padding: bool = False  # the mask of tokens does not fit the rows of some attention


@dataclass(frozen=True, eq=False)
class ProbeFeatures:
    """Features of each block from a run of the probe set."""

    features: tuple[Tensor, ...]  # L tensors [N, D]: the kept rows of the block's outputs over the whole probe set
    sequences: tuple[Tensor, ...]  # L tensors [N] int64: the sequence of each row
    reference: tuple[Tensor, ...] | None  # the same rows of the reference state; see MonitorConfig.cka_reference
    stacks: tuple[tuple[int, ...], ...]  # layers whose features have equal shapes and rows
    indices: tuple[Tensor, ...]  # the same, each as int64 on the device


# ---- the base class --------------------------------------------------------------------------------------------------


class Quantity:
    """A diagnostic of a model during training. Subclasses define `name`, `accumulators`, `columns`, taps and `values`.

    An instance has settings. Each monitor uses a shallow copy, made before `prepare`, so one instance may serve several
    monitors, and attributes that taps set belong to one monitor.
    """

    name: ClassVar[str] = ""  # [a-z][a-z0-9_]*
    # The data for the taps: "training", the batches that the model trains on; or "probe", runs of the Monitor's fixed
    # probe set: in evaluation mode, gradients down to blocks' outputs, the same rows every time.
    data: ClassVar[str] = "training"
    take_samples: ClassVar[bool] = False  # `on_output_gradient` uses `OutputGradient.sequences`
    # Its cadence in optimizer steps where MonitorConfig.every is one number; None: that number.
    every: int | None = None
    # Sizes of axes of its own: a number, or the names of the places. May be set in `prepare`.
    axes: Mapping[str, int | Sequence[str]] = {}
    accumulators: Mapping[str, Accumulator] = {}  # may be set in `prepare`
    columns: Mapping[str, Column] = {}  # may be set in `prepare`

    def prepare(self, model: MeasuredModel) -> None:
        """Called once when a monitor is created, on its copy: for shapes that depend on the model.

        Attributes must be equal on all ranks. Raise `ValueError` with a sentence for the user to refuse the model.
        """

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The columns, from the accumulators of the whole step, joined over micro-batches and ranks.

        Runs on the host in the monitor's thread, without NumPy's warnings about invalid numbers. `sums` are float64.
        A column that is not returned has no value, and neither have places where its `count` is 0.
        """
        raise NotImplementedError(f"quantity {self.name!r}: values() turns its sums into its columns")

    # ---- taps: override those that are needed ------------------------------------------------------------------------

    def on_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """Statistics of attention rows, for several layers at once. `held` of what follows from them is "heads"."""

    def on_cross_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """As `on_attention`, of attention to the output of another stack (decoders of T5, BART, Whisper)."""

    def on_attention_call(self, sums: Sums, seen: AttentionSeen) -> None:
        """One attention call, with its tensors. `held` is "heads"."""

    def on_block(self, sums: Sums, block: BlockForward) -> None:
        """After the forward of a block. `held` is "output"."""

    def submodules(self, block: Block) -> Mapping[str, nn.Module]:
        """The modules inside `block` that call `on_submodule`, by any name: routers, MLPs, ..."""
        return {}

    def on_submodule(self, sums: Sums, seen: SubmoduleForward) -> None:
        """After the forward of a module that `submodules` asked for."""

    def on_model_output(self, sums: Sums, output: ModelOutput) -> None:
        """After the forward of the model. `held` is "batch"."""

    def on_output_gradient(self, sums: Sums, seen: OutputGradient) -> None:
        """When the gradient of a block's output is computed. Writes, does not add. `held` is "output"."""

    def on_parameter_gradient(self, sums: Sums, seen: ParameterGradient) -> None:
        """When the gradient of a parameter of a block is computed. Writes, does not add. `held` is "part"."""

    def on_backward_end(self, sums: Sums, parameters: Parameters) -> None:
        """After a backward pass, when `grad` of all parameters is complete and not yet clipped. Writes."""

    def before_update(self, sums: Sums, update: Update) -> None:
        """In `Monitor.step`, with the gradients of that time, before or after clipping."""

    def after_update(self, sums: Sums, update: Update) -> None:
        """After the optimizer has stepped: before the next forward, `Monitor.step` or `Monitor.close`.

        A step with such a quantity is appended to the timeline only then.
        """

    def on_probe(self, sums: Sums, probe: ProbeFeatures) -> None:
        """After a run of the probe set. `held` is "alike"."""

    def later(self, sums: Sums, finish: Callable[..., None], *tensors: Tensor) -> None:
        """Do work that would wait for a device, such as eigenvalues, in the recorder's thread.

        For taps of the probe set and of the whole step. `finish(sums, *tensors)` gets the sums of the step and copies
        on the host; `tensors` must not be changed afterwards. Without a monitor it is called at once.
        """
        finish(sums, *tensors)

    # ---- slow work on parameters, in a thread of its own -------------------------------------------------------------

    def wants(self, layer: int, name: str, parameter: nn.Parameter) -> bool:
        """Whether `in_background` measures a parameter of a block; a shared one belongs to its first layer."""
        return False

    def in_background(self, layer: int, name: str, weight: Tensor) -> Mapping[str, np.ndarray]:
        """Arrays to add to the accumulators, of their shapes, by name. `held` is "part".

        Called in a thread of the lowest priority with a copy of the whole weight on the host, from a step at which the
        quantity was due. Ranks divide the parameters among them. The result is in the next measured step after it is
        ready. `weight` may be changed.
        """
        raise NotImplementedError(f"quantity {self.name!r}: in_background() measures what wants() asks for")
