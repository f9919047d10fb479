"""What a fixed probe set shows of each block: delta-CKA against a reference state, entropy, activation gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import Block, find_blocks
from ..ops.cka_rows import POOLED, RowSample, feature_rows
from .accumulators import LayerIndices
from .arguments import loss_of
from .config import MonitorConfig
from .distributed import Layout, full_of, reshard
from .eagerly import eagerly
from .packet import Packet
from .rows import decoder_layers, token_mask
from .taps import Taps

__all__ = ["Probe"]

_TAPPED = {"probe_entropy": "attention", "probe_activation_grad": "activation_grad"}  # as taps call them
_MIN_ROWS = 4  # debiased CKA is undefined below


class Probe:
    """Runs the probe set and compares the blocks' outputs with those of the reference state.

    A probe run leaves no trace: evaluation mode, every training flag and the state of the random generators restored.
    Only where gradients are asked for does autograd run, from the loss that the model returns for the probe's labels to
    the blocks' outputs and no further: no `grad`, no gradient scaler and no bucket of DistributedDataParallel is met.
    Which rows of the features are kept is drawn once, from the seed.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[dict], config: MonitorConfig):
        if isinstance(batches, (dict, Tensor)) or not all(isinstance(batch, dict) for batch in batches) or not batches:
            raise TypeError("probe: expected a list of model inputs (dicts of tensors), at least one")
        if config.cka_reference == "adapters_off" and not hasattr(_peft_of(model), "disable_adapter"):
            raise ValueError(f"cka_reference: 'adapters_off' needs a peft model, got {type(model).__name__}")
        # Without its wrapper: DistributedDataParallel would broadcast, and prepare its buckets for a backward pass.
        model = _peft_of(model)
        blocks = find_blocks(model, [block.name for block in blocks])
        self._model, self._blocks, self._batches, self._config = model, blocks, batches, config
        tapped = [_TAPPED[signal] for signal in config.signals if signal in _TAPPED]
        self.taps = Taps(model, find_blocks(model, config.blocks), tapped, config.rows, config.seed) if tapped else None
        self._decoders = decoder_layers(model, blocks)
        self._device = next(model.parameters()).device
        self._sample = RowSample(config.cka_rows, len(batches), config.seed)
        self._sequences: list[Tensor] = []  # per layer [N], which sequence of the probe set a row is of
        # By batch, stack of layers and shape: which rows are kept, and of which sequence each is. The probe does not
        # change, and to count its tokens again would wait for the device.
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._indices = LayerIndices(self._device)
        self._reference: list[Tensor] | None = None

    def remember(self) -> None:
        """Take the model as it is now for the reference; with "adapters_off" there is nothing to store."""
        if self._config.cka_reference != "adapters_off":
            self._reference = self._features()

    def save(self, path: Path) -> None:
        """Write the reference for a resumed run, atomically, as plain float32 arrays."""
        if self._reference is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.tmp")
        try:
            with open(fresh, "wb") as file:
                np.savez(file, *(features.float().cpu().numpy() for features in self._reference))
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take the reference that an earlier run saved. `ValueError` if it is of other blocks or another probe."""
        if self._config.cka_reference != "start":
            return
        now = self._features()
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = [file[name] for name in file.files]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: the probe's reference features cannot be read ({error})") from error
        if [array.shape for array in arrays] != [features.shape for features in now]:
            raise ValueError(f"{path} holds reference features of another probe or of other blocks")
        self._reference = [torch.from_numpy(array).to(one) for array, one in zip(arrays, now, strict=True)]

    def share(self, layout: Layout, sharded_outputs: set[int]) -> None:
        """Measure as one of several ranks, all of which run the whole probe; `sharded_outputs` as in `Taps`."""
        if self.taps is not None:
            self.taps.share(replace(layout, world=layout.tensor, data=1, data_rank=0))
            self.taps.sharded_outputs = sharded_outputs

    def measure(self, packet: Packet) -> None:
        """Run the probe set once and write what the configuration asks for, and what it took, into `packet`."""
        started = perf_counter()
        if self.taps is None:
            features = self._features()
        else:
            self.taps.write_probe_into(packet)
            self.taps.attach(0)  # the same query rows every time
            try:
                features = self._features(self.taps)
            finally:
                self.taps.detach()
        signals = self._config.signals
        if "delta_cka" in signals:
            for name, values in self._compared(features).items():
                packet[name].copy_(values)
                packet[f"{name}_count"].fill_(1)
        if "probe_activation_grad" in signals:
            packet["probe_activation_squares"].copy_(self.taps.activations.squares())
            packet["probe_activation_count"].copy_(self.taps.activation_counts())
        packet["probe_ms"].fill_(1e3 * (perf_counter() - started))
        packet["probe_ms_count"].fill_(1)

    def delta_cka(self) -> Tensor:
        """[L] float32: 1 - CKA between the reference and the model as it is now."""
        return self._compared(self._features())["delta_cka"]

    def _compared(self, after: list[Tensor]) -> dict[str, Tensor]:
        """`delta_cka` [L] of the features of now, and where it is asked for its standard error `delta_cka_se` [L]."""
        before = self._reference
        if before is None:
            with _trainable_as_before(self._model), _peft_of(self._model).disable_adapter():
                before = self._features()
        if self._config.cka_reference == "previous":
            self._reference = after
        groups: dict[tuple, list[int]] = {}
        for layer, features in enumerate(after):
            groups.setdefault((features.shape, layer in self._decoders), []).append(layer)
        options = {"rank": self._config.cka_rank, "debiased": self._config.cka_debiased}
        names = ("delta_cka", "delta_cka_se") if self._config.cka_se else ("delta_cka",)
        found = {name: torch.empty(len(after), device=self._device) for name in names}
        for layers in groups.values():
            x, y = (torch.stack([features[layer] for layer in layers]) for features in (before, after))
            if self._config.cka_se:
                result = ops.cka_jackknife(x, y, self._sequences[layers[0]], **options)
                values = {"delta_cka": result.delta, "delta_cka_se": result.standard_error}
            else:
                values = {"delta_cka": ops.delta_cka(x, y, **options)}
            for name, of_layers in values.items():
                found[name].index_copy_(0, self._indices[tuple(layers)], of_layers.to(found[name].dtype))
        return found

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _features(self, taps: Taps | None = None) -> list[Tensor]:
        """Per layer [N, D]: the kept rows of the block's output over the whole probe set, and what `taps` see of it."""
        kept: list[list[Tensor]] = [[] for _ in self._blocks]
        sequences: list[list[Tensor]] = [[] for _ in self._blocks]
        begun = 0  # sequences of earlier batches
        with _undisturbed(self._model, self._device, autograd=taps is not None):
            for number, batch in enumerate(self._batches):
                there = partial(torch.Tensor.to, device=self._device, non_blocking=True)
                inputs = {k: there(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with _outputs_of(self._blocks) as outputs:
                    returned = self._model(**inputs)
                if taps is not None:
                    _backward_to(outputs.values(), loss_of(returned))
                size = 0
                for layer in range(len(self._blocks)):
                    if layer not in outputs:
                        raise ValueError(f"probe: block {self._blocks[layer].name!r} did not run on batch {number}")
                    in_decoder = layer in self._decoders
                    tokens = token_mask(inputs, in_decoder)
                    taken = sum(len(rows) for rows in kept[layer])
                    output = full_of(outputs.pop(layer).detach())
                    size = len(output)
                    rows, of = self._rows_of(output, tokens, number, taken, in_decoder)
                    kept[layer].append(rows)
                    sequences[layer].append(begun + of)
                begun += size
                if number == 0:
                    self._check_memory([rows[0] for rows in kept])
        features = [torch.cat(rows) for rows in kept]
        self._sequences = [torch.cat(numbers) for numbers in sequences]
        few = [block.name for block, rows in zip(self._blocks, features, strict=True) if len(rows) < _MIN_ROWS]
        if few:
            raise ValueError(f"probe: gives fewer than {_MIN_ROWS} feature rows in {few}; CKA needs at least as many")
        return features

    def _check_memory(self, first: list[Tensor]) -> None:
        """Refuse a probe set whose rows of both sides, if all batches are like the first, would not fit."""
        need, have = 2 * len(self._batches) * sum(rows.nbytes for rows in first), ops.memory_bytes(self._device)
        if need > have:
            raise ValueError(
                f"cka_rows: {len(self._batches)} batches with {len(first[0])} rows of {len(first)} blocks take about "
                f"{need} bytes, {self._device} has {have}; ask for fewer rows"
            )

    def _rows_of(
        self, output: Tensor, tokens: Tensor | None, number: int, taken: int, in_decoder: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows of one output [B, T, D] that are kept, [n, D], when `taken` rows of earlier batches are.

        And which sequence of the batch each is of. Layers of one stack come here with the same rows and keep the same.
        """
        if output.dim() != 3:
            raise ValueError(f"probe: expected block outputs [B, T, D], got shape {tuple(output.shape)}")
        pooling = self._config.cka_pooling
        tokens = None if tokens is None or tokens.shape != output.shape[:2] else tokens.to(output.device).bool()
        key = (number, in_decoder, output.shape[:2])
        if key not in self._kept:
            self._kept[key] = self._places_of(output, tokens, number, taken)
        places, sequences = self._kept[key]
        if pooling == "mean":
            tokens = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device) if tokens is None else tokens
            rows = POOLED["mean"](output, tokens)  # one row per sequence
        else:
            rows = output.flatten(0, 1)
        return rows.index_select(0, places.to(rows.device)), sequences.to(rows.device)

    def _places_of(self, output: Tensor, tokens: Tensor | None, number: int, taken: int) -> tuple[Tensor, Tensor]:
        """Which rows of all positions, or with "mean" of all sequences, are kept; and the sequence of each."""
        pooling = self._config.cka_pooling
        positions = torch.arange(output.shape[0] * output.shape[1], device=output.device).view(*output.shape[:2], 1)
        rows, sequences = feature_rows(positions, tokens, pooling)
        places = sequences if pooling == "mean" else rows[:, 0]
        keep = self._sample.keep(number, len(places), taken)
        if keep is None:
            return places, sequences
        keep = keep.to(places.device)
        return places[keep], sequences[keep]


def _backward_to(outputs: Iterable[Tensor], loss: Tensor | None) -> None:
    """Send the gradients of `loss` as far down as to `outputs`, past their hooks and into no parameter's `grad`."""
    outputs = [output for output in outputs if output.requires_grad]
    if loss is not None and loss.requires_grad and outputs:
        torch.autograd.grad(loss, outputs, allow_unused=True)


# ---- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device, autograd: bool) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), torch.set_grad_enabled(autograd), eagerly():
        try:
            for module, _ in training:
                module.training = False  # not model.eval(), which some models turn into more than a flag
            yield
        finally:
            for module, flag in training:
                module.training = flag
            reshard(model)


@contextmanager
def _trainable_as_before(model: nn.Module) -> Iterator[None]:
    # peft marks every active adapter trainable when it switches them on again, frozen ones too.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def _outputs_of(blocks: Sequence[Block]) -> Iterator[dict[int, Tensor]]:
    """The hidden states that the blocks return while the context is open, by layer."""
    outputs = {}
    with ExitStack() as stack:
        for block in blocks:

            def keep(module, args, output, layer=block.index):
                outputs[layer] = output if isinstance(output, Tensor) else output[0]

            stack.callback(block.module.register_forward_hook(keep).remove)
        yield outputs


def _peft_of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
