"""Measure a transformer while it trains."""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from ..alerts import Alert, AlertConfig, AlertWatch
from ..blocks import Block, find_blocks
from ..timeline import Timeline
from .config import MonitorConfig
from .description import heads_of, meta_of
from .distributed import Layout, Ranks, full_of, world_size
from .gradients import scale_of, squares_of_all
from .packet import Packet
from .probe import Probe
from .record import Record
from .recorder import Recorder
from .schedule import is_due
from .taps import Taps

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)

REFERENCE_NAME = "probe_reference.npz"  # in the folder of the timeline
_PROBE_SIGNALS = frozenset({"delta_cka", "probe_entropy", "probe_activation_grad"})


class Monitor:
    """Measures attention, gradients and features of every transformer block on scheduled optimizer steps.

    ::

        with Monitor(model, MonitorConfig(every=10), out="runs/a") as monitor:
            for batch in loader:
                model(**batch).loss.backward()
                monitor.step()           # after backward, before the optimizer clears the gradients
                optimizer.step()
                optimizer.zero_grad()
        monitor.timeline

    Entering attaches hooks on the steps that measure and none on the others; leaving detaches everything, also when
    training raises. The model's attention implementation does the attending; outputs are equal to the bit. Only
    forwards of `model` itself under autograd count, so evaluations in between do not. Gradients are read at the end of
    each backward pass, before anybody clips them; several forwards, each with its backward pass, before one `step` are
    gradient accumulation. Of two backward passes through one forward, activation gradients are those of the last.
    Of a compiled model, measured steps run the code as it is written and the others the compiled one. A measured step
    begins where the one before ends: an evaluation between them runs as it is written, too.

    What fails before a first step was measured is an error. From then on it costs a warning and the values of the step.

    Args:
        model: what the training loop calls, wrapped (DDP, peft) or not; Transformers or any other PyTorch model.
        config: what and when.
        out: folder of the timeline; None: kept in memory only.
        probe: list of model inputs (dicts of tensors) for delta-CKA, and for entropy and activation gradients on data
            that stays the same (with labels, if the model returns a loss then); without it these signals are NaN.
        start_step: the first optimizer step of this run; above 0 the timeline in `out` is continued from there.
        alerts: what is logged as a warning when it goes wrong (`inflection_fast.alerts`); None: nothing.
        on_alert: called with the alerts of a measured step, where there are any, from a thread of the monitor's own;
            what it raises is logged.
        rank_timeout_s: how long the sums of a measured step wait for other ranks, in that thread, before this rank
            gives them up and measures on its own, which `missing_ranks` of the timeline and an alert tell.

    Where torch.distributed is in use (DDP, FSDP2, tensor parallelism by DTensor), every rank enters its Monitor and
    calls `step`, and the values are those of the whole batch, whose loss is taken to be the mean of the ranks' losses.
    Rank 0 keeps the file, logs alerts and calls `on_alert`; with `out`, the timelines of the other ranks stay empty.

    Raises:
        TypeError: `model` is no module, or an argument is of another type.
        ValueError: no blocks with attention, a replicated (DataParallel) model, or `out` holds the timeline
            of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  (frozen)
        out: str | os.PathLike | None = None,
        *,
        probe: Sequence[dict] | None = None,
        start_step: int = 0,
        alerts: AlertConfig | None = AlertConfig(),  # noqa: B008  (frozen)
        on_alert: Callable[[list[Alert]], None] | None = None,
        rank_timeout_s: float = 300.0,
    ):
        if not isinstance(config, MonitorConfig):
            raise TypeError(f"config: expected a MonitorConfig, got {type(config).__name__}")
        if operator.index(start_step) < 0:
            raise ValueError(f"start_step: expected a step >= 0, got {start_step}")
        self.blocks: list[Block] = find_blocks(model, config.blocks)
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: DataParallel runs replicas that cannot be measured; use DistributedDataParallel")
        self._model: nn.Module | None = model
        self._config = config
        self._out = None if out is None else Path(out)
        self._rank_timeout_s = rank_timeout_s
        self._ranks: Ranks | None = None
        self._layout = Layout()
        self._step = operator.index(start_step)
        self._resume_at = self._step or None
        tapped = [signal for signal in config.signals if signal not in _PROBE_SIGNALS]
        self._taps = Taps(model, self.blocks, tapped, config.rows, config.seed)
        measures_probe = probe is not None and not _PROBE_SIGNALS.isdisjoint(config.signals)
        self._probe = Probe(model, self.blocks, probe, config) if measures_probe else None
        self._taps.probe = self._probe is not None and self._probe.taps is not None
        watch = None if alerts is None else AlertWatch(alerts)
        names = [block.name for block in self.blocks]
        self._record = Record(self._out, names, self._resume_at, watch, on_alert)
        self._open = self._closed = False
        self._measuring = False  # hooks are attached
        # A step was measured: what fails from now on is told, and does not stop the training.
        self._proven = self._taps.forgives = self._step > 0
        self._owner = os.getpid()

    # ---- attaching and detaching -------------------------------------------------------------------------------------

    def __enter__(self) -> Monitor:
        if self._open or self._closed:
            raise RuntimeError("a Monitor is entered once; make another one to measure again")
        self._heads, error = heads_of(self.blocks), None
        if world_size() > 1:
            self._ranks = Ranks(self._model, self._rank_timeout_s)
        try:
            # Where ranks divide the heads among them, only the first call of attention tells how many there are.
            if self._heads is not None and (self._ranks is None or not self._ranks.divide_batches):
                self._record.open(self._heads, self._meta(), writes=self._writes)
        except ValueError as refused:
            if self._ranks is None:
                raise
            error = refused
        if self._ranks is not None:
            self._agree(error)
        self._open = True
        try:
            self._take_reference()
            self._arm()
        except BaseException:
            self.close()
            raise
        return self

    def _agree(self, error: ValueError | None) -> None:
        """All ranks measure the same way, or none does."""
        facts = {
            "blocks": [block.name for block in self.blocks],
            "heads": self._heads,
            "config": dataclasses.asdict(self._config),
            "start_step": self._step,
            "probe": self._probe is not None,
        }
        self._layout = self._ranks.agree(self.blocks, facts, None if error is None else str(error))
        self._taps.share(self._layout)
        if self._probe is not None:
            self._probe.share(self._layout, self._taps.sharded_outputs)
        if self._layout.tensor > 1:
            self._heads = None

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Detach everything, finish and close the timeline, which stays readable. Safe to call twice."""
        self._taps.detach()
        self._measuring = self._open = False
        self._closed = True
        # Whoever keeps the monitor for its timeline keeps no model.
        self._model = self._probe = None
        self._taps.forget_model()
        self.blocks = [dataclasses.replace(block, module=None) for block in self.blocks]
        if os.getpid() == self._owner:
            self._record.close()

    @property
    def _writes(self) -> bool:
        return self._ranks is None or self._ranks.writes

    def _meta(self) -> dict:
        return meta_of(self._model, self._config)

    def _arm(self) -> None:
        self._measuring = is_due(self._step, self._config.every)
        if self._measuring:
            if self._record.recorder is not None:
                self._record.recorder.before_overwriting()
            self._taps.attach(self._step)

    def _take_reference(self) -> None:
        wanted = "delta_cka" in self._config.signals and self._config.cka_reference != "adapters_off"
        if self._probe is None or not wanted:
            return
        path = None if self._out is None or self._config.cka_reference != "start" else self._out / REFERENCE_NAME
        if self._resume_at is not None and path is not None and path.exists():
            self._probe.load(path)
            return
        if self._resume_at is not None:
            logger.warning("delta_cka is measured against step %d: no reference of the start is there", self._step)
        self._probe.remember()
        if path is not None:
            self._record.guarded(lambda: self._probe.save(path))

    # ---- stepping ----------------------------------------------------------------------------------------------------

    def step(
        self,
        loss: float | Tensor | None = None,
        *,
        loss_scale: float | Tensor = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """End one optimizer step; call it after the last backward pass and before the gradients are cleared.

        On a measured step this starts a copy of what was summed up on the device, and a thread of the monitor's own
        appends it to the timeline: nothing here waits for the device or the disk. Other steps do nothing.

        Args:
            loss: of this step; None: the mean of the `loss` that the model returned, NaN if it returned none.
            loss_scale: what the loss was multiplied by; gradient norms are divided by it.
            scaler: the gradient scaler that multiplied the loss as well, before its `step` and `update`. Norms are
                divided by its scale too, and `skipped` says whether it drops this step, as a gradient is not finite.

        Raises:
            RuntimeError: outside the context, or the first measured step saw no training forward of the model.
        """
        if not self._open:
            raise RuntimeError("Monitor.step() outside the context: enter it with `with Monitor(...) as monitor`")
        if self._measuring:
            self._taps.detach()
            self._measuring = False
            began = perf_counter() - self._taps.seconds
            self._hand_over(self._filled(loss, loss_scale, scaler), began)
            self._proven = self._taps.forgives = True
        self._step += 1
        self._arm()

    def _hand_over(self, packet: Packet, began: float) -> None:
        if self._record.recorder is None:
            if not self._record.is_open:
                self._record.open_or_keep(packet.heads, self._meta(), writes=self._writes)
            taps = self._taps
            self._record.start(packet, self._layout, self._ranks, taps.sharded_outputs, self._rank_timeout_s)
            # Whoever forgets to close loses nothing at the end of the process, and keeps no thread for ever.
            weakref.finalize(self, _end, taps, self._record.recorder)
        self._record.recorder.record(self._step, began)

    def _filled(self, *known) -> Packet:
        """The local sums of this step."""
        taps = self._taps
        if taps.packet is None:
            taps.allocate(self._heads or 1)
        packet = taps.packet
        if taps.failure is None:
            if self._ranks is None:  # else some other rank may have seen something, which shows when they are joined
                self._check_seen()
            try:
                self._fill(packet, *known)
            except Exception as error:
                if not self._proven:
                    raise
                taps.failure = error
        if taps.failure is not None:
            self._record.warn("failure", f"measured step {self._step} failed: {taps.failure!r}; its values are NaN")
            packet.reset()
            if self._ranks is not None:
                packet.spoil()  # the others' sums are not those of the step without this one's
        return packet

    def _fill(
        self,
        packet: Packet,
        loss: float | Tensor | None,
        loss_scale: float | Tensor,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        taps = self._taps
        if self._heads not in (None, packet.heads):
            raise ValueError(f"attention has {packet.heads} heads, where the first block states {self._heads}")
        if scaler is not None and scaler.is_enabled():
            loss_scale = loss_scale * scale_of(scaler, taps.device)
            squares = squares_of_all(list(self._model.parameters()), self.blocks, taps.parameter_squares)
            packet["skipped"].copy_(~squares.isfinite())
        if scaler is not None:
            packet["skipped_count"].fill_(1)
        taps.gather(loss_scale)
        if self._probe is not None and is_due(self._step, self._config.probe_every or self._config.every):
            self._probe.measure(packet)
        losses = [one.detach().mean() for one in ([loss] if isinstance(loss, Tensor) else taps.losses)]
        if loss is not None and not isinstance(loss, Tensor):
            packet["loss"].fill_(float(loss))
            packet["loss_count"].fill_(1)
        elif losses:
            packet["loss"].copy_(torch.stack(losses).sum(), non_blocking=True)
            packet["loss_count"].fill_(len(losses))

    def clip_grad_norm_(
        self,
        max_norm: float,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` by the l2 norm, which on a measured step does not sum the blocks again.

        With several ranks it does, because their sums are joined only later.

        Call it between the backward pass and `step`, on gradients that nobody has changed since but `scaler.unscale_`.

        Args:
            max_norm: the largest norm that is left as it is.
            parameters: whose gradients are clipped, by the norm of all of them; None: all of the model.
            scaler: the gradient scaler that unscaled the gradients after the backward pass.

        Returns:
            The norm before clipping, float32 [].
        """
        parameters = list(self._model.parameters() if parameters is None else parameters)
        if not self._measuring or self._taps.parameter_squares is None or self._ranks is not None:
            return full_of(nn.utils.clip_grad_norm_(parameters, max_norm))  # sums of ranks are not joined yet
        scale = 1.0 if scaler is None else scale_of(scaler, self._taps.device)
        norm = squares_of_all(parameters, self.blocks, self._taps.parameter_squares, scale).sqrt().float()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def timeline(self) -> Timeline:
        """All that was measured so far. `RuntimeError` before the context is entered."""
        return self._record.timeline

    @property
    def dropped(self) -> int:
        """How many measured steps are missing from the timeline: the disk or a rank was too slow, or a row failed."""
        return self._record.dropped

    @property
    def data_ranks(self) -> int:
        """The number of processes, or groups of them under tensor parallelism, that have a batch of their own."""
        return self._layout.data

    @property
    def measuring(self) -> bool:
        """Whether the optimizer step under way is a measured one."""
        return self._measuring

    # ---- faults ------------------------------------------------------------------------------------------------------

    def _check_seen(self) -> None:
        """A step whose forward or backward went by unseen must not pass for one that was measured."""
        taps, signals = self._taps, self._config.signals
        missing = None
        if not taps.forwards:
            missing = "no training forward of the monitored model: give Monitor the object that the loop calls"
        elif not taps.backwards and ("activation_grad" in signals or "parameter_grad" in signals):
            missing = "no backward pass through the model's outputs: call step() after backward()"
        if missing is not None:
            if not self._proven:
                raise RuntimeError(f"the first measured step ({self._step}) saw {missing}")
            self._record.warn("unseen", f"measured step {self._step} saw {missing}; its values are NaN")
        elif "activation_grad" in signals and taps.unreached:
            names = [self.blocks[layer].name for layer in taps.unreached]
            self._record.warn("unreached", f"no gradient reached the outputs of {names}; their activation_grad is NaN")


def _end(taps: Taps, recorder: Recorder) -> None:
    taps.detach()
    recorder.close()
