"""What a fixed probe set shows of each block: its features, beside those of a reference state, attention, gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..atomic import replacing
from ..blocks import Block
from ..ops.cka import RowSample, feature_rows, mean_rows
from ..quantities import Step
from ..quantities.quantity import ProbeFeatures
from .config import MonitorConfig
from .elsewhere import Elsewhere
from .hooks import trainable_as_before, undisturbed
from .micro_batch import decoder_layers, loss_of, token_mask
from .packet import StepSums
from .panel import Panel
from .placements import full_of
from .ranks import Layout
from .schedule import LayerIndices, ProbeBudget, ProbeClock
from .taps import Taps

__all__ = ["REFERENCE_NAME", "Probe"]

logger = logging.getLogger(__name__)

REFERENCE_NAME = "probe_reference.npz"  # in the folder of the timeline

FEWEST_ROWS = 256  # to which `probe_share` thins out what is compared
_MIN_ROWS = 4  # debiased CKA is undefined below
_KEPT = ("start", "previous")  # references that are features of an earlier state


class Probe:
    """Runs the probe set, and tells quantities the blocks' outputs beside those of the reference state.

    A probe run leaves no trace: evaluation mode, every training flag and the state of the random generators restored.
    Only where gradients are asked for does autograd run, from the loss that the model returns for the probe's labels to
    the blocks' outputs and no further: no `grad`, no gradient scaler and no bucket of DistributedDataParallel is met.
    Which rows of the features are kept is drawn once, from the seed.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        batches: Iterable[Mapping] | Mapping,
        config: MonitorConfig,
        panel: Panel,
        heads: int = 1,
        run: Callable[[nn.Module, dict], object] = lambda model, inputs: model(**inputs),
    ):
        batches, self._run = _fixed(batches), run
        if config.cka_reference == "adapters_off" and not hasattr(_peft_of(model), "disable_adapter"):
            raise ValueError(f"cka_reference: 'adapters_off' needs a peft model, got {type(model).__name__}")
        # Without its wrapper: DistributedDataParallel would broadcast, and prepare its buckets for a backward pass.
        if _peft_of(model) is not model:
            model, blocks = _peft_of(model), [replace(one, path=one.path.removeprefix("module.")) for one in blocks]
        self._model, self._blocks, self._batches, self._config = model, blocks, batches, config
        self._panel, listening = panel, panel.for_probe()
        self.taps = None
        self._here = [block.index for block in blocks if not isinstance(block.module, Elsewhere)]
        if listening.quantities and len(self._here) < len(blocks):
            raise ValueError(f"probe: no pipeline shows what {list(listening.quantities)} look at; leave them out")
        if listening.quantities:
            self.taps = Taps(model, blocks, listening, config, heads=heads, counts_all=True)
        self._listening, self._clock = listening, ProbeClock(next(model.parameters()).device)
        self.compares = panel.has("on_probe") or listening.has("on_probe")
        self._decoders = decoder_layers(model, blocks)
        self._device = next(model.parameters()).device
        self._sample = RowSample(config.cka_rows, len(batches), config.seed)
        self._sequences: list[Tensor] = []  # per layer [N], which sequence of the probe set a row is of
        # By batch, stack of layers and shape: which rows are kept, and of which sequence each is. The probe does not
        # change, and to count its tokens again would wait for the device.
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._indices = LayerIndices(self._device)
        self._reference: list[Tensor] | None = None
        self._thinning = 1  # of the rows that are kept, one out of so many is compared
        self._rows_kept = 0

    def begin(
        self,
        folder: Path | None,
        budget: ProbeBudget,
        guarded: Callable[[Callable[[], None]], None],
        *,
        keeps: bool = True,
    ) -> None:
        """Take the reference, or that of the run that goes on in `folder`, before the first step.

        `guarded` runs what writes to the disk. Of several ranks, one `keeps` the reference of its blocks in a file.
        """
        self.budget, resumed, path = budget, budget.first_step > 0, None
        if self.compares and self._config.cka_reference in _KEPT:
            if folder is not None and self._config.cka_reference == "start":
                path = folder / (f"layer{self._here[0]}_{REFERENCE_NAME}" if self._here[0] else REFERENCE_NAME)
            if resumed and path is not None and path.exists():
                self.load(path)
            else:
                if resumed:
                    message = "delta_cka is measured against step %d: no reference of the start is there"
                    logger.warning(message, budget.first_step)
                self.remember()
                if path is not None and keeps:
                    guarded(lambda: self.save(path))
        self._at, self._training_from = budget.first_step - 1, perf_counter()

    def step(self, step: int, sums: StepSums, due: Collection[str], *, forgives: bool) -> None:
        """Run the probe in a training step; what fails costs the values of `due`, or is raised unless it `forgives`."""
        try:
            self._step(step, sums, due)
        except Exception as error:
            if not forgives:
                raise
            for name in due:
                self._panel.fail(name, error, "the probe")

    def _step(self, step: int, sums: StepSums, due: Collection[str]) -> None:
        """Run the probe, and decide when it is run again."""
        step_ms = 1e3 * (perf_counter() - self._training_from) / (step - self._at)
        self.measure(sums, due)
        of_step = sums.packet[Step.name]
        of_step["step_ms"].fill_(step_ms)
        of_step["steps"].fill_(1)
        self._thin_out(step_ms)
        steps = self.budget.run(step, due, self._clock.last_ms + self.budget.later_ms, step_ms)
        of_step["probe_every"].fill_(steps or 0)  # else those that join the ranks' sums know
        self._at, self._training_from = step, perf_counter()

    def _thin_out(self, step_ms: float) -> None:
        """Compare fewer rows from now on, where a run is too long and comparing is most of it: until it is half."""
        forwards_ms = self._clock.last_ms - self._clock.after_ms
        if self.budget.is_over(self._clock.last_ms, step_ms) and self._clock.after_ms > forwards_ms > 0:
            most = max(self._rows_kept // FEWEST_ROWS, 1)
            self._thinning = min(self._thinning * math.ceil(self._clock.after_ms / forwards_ms), most)

    def _thinned(self, event: ProbeFeatures) -> ProbeFeatures:
        """Every n-th row of all that is compared, so that every sequence keeps its share of them."""
        self._rows_kept = min(len(event.features[layer]) for layer in self._here)
        if self._thinning == 1:
            return event
        thin = lambda of: tuple(one[:: self._thinning] for one in of)  # noqa: E731
        reference = None if event.reference is None else thin(event.reference)
        return replace(event, features=thin(event.features), sequences=thin(event.sequences), reference=reference)

    def remember(self) -> None:
        """Take the model as it is now for the reference, where the configuration keeps one."""
        if self._config.cka_reference in _KEPT:
            self._reference = self._features()

    def save(self, path: Path) -> None:
        """Write the reference for a resumed run, atomically, as plain float32 arrays."""
        if self._reference is None:
            return
        with replacing(path) as fresh, open(fresh, "wb") as file:
            np.savez(file, *(features.float().cpu().numpy() for features in self._reference))

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

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks, all of which run the whole probe."""
        if self.taps is not None:
            self.taps.share(replace(layout, world=layout.tensor, data=1, data_rank=0))

    def measure(self, sums: StepSums, due: Collection[str]) -> None:
        """Run the probe set once and write what the quantities `due` make of it, and what it took, into `sums`."""
        self._clock.begin()
        listening, taps = self._listening, None
        if self.taps is not None and not listening.quantities.keys().isdisjoint(due):
            taps = self.taps
            taps.attach(0, due)  # the same query rows every time
        try:
            features = self._features(taps)
        finally:
            if taps is not None:
                taps.detach()
        if taps is not None:
            taps.gather(1.0)
            if taps.failure is not None:
                raise taps.failure
            if taps.widest > sums.heads and not sums.fixed:
                sums.resize(taps.widest)
            taps.sums.resize(sums.heads)
        panels = (
            [(self._panel, sums.packet)]
            if taps is None
            else [(self._panel, sums.packet), (listening, taps.sums.packet)]
        )
        told = [(panel, of, panel.listening("on_probe")) for panel, of in panels]
        self._clock.seen()
        if any(quantities for _, _, quantities in told):
            event = self._thinned(self._beside_reference(features))
            self._clock.seen()
            for panel, of, quantities in told:
                panel.tell("on_probe", quantities, of, event)
        if taps is not None:
            for name in listening.due:
                for field, view in taps.sums.packet[name].items():
                    sums.packet[name][field].copy_(view)
            self._panel.failures |= listening.failures
        self._clock.end()
        of_step = sums.packet[Step.name]
        of_step["probe_ms"].fill_(self._clock.last_ms)
        of_step["probe_rows"].fill_(max(-(-len(one) // self._thinning) for one in features))
        of_step["probes"].fill_(1)

    @property
    def sharded_outputs(self) -> set[int]:
        """Layers whose output the ranks of one batch have split."""
        return set() if self.taps is None else self.taps.sharded_outputs

    def delta_cka(self) -> Tensor:
        """[L] float32: 1 - CKA between the reference and the model as it is now."""
        event = self._beside_reference(self._features())
        found = torch.empty(len(event.features), device=self._device)
        if event.reference is None:
            raise RuntimeError("Probe.delta_cka before `remember`: there is nothing to compare with")
        rank, debiased = self._config.cka_rank, self._config.cka_debiased
        for layers, index in zip(event.stacks, event.indices, strict=True):
            x, y = (torch.stack([of[i] for i in layers]) for of in (event.reference, event.features))
            found.index_copy_(0, index, ops.delta_cka(x, y, rank=rank, debiased=debiased).float())
        return found

    def _beside_reference(self, after: list[Tensor]) -> ProbeFeatures:
        before = self._reference
        if self._config.cka_reference == "adapters_off":
            disabled: Callable[[], AbstractContextManager] = getattr(_peft_of(self._model), "disable_adapter")  # noqa: B009
            with trainable_as_before(self._model), disabled():
                before = self._features()
        if self._config.cka_reference == "previous":
            self._reference = after
        groups: dict[tuple, list[int]] = {}
        for layer in self._here:
            groups.setdefault((after[layer].shape, layer in self._decoders), []).append(layer)
        stacks = tuple(tuple(layers) for layers in groups.values())
        indices = tuple(self._indices[layers] for layers in stacks)
        reference = None if before is None else tuple(before)
        return ProbeFeatures(tuple(after), tuple(self._sequences), reference, stacks, indices)

    # ---- one run -----------------------------------------------------------------------------------------------------

    def _features(self, taps: Taps | None = None) -> list[Tensor]:
        """Per layer [N, D]: the kept rows of the outputs of the blocks that are here, and what `taps` see of them."""
        kept: list[list[Tensor]] = [[] for _ in self._blocks]
        sequences: list[list[Tensor]] = [[] for _ in self._blocks]
        begun = 0  # sequences of earlier batches
        with undisturbed(self._model, self._device, autograd=taps is not None):
            for number, batch in enumerate(self._batches):
                there = partial(torch.Tensor.to, device=self._device, non_blocking=True)
                inputs = {k: there(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with _outputs_of(self._blocks) as outputs:
                    returned = self._run(self._model, inputs)
                if taps is not None:
                    _backward_to(outputs.values(), loss_of(returned))
                size = 0
                for layer in self._here:
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
                    self._check_memory([kept[layer][0] for layer in self._here])
        features = [torch.cat(rows) if rows else torch.empty(0) for rows in kept]
        self._sequences = [torch.cat(numbers) if numbers else torch.empty(0) for numbers in sequences]
        few = [self._blocks[layer].name for layer in self._here if len(features[layer]) < _MIN_ROWS]
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
            rows = mean_rows(output, tokens)  # one row per sequence
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


def _fixed(batches: Iterable[Mapping] | Mapping) -> list[dict]:
    """The probe as a list of dicts, which stays what it is."""
    expected = "probe: expected a list of model inputs (dicts of tensors), at least one"
    if isinstance(batches, Mapping):
        batches = [batches]  # what a tokenizer returns is one batch
    if isinstance(batches, (str, Tensor)) or not isinstance(batches, Iterable):
        raise TypeError(f"{expected}, got {type(batches).__name__}")
    found = list(batches)
    wrong = [type(batch).__name__ for batch in found if not isinstance(batch, Mapping)]
    if wrong or not found:
        raise TypeError(f"{expected}, got {f'one of {wrong[0]}' if wrong else 'none'}")
    if not isinstance(batches, (list, tuple)) and iter(batches) is not batches:
        again = list(batches)
        if len(again) != len(found) or not all(map(_same, found, again)):
            raise ValueError(
                "probe: it returns other batches the second time, so values would not be comparable between runs; give "
                "a list of batches, or a loader that does not shuffle"
            )
    return [dict(batch) for batch in found]


def _same(left: Mapping, right: Mapping) -> bool:
    if left.keys() != right.keys():
        return False
    pairs = [(left[name], right[name]) for name in left]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )


def _backward_to(outputs: Iterable[Tensor], loss: Tensor | None) -> None:
    """Send the gradients of `loss` as far down as to `outputs`, past their hooks and into no parameter's `grad`."""
    outputs = [output for output in outputs if output.requires_grad]
    if loss is not None and loss.requires_grad and outputs:
        torch.autograd.grad(loss, outputs, allow_unused=True)


# ---- seeing outputs --------------------------------------------------------------------------------------------------


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
