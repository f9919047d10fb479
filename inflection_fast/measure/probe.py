"""The fixed probe set: features of each block compared with a reference state, attention and gradients."""

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
from ..quantities.dtensors import full_of
from ..quantities.quantity import ProbeFeatures
from .config import MonitorConfig
from .hooks import isolated_evaluation, preserve_requires_grad
from .micro_batch import decoder_layers, loss_of, token_mask
from .packet import StepSums
from .panel import Panel
from .placements import RemoteBlock
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
    """Runs the probe set, and passes the blocks' outputs and those of the reference state to the quantities.

    A run is in evaluation mode; training flags and random generators are restored. Autograd runs only where gradients
    are due: from the loss that the model returns for the probe's labels to the blocks' outputs. It touches no `grad`,
    no gradient scaler and no bucket of DistributedDataParallel. The kept feature rows are drawn once, from the seed.
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
        # Without the wrapper: DistributedDataParallel would broadcast and prepare its buckets for a backward pass.
        if _peft_of(model) is not model:
            model, blocks = _peft_of(model), [replace(one, path=one.path.removeprefix("module.")) for one in blocks]
        self._model, self._blocks, self._batches, self._config = model, blocks, batches, config
        self._panel, listening = panel, panel.for_probe()
        self.taps = None
        self._here = [block.index for block in blocks if not isinstance(block.module, RemoteBlock)]
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
        # By batch, stack of layers and shape: the kept rows and their sequences. They are kept because counting the
        # tokens of the probe again would wait for the device.
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._indices = LayerIndices(self._device)
        self._reference: list[Tensor] | None = None
        self._thinning = 1  # of the kept rows every n-th is compared
        self._rows_kept = 0

    def begin(
        self,
        folder: Path | None,
        budget: ProbeBudget,
        guarded: Callable[[Callable[[], None]], None],
        *,
        saves_reference: bool = True,
    ) -> None:
        """Take the reference before the first step, or load that of the run that is resumed in `folder`.

        `guarded` runs writes to the disk. One of several ranks `saves_reference`.
        """
        self.budget, resumed, path = budget, budget.first_step > 0, None
        if self.compares and self._config.cka_reference in _KEPT:
            if folder is not None and self._config.cka_reference == "start":
                path = folder / (f"layer{self._here[0]}_{REFERENCE_NAME}" if self._here[0] else REFERENCE_NAME)
            if resumed and path is not None and path.exists():
                self.load(path)
            else:
                if resumed:
                    message = "delta_cka is measured against step %d, because there is no saved reference of the start"
                    logger.warning(message, budget.first_step)
                self.remember()
                if path is not None and saves_reference:
                    guarded(lambda: self.save(path))
        self._at, self._training_from = budget.first_step - 1, perf_counter()

    def step(self, step: int, sums: StepSums, due: Collection[str], *, tolerates_errors: bool) -> None:
        """Run the probe in a training step; with `tolerates_errors` an error costs the values of `due`."""
        try:
            self._step(step, sums, due)
        except Exception as error:
            if not tolerates_errors:
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
        of_step["probe_every"].fill_(steps or 0)  # with several ranks the recorder fills it in
        self._at, self._training_from = step, perf_counter()

    def _thin_out(self, step_ms: float) -> None:
        """Where a run takes too long and comparing is more than half of it, compare fewer rows from now on."""
        forwards_ms = self._clock.last_ms - self._clock.after_ms
        if self.budget.is_over(self._clock.last_ms, step_ms) and self._clock.after_ms > forwards_ms > 0:
            most = max(self._rows_kept // FEWEST_ROWS, 1)
            self._thinning = min(self._thinning * math.ceil(self._clock.after_ms / forwards_ms), most)

    def _thinned(self, event: ProbeFeatures) -> ProbeFeatures:
        """Every n-th row, so that each sequence keeps its share of the rows."""
        self._rows_kept = min(len(event.features[layer]) for layer in self._here)
        if self._thinning == 1:
            return event
        thin = lambda of: tuple(one[:: self._thinning] for one in of)  # noqa: E731
        reference = None if event.reference is None else thin(event.reference)
        return replace(event, features=thin(event.features), sequences=thin(event.sequences), reference=reference)

    def remember(self) -> None:
        """Take the present features as the reference, where the configuration keeps one."""
        if self._config.cka_reference in _KEPT:
            self._reference = self._features()

    def save(self, path: Path) -> None:
        """Write the reference for a resumed run, atomically, as plain float32 arrays."""
        if self._reference is None:
            return
        with replacing(path) as fresh, open(fresh, "wb") as file:
            np.savez(file, *(features.float().cpu().numpy() for features in self._reference))

    def load(self, path: Path) -> None:
        """Load the reference of an earlier run. `ValueError` if it is of other blocks or another probe."""
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
        """Run the probe set once; the values of the quantities `due` and the time go into `sums`."""
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
        panels = [(self._panel, sums.packet)] + ([] if taps is None else [(listening, taps.sums.packet)])
        listeners = [(panel, of, panel.listening("on_probe")) for panel, of in panels]
        self._clock.seen()
        if any(quantities for _, _, quantities in listeners):
            event = self._thinned(self._beside_reference(features))
            self._clock.seen()
            for panel, of, quantities in listeners:
                panel.notify("on_probe", of, event, quantities)
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

    def _beside_reference(self, after: list[Tensor]) -> ProbeFeatures:
        before = self._reference
        if self._config.cka_reference == "adapters_off":
            disabled: Callable[[], AbstractContextManager] = getattr(_peft_of(self._model), "disable_adapter")  # noqa: B009
            with preserve_requires_grad(self._model), disabled():
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
        """Per layer [N, D]: the kept rows of the outputs of this rank's blocks. `taps` need autograd."""
        kept: list[list[Tensor]] = [[] for _ in self._blocks]
        sequences: list[list[Tensor]] = [[] for _ in self._blocks]
        begun = 0  # sequences of earlier batches
        with isolated_evaluation(self._model, self._device, autograd=taps is not None):
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
        """Refuse a probe set whose rows would not fit in memory, if all batches are like the first."""
        need, have = 2 * len(self._batches) * sum(rows.nbytes for rows in first), ops.memory_bytes(self._device)
        if need > have:
            raise ValueError(
                f"cka_rows: {len(self._batches)} batches with {len(first[0])} rows of {len(first)} blocks take about "
                f"{need} bytes, {self._device} has {have}; ask for fewer rows"
            )

    def _rows_of(
        self, output: Tensor, tokens: Tensor | None, number: int, taken: int, in_decoder: bool
    ) -> tuple[Tensor, Tensor]:
        """The kept rows [n, D] of one output [B, T, D], after `taken` rows of earlier batches, and their sequences [n].

        All layers of one stack keep the same rows.
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
        """The kept rows among all positions, or with "mean" among all sequences; and the sequence of each."""
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
    """The probe as a list of dicts. `ValueError` if its batches differ the second time."""
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
    """Run the backward pass of `loss` to `outputs`, whose hooks run; no parameter gets a `grad`."""
    outputs = [output for output in outputs if output.requires_grad]
    if loss is not None and loss.requires_grad and outputs:
        torch.autograd.grad(loss, outputs, allow_unused=True)


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
