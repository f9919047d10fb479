"""Measure a transformer while it trains."""

from __future__ import annotations

import dataclasses
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..alerts import Alert, AlertConfig, AlertWatch
from ..blocks import Block
from ..quantities import Step
from ..quantities.parameter_grad import ParameterGrad
from ..quantities.quantity import MeasuredModel, Update
from ..timeline import Timeline
from .config import MonitorConfig
from .packet import Measured, Packet, Row
from .panel import Panel
from .parallel import whole_of
from .parallel_taps import ParallelTaps
from .parameters import Background, Updates, clip_by_known, scale_of, squares_of_all
from .probe import REFERENCE_NAME, Probe
from .ranks import Layout, Ranks, world_size
from .recorder import Record, Recorder
from .schedule import ProbeBudget, is_due
from .taps import device_of
from .zero import reachable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Monitor"]


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
    What fails before a first step was measured is an error. From then on it costs a warning and the values of the step.
    A compiled model is compiled with what measures it (`MonitorConfig.compiled`): enter before its first step.

    Args:
        model: what the training loop calls, wrapped (DDP, peft) or not; of Transformers or any other PyTorch model.
        config: what and when.
        out: folder of the timeline; None: kept in memory only.
        probe: list of model inputs (dicts of tensors) for delta-CKA, and for entropy and activation gradients on data
            that stays the same (with labels, if the model returns a loss then); without it these signals are NaN.
        start_step: the first optimizer step of this run; above 0 the timeline in `out` is continued from there.
        alerts: what is logged as a warning when it goes wrong (`inflection_fast.alerts`); None: nothing.
        on_alert: called with the alerts of a measured step, from the monitor's own thread; what it raises is logged.
        on_row: called with every finished `Row`, in order, by the training's thread in a later `step`, in `flush` or in
            `close`, never by the monitor's own; what it raises is logged once.
        if_exists: what becomes of a timeline that is in `out` when a run begins at step 0: "error" refuses to begin,
            "overwrite" deletes it, "new" measures into `out`-2, `out`-3, ... (`folder` tells which).
        rank_timeout_s: how long the sums of a measured step wait for other ranks, in that thread, before this rank
            gives them up and measures on its own, which `missing_ranks` of the timeline and an alert tell.
        accelerator: the Accelerator of a loop with `accumulate`: `step` does nothing where gradients still add up.
        pipeline: the schedule (`ScheduleGPipe` or `Schedule1F1B` of torch.distributed.pipelining) whose stage `model`
            is. Each rank measures its own blocks, and the timeline has those of all. All make their monitors at once.
        context: the ranks that share each sequence (torch's `context_parallel`), as a mesh of one dimension or a group.

    Where torch.distributed is in use (DDP, FSDP2, tensor parallelism by DTensor), every rank enters its Monitor and
    calls `step`, and the values are those of the whole batch, whose loss is taken to be the mean of the ranks' losses.
    Rank 0 keeps the file, logs alerts and calls `on_alert` and `on_row`; with `out`, the timelines of the other ranks
    stay empty.

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
        on_row: Callable[[Row], None] | None = None,
        if_exists: str = "error",
        rank_timeout_s: float = 300.0,
        accelerator: object = None,
        pipeline: object = None,
        context: DeviceMesh | ProcessGroup | None = None,
    ):
        if not isinstance(config, MonitorConfig):
            raise TypeError(f"config: expected a MonitorConfig, got {type(config).__name__}")
        if operator.index(start_step) < 0:
            raise ValueError(f"start_step: expected a step >= 0, got {start_step}")
        self._whole = whole_of(model, config, pipeline, context, rank_timeout_s, probe)
        self.blocks: list[Block] = self._whole.blocks
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: DataParallel runs replicas that cannot be measured; use DistributedDataParallel")
        self._model = model
        self._config, self._heads, heads = config, self._whole.heads, self._whole.heads or 1
        self._rank_timeout_s, self._accelerator = rank_timeout_s, accelerator
        self._ranks: Ranks | None = None
        self._layout = Layout()
        self._step = operator.index(start_step)
        self._resume_at = self._step or None
        self._panel = Panel(reachable(config.instances(), model))
        self._panel.prepare(MeasuredModel(model, tuple(self.blocks), device_of(self.blocks), config, world_size()))
        self._every = {name: config.cadence(one) for name, one in self._panel.quantities.items() if name != Step.name}
        self._probed = frozenset(self._panel.of_group("probe"))
        self._probe: Probe | None = None
        if probe is not None and self._probed:
            self._probe = Probe(model, self.blocks, probe, config, self._panel, heads, self._whole.run)
        taps = partial(ParallelTaps, heads=heads, counts_all=config.forwards == "all", whole=self._whole)
        self._taps = taps(model, self.blocks, self._panel, config)
        watch = None if alerts is None else AlertWatch(alerts, self._panel.columns, self._panel.axes)
        self._names = [block.name for block in self.blocks]
        self._record = Record(out, self._names, self._panel, self._resume_at, watch, on_alert, on_row, if_exists)
        self._updates, self._background = Updates(model), Background(self._panel)
        self._budget: ProbeBudget | None = None
        self._open = self._closed = False
        self._due: frozenset[str] = frozenset()  # what the step under way measures; its hooks are attached
        # A step was measured: what fails from now on is told, and does not stop the training.
        self._proven = self._taps.forgives = self._step > 0
        self._owner = os.getpid()

    def __enter__(self) -> Monitor:
        if self._open or self._closed:
            raise RuntimeError("a Monitor is entered once; make another one to measure again")
        error = None
        if world_size() > 1:
            self._ranks = self._whole.ranks or Ranks(self._model, self._rank_timeout_s)
            self._record.writes = self._ranks.writes
        try:
            self._record.choose_folder(also=(REFERENCE_NAME,))
            # Where ranks divide the heads among them, only the first call of attention tells how many there are.
            if self._heads is not None and (self._ranks is None or not self._ranks.divide_batches):
                self._record.open(self._heads, self._whole.meta(self._model, self._config, self.blocks))
        except ValueError as refused:
            if self._ranks is None:
                raise
            error = refused
        if self._ranks is not None:
            self._agree(self._ranks, error)
        self._open = True
        try:
            if self._probe is not None:
                every, joined = {name: self._every[name] for name in self._probed}, self._ranks is not None
                budget = self._config.probe_budget(every, self._step, joined=joined, patience_s=self._rank_timeout_s)
                self._budget = self._record.budget = budget
                self._probe.begin(self._record.folder, budget, self._record.guarded, keeps=self._layout.leads)
            self._taps.open(self._heads, self._every)
            self._arm()
        except BaseException:
            self.close()
            raise
        return self

    def _agree(self, ranks: Ranks, error: ValueError | None) -> None:
        """All ranks measure the same way, or none does."""
        facts = {
            "blocks": self._names,
            "heads": self._heads,
            "config": self._config.as_dict() | {"blocks": None},  # stages of a pipeline may name theirs
            "columns": str(self._panel.columns),
            "start_step": self._step,
            "probe": self._probe is not None,
            "context": self._whole.context_ranks,
        }
        said = None if error is None else str(error)
        folder, peers = self._record.folder, self._whole.peers
        self._layout, self._record.folder = ranks.agree(self.blocks, facts, folder, said, peers)
        self._taps.share(self._layout)
        self._background.share(self._layout)
        if self._probe is not None:
            self._probe.share(self._layout)
        if self._layout.tensor > 1:  # what modules state may be the heads of one rank
            self._taps.sums.resize(1)

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Detach everything, finish and close the timeline, which stays readable. Safe to call twice."""
        self._taps.detach()
        if self._open:
            self._updates.finish(self._panel, self._taps.parameters, self._hand_over)
            if self._background.close() and self._record.recorder is not None:
                self._record.recorder.before_overwriting()
                finished = self._background.alone(self._taps.sums)
                last = Measured(self._step, finished, frozenset(), False, perf_counter())
                self._hand_over(last, self._taps.sums.packet)
        self._due, self._open, self._closed = frozenset(), False, True
        # Whoever keeps the monitor for its timeline keeps no model.
        self._model, self._probe = nn.Identity(), None
        self._taps.forget_model()
        self._whole.forget_model()
        self.blocks = [dataclasses.replace(block, module=nn.Identity()) for block in self.blocks]
        if os.getpid() == self._owner:
            self._record.close()
        self._panel.forget()

    def _arm(self) -> None:
        self._due = self._due_at(self._step)
        if self._due:
            if self._record.recorder is not None:
                self._record.recorder.before_overwriting()
            self._taps.attach(self._step, self._due)

    def _due_at(self, step: int) -> frozenset[str]:
        due = frozenset(name for name, every in self._every.items() if is_due(step, every))
        return due if self._budget is None else (due - self._probed) | self._budget.due(step)

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
            loss_scale: what the loss was multiplied by (accumulation needs none); norms are divided by it.
            scaler: the gradient scaler that multiplied the loss as well, before its `step` and `update`. Norms are
                divided by its scale too, and `skipped` says whether it drops this step, as a gradient is not finite.

        Raises:
            RuntimeError: outside the context, or the first measured step saw no training forward of the model.
        """
        if not self._open:
            raise RuntimeError("Monitor.step() outside the context: enter it with `with Monitor(...) as monitor`")
        if not getattr(self._accelerator, "sync_gradients", True):
            return
        self._updates.finish(self._panel, self._taps.parameters, self._hand_over)
        self._record.tell_rows()
        if self._due:
            self._taps.detach()
            began = perf_counter() - self._taps.seconds
            packet = self._filled(loss, loss_scale, scaler)
            finished = self._background.add(packet)  # before copying, whose results are of a later row however soon
            self._background.copy(self._panel.listening("in_background"), self._taps.parameters)
            self._panel.mark_failures(packet, everything=self._taps.failure is not None)
            probe = self._probe if self._due & self._probed else None
            outputs = frozenset(self._taps.sharded_outputs | (set() if probe is None else probe.sharded_outputs))
            due, later = self._panel.due | finished, tuple(self._panel.later)
            measured = Measured(self._step, due, outputs, probe is not None, began, later)
            if not self._updates.begin(measured, packet, self._panel.listening("after_update")):
                self._hand_over(measured, packet)
            self._proven = self._taps.forgives = True
        self._step += 1
        self._arm()

    def _hand_over(self, measured: Measured, packet: Packet) -> None:
        if self._record.recorder is None:
            heads = packet.fields.heads
            if not self._record.is_open(heads):
                self._record.open_or_keep(heads, self._whole.meta(self._model, self._config, self.blocks))
            recorder = self._record.start(packet, self._layout, self._ranks, self._probed, self._rank_timeout_s)
            # Whoever forgets to close loses nothing at the end of the process, and keeps no thread for ever.
            weakref.finalize(self, _end, self._taps, recorder)
        self._record.record(measured, packet)

    def _filled(self, *known) -> Packet:
        """The local sums of this step."""
        taps, sums = self._taps, self._taps.sums
        if taps.failure is None:
            if self._ranks is None:  # else some other rank may have seen something, which shows when they are joined
                taps.check_seen(self._step, self._record.warn)
            try:
                self._fill(*known)
            except Exception as error:
                if not self._proven:
                    raise
                taps.failure = error
        taps.fit_heads(None if self._probe is None else self._probe.taps, shrinks=self._ranks is None)
        if taps.failure is not None:
            self._record.warn("failure", f"measured step {self._step} failed: {taps.failure!r}; its values are NaN")
        return sums.packet

    def _fill(
        self, loss: float | Tensor | None, loss_scale: float | Tensor, scaler: torch.amp.GradScaler | None
    ) -> None:
        taps, of_step = self._taps, self._taps.sums.packet[Step.name]
        loss = taps.loss_seen if loss is None else loss
        if scaler is not None and scaler.is_enabled():
            loss_scale = loss_scale * scale_of(scaler, taps.device)
            squares = squares_of_all(list(self._model.parameters()), self.blocks, self._known_squares())
            of_step["skipped"].copy_(~squares.isfinite())
        if scaler is not None:
            of_step["scaled"].fill_(1)
        taps.gather(loss_scale)
        if self._probe is not None and self._due & self._probed:
            self._probe.step(self._step, taps.sums, self._due & self._probed, forgives=self._proven)
        listening = self._panel.listening("before_update")
        self._panel.tell("before_update", listening, taps.sums.packet, Update(taps.parameters, ()))
        of_step = taps.sums.packet[Step.name]  # which the probe may have made anew
        if loss is not None:
            of_step["losses"].fill_(1)
            if isinstance(loss, Tensor):
                of_step["loss"].copy_(loss.detach().mean(), non_blocking=True)
            else:
                of_step["loss"].fill_(float(loss))

    def _known_squares(self) -> Tensor | None:
        """[L]: squares of the gradients of the blocks, as they were at the end of the last backward pass."""
        name = ParameterGrad.name
        known = self._taps.parameters_read and name in self._due and name not in self._panel.failures
        return self._taps.sums.packet[name]["squares"] if known else None

    def clip_grad_norm_(
        self,
        max_norm: float,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` by the l2 norm, which on a measured step does not sum the blocks again.

        With several ranks it does, because their sums are joined only later. Call it between the backward pass and
        `step`, on gradients that nobody has changed since but `scaler.unscale_`.

        Args:
            max_norm: the largest norm that is left as it is.
            parameters: whose gradients are clipped, by the norm of all of them; None: all of the model.
            scaler: the gradient scaler that unscaled the gradients after the backward pass.

        Returns:
            The norm before clipping, float32 [].
        """
        parameters = list(self._model.parameters() if parameters is None else parameters)
        known = self._known_squares() if self._due and self._ranks is None else None
        return clip_by_known(parameters, max_norm, self.blocks, known, scaler)

    @property
    def timeline(self) -> Timeline:
        """All that was measured so far. `RuntimeError` before the context is entered."""
        return self._record.timeline

    @property
    def folder(self) -> Path | None:
        """Of the timeline; None: it is in memory only. Known once the context is entered."""
        return self._record.folder

    @property
    def dropped(self) -> int:
        """How many measured steps are missing from the timeline: the disk or a rank was too slow, or a row failed."""
        return self._record.dropped

    def flush(self) -> None:
        """Wait until every measured step is in the timeline, and tell `on_row` of each."""
        self._record.scalars()  # which waits
        self._record.tell_rows()

    def scalars(self) -> dict[str, float]:
        """Of the last measured step, for trackers: every column as its mean over the places that were measured."""
        return self._record.scalars()

    @property
    def data_ranks(self) -> int:
        """The number of processes, or groups of them under tensor parallelism, that have a batch of their own."""
        return self._layout.data

    @property
    def measuring(self) -> bool:
        """Whether the optimizer step under way is a measured one."""
        return bool(self._due)


def _end(taps: ParallelTaps, recorder: Recorder) -> None:
    taps.detach()
    recorder.close()
