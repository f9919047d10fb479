"""How far each block's features have moved on a fixed probe set: delta-CKA against a reference state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import Block
from .config import MonitorConfig
from .distributed import full_of, reshard
from .rows import decoder_layers, token_mask

__all__ = ["Probe"]

_MIN_ROWS = 4  # debiased CKA is undefined below


class Probe:
    """Runs the probe set and compares the blocks' outputs with those of the reference state.

    A probe run leaves no trace: evaluation mode without autograd, every training flag and the state of the random
    generators restored. Which rows of the features are kept is drawn once, from the seed.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[dict], config: MonitorConfig):
        if isinstance(batches, (dict, Tensor)) or not all(isinstance(batch, dict) for batch in batches) or not batches:
            raise TypeError("probe: expected a list of model inputs (dicts of tensors), at least one")
        if config.cka_reference == "adapters_off" and not hasattr(_peft_of(model), "disable_adapter"):
            raise ValueError(f"cka_reference: 'adapters_off' needs a peft model, got {type(model).__name__}")
        self._model, self._blocks, self._batches, self._config = model, blocks, batches, config
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

    def delta_cka(self) -> Tensor:
        """[L] float32: 1 - CKA between the reference and the model as it is now."""
        after = self._features()
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

    def _features(self) -> list[Tensor]:
        """Per layer [N, D]: the kept rows of the block's output over the whole probe set."""
        kept: list[list[Tensor]] = [[] for _ in self._blocks]
        with _undisturbed(self._model, self._device):
            for number, batch in enumerate(self._batches):
                inputs = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with _outputs_of(self._blocks) as outputs:
                    self._model(**inputs)
                for layer in range(len(self._blocks)):
                    if layer not in outputs:
                        raise ValueError(f"probe: block {self._blocks[layer].name!r} did not run on batch {number}")
                    tokens = token_mask(inputs, layer in self._decoders)
                    taken = sum(len(rows) for rows in kept[layer])
                    kept[layer].append(self._rows_of(outputs.pop(layer), tokens, number, taken))
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


# ---- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), torch.no_grad():
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
                outputs[layer] = full_of(output if isinstance(output, Tensor) else output[0])

            stack.callback(block.module.register_forward_hook(keep).remove)
        yield outputs


def _peft_of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
