"""What a fixed probe set shows of each block: delta-CKA against a reference state, entropy, activation gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import Block, find_blocks
from .arguments import loss_of
from .config import MonitorConfig
from .distributed import Layout, full_of, reshard
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
        self._rows: dict[tuple, Tensor | None] = {}  # which rows of which output: the same in every run
        self._reference: list[Tensor] | None = None

    def remember(self) -> None:
        """Take the model as it is now for the reference; with "adapters_off" there is nothing to store."""
        if self._config.cka_reference == "start":
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
        """Run the probe set once and write what the configuration asks for into `packet`."""
        if self.taps is None:
            features = self._features()
        else:
            self.taps.attach(0)  # the same query rows every time
            try:
                features = self._features(self.taps)
            finally:
                self.taps.detach()
        signals = self._config.signals
        if "delta_cka" in signals:
            packet["delta_cka"].copy_(self.delta_cka(features))
            packet["delta_cka_count"].fill_(1)
        if "probe_entropy" in signals:
            packet["probe_attention"].copy_(self.taps.packet["attention"][:2])
        if "probe_activation_grad" in signals:
            packet["probe_activation_squares"].copy_(self.taps.activations.squares())
            packet["probe_activation_count"].copy_(self.taps.activations.counts())

    def delta_cka(self, features: list[Tensor] | None = None) -> Tensor:
        """[L] float32: 1 - CKA between the reference and the model as it is now, or as `features` were measured."""
        after = self._features() if features is None else features
        before = self._reference
        if before is None:
            with _trainable_as_before(self._model), _peft_of(self._model).disable_adapter():
                before = self._features()
        groups: dict[tuple, list[int]] = {}
        for layer, features in enumerate(after):
            groups.setdefault(features.shape, []).append(layer)
        delta = torch.empty(len(after), device=self._device)
        for layers in groups.values():
            x, y = (torch.stack([features[layer] for layer in layers]) for features in (before, after))
            delta[layers] = ops.delta_cka(x, y, rank=self._config.cka_rank, debiased=self._config.cka_debiased)
        return delta

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _features(self, taps: Taps | None = None) -> list[Tensor]:
        """Per layer [N, D]: the kept rows of the block's output over the whole probe set, and what `taps` see of it."""
        kept: list[list[Tensor]] = [[] for _ in self._blocks]
        with _undisturbed(self._model, self._device, autograd=taps is not None):
            for number, batch in enumerate(self._batches):
                inputs = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with _outputs_of(self._blocks) as outputs:
                    returned = self._model(**inputs)
                if taps is not None:
                    _backward_to(outputs.values(), loss_of(returned))
                for layer in range(len(self._blocks)):
                    if layer not in outputs:
                        raise ValueError(f"probe: block {self._blocks[layer].name!r} did not run on batch {number}")
                    tokens = token_mask(inputs, layer in self._decoders)
                    taken = sum(len(rows) for rows in kept[layer])
                    kept[layer].append(self._rows_of(full_of(outputs.pop(layer).detach()), tokens, number, taken))
        features = [torch.cat(rows) for rows in kept]
        few = [block.name for block, rows in zip(self._blocks, features, strict=True) if len(rows) < _MIN_ROWS]
        if few:
            raise ValueError(f"probe: gives fewer than {_MIN_ROWS} feature rows in {few}; CKA needs at least as many")
        return features

    def _rows_of(self, output: Tensor, tokens: Tensor | None, number: int, taken: int) -> Tensor:
        """The rows of one output [B, T, D] that are kept, [n, D], when `taken` rows of earlier batches are."""
        if output.dim() != 3:
            raise ValueError(f"probe: expected block outputs [B, T, D], got shape {tuple(output.shape)}")
        if tokens is None or tokens.shape != output.shape[:2]:
            tokens = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        rows = _POOLED[self._config.cka_pooling](output, tokens.to(output.device).bool())
        # What earlier batches left of the budget is shared among those still to come. Layers of one stack come here
        # with the same rows, so they keep the same ones.
        share = -(-(self._config.cka_rows - taken) // (len(self._batches) - number))
        key = (number, len(rows), share)
        if key not in self._rows:
            self._rows[key] = self._draw(number, len(rows), share)
        return rows if self._rows[key] is None else rows[self._rows[key].to(rows.device)]

    def _draw(self, number: int, count: int, share: int) -> Tensor | None:
        if count <= share:
            return None
        generator = torch.Generator().manual_seed(self._config.seed + number)
        return torch.randperm(count, generator=generator)[:share].sort().values.to(self._device)


# ---- features of one output [B, T, D], its valid tokens [B, T] -------------------------------------------------------


def _every_token(output: Tensor, tokens: Tensor) -> Tensor:
    return output[tokens]


def _mean_token(output: Tensor, tokens: Tensor) -> Tensor:
    weights = tokens.float() / tokens.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("btd,bt->bd", output.float(), weights)


def _first_token(output: Tensor, tokens: Tensor) -> Tensor:
    return output[torch.arange(len(output), device=output.device), tokens.int().argmax(1)]


def _last_token(output: Tensor, tokens: Tensor) -> Tensor:
    last = tokens.shape[1] - 1 - tokens.flip(1).int().argmax(1)
    return output[torch.arange(len(output), device=output.device), last]


_POOLED = {"tokens": _every_token, "mean": _mean_token, "first": _first_token, "last": _last_token}


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
    eager = torch.compiler.set_stance("force_eager")  # code that was compiled before would not run the hooks
    with torch.random.fork_rng(devices=generators), torch.set_grad_enabled(autograd), eager:
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
