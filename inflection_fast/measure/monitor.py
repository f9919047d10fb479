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
from .packet import MeasuredStep, Packet, Row
from .panel import Panel
from .parallel import ParallelTaps, rank_model_of
from .parameters import Background, Updates, clip_by_known, scale_of, total_squares
from .placements import reachable
from .probe import REFERENCE_NAME, Probe
from .ranks import Layout, Ranks, world_size
from .recorder import Record, Recorder
from .schedule import ProbeBudget, is_due
from .taps import device_of

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

    Only measured steps have hooks on the model. Leaving the context removes everything, also when training raises. The
    model's own attention implementation runs, and outputs are equal to the bit. Only forwards of `model` under autograd
    count, not evaluations. Gradients are read at the end of each backward pass, before clipping. Several forwards with
    their backward passes before one `step` are gradient accumulation. After two backward passes through one forward,
    activation gradients are those of the last. Until a first step was measured errors are raised; from then on an
    error costs a warning and the values of the step. A compiled model is compiled with its taps
    (`MonitorConfig.compiled`): enter the monitor before the first step.

    Args:
        model: what the training loop calls, wrapped (DDP, peft) or not; of Transformers or any other PyTorch model.
        config: what and when.
        out: folder of the timeline; None: kept in memory only.
        probe: list of model inputs (dicts of tensors) for delta-CKA, and for entropy and activation gradients on fixed
            data (the latter need labels, for which the model returns a loss). None: these columns are NaN.
        start_step: the first optimizer step of this run; above 0 the timeline in `out` is continued from there.
        alerts: rules of the alerts that are logged as warnings (`inflection_fast.alerts`); None: no alerts.
        on_alert: called with the alerts of a measured step, in the monitor's thread; its exceptions are logged.
        on_row: called with every finished `Row`, in order, in the training thread by a later `step`, `flush` or
            `close`; its exceptions are logged once.
        if_exists: what to do with a timeline in `out` when a run begins at step 0: "error" raises, "overwrite" deletes
            it, "new" measures into `out`-2, `out`-3, ... (see `folder`).
        rank_timeout_s: how long the monitor's thread waits for the sums of other ranks. Then this rank measures alone;
            an alert and the column `missing_ranks` say so.
        accelerator: the Accelerator of a loop with `accumulate`: `step` does nothing while gradients accumulate.
        pipeline: the schedule (`ScheduleGPipe` or `Schedule1F1B` of torch.distributed.pipelining) whose stage `model`
            is. Each rank measures its own blocks; the timeline has all. All ranks create their monitors together.
        context: the ranks that share each sequence (torch's `context_parallel`), as a mesh of one dimension or a group.

    With torch.distributed (DDP, FSDP2, tensor parallelism by DTensor) every rank enters its Monitor and calls `step`.
    Values are those of the whole batch, with the mean of the ranks' losses as its loss. Rank 0 writes the file, logs
    alerts and calls `on_alert` and `on_row`; with `out`, the timelines of other ranks stay empty.

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
        self._rank_model = rank_model_of(model, config, pipeline, context, rank_timeout_s, probe)
        self.blocks: list[Block] = self._rank_model.blocks
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: DataParallel runs replicas that cannot be measured; use DistributedDataParallel")
        self._model = model
        self._config, self._heads, heads = config, self._rank_model.heads, self._rank_model.heads or 1
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
            self._probe = Probe(model, self.blocks, probe, config, self._panel, heads, self._rank_model.run)
        taps = partial(ParallelTaps, heads=heads, counts_all=config.forwards == "all", rank_model=self._rank_model)
        self._taps = taps(model, self.blocks, self._panel, config)
        watch = None if alerts is None else AlertWatch(alerts, self._panel.columns, self._panel.axes)
        self._names = [block.name for block in self.blocks]
        self._record = Record(out, self._names, self._panel, self._resume_at, watch, on_alert, on_row, if_exists)
        self._updates, self._background = Updates(model), Background(self._panel)
        self._budget: ProbeBudget | None = None
        self._open = self._closed = False
        self._due: frozenset[str] = frozenset()  # what the step under way measures; its hooks are attached
        # A step was measured: from now on an error becomes a warning.
        self._proven = self._taps.tolerates_errors = self._step > 0
        self._owner = os.getpid()

    def __enter__(self) -> Monitor:
        if self._open or self._closed:
            raise RuntimeError("a Monitor is entered once; make another one to measure again")
        error = None
        if world_size() > 1:
            self._ranks = self._rank_model.ranks or Ranks(self._model, self._rank_timeout_s)
            self._record.writes = self._ranks.writes
        try:
            self._record.choose_folder(also=(REFERENCE_NAME,))
            # Where ranks shard the heads, only the first attention call shows their number.
            if self._heads is not None and (self._ranks is None or not self._ranks.divide_batches):
                self._record.open(self._heads, self._rank_model.meta(self._model, self._config, self.blocks))
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
                self._probe.begin(self._record.folder, budget, self._record.guarded, saves_reference=self._layout.leads)
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
            "context": self._rank_model.context_ranks,
        }
        said = None if error is None else str(error)
        folder, peers = self._record.folder, self._rank_model.peers
        self._layout, self._record.folder = ranks.agree(self.blocks, facts, folder, said, peers)
        self._taps.share(self._layout)
        self._background.share(self._layout)
        if self._probe is not None:
            self._probe.share(self._layout)
        if self._layout.tensor > 1:  # modules may state the number of heads of one rank
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
                last = MeasuredStep(self._step, finished, frozenset(), False, perf_counter())
                self._hand_over(last, self._taps.sums.packet)
        self._due, self._open, self._closed = frozenset(), False, True
        # A monitor that is kept for its timeline must not keep the model alive.
        self._model, self._probe = nn.Identity(), None
        self._taps.forget_model()
        self._rank_model.forget_model()
        self.blocks = [dataclasses.replace(block, module=nn.Identity()) for block in self.blocks]
        if os.getpid() == self._owner:
            self._record.close()
        self._panel.forget()

    def _arm(self) -> None:
        due = frozenset(name for name, every in self._every.items() if is_due(self._step, every))
        self._due = due if self._budget is None else (due - self._probed) | self._budget.due(self._step)
        if self._due:
            if self._record.recorder is not None:
                self._record.recorder.before_overwriting()
            self._taps.attach(self._step, self._due)

    # ---- stepping ----------------------------------------------------------------------------------------------------

    def step(
        self,
        loss: float | Tensor | None = None,
        *,
        loss_scale: float | Tensor = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """End one optimizer step; call it after the last backward pass and before the gradients are cleared.

        In a measured step this starts a copy of the sums on the device, which the monitor's thread appends to the
        timeline; the training does not wait for the device or the disk. In other steps nothing happens.

        Args:
            loss: of this step; None: the mean of the `loss` that the model returned, NaN if it returned none.
            loss_scale: factor of the loss; norms are divided by it. Gradient accumulation needs none.
            scaler: the gradient scaler of the loss, before its `step` and `update`. Norms are divided by its scale,
                and `skipped` is 1 if it will drop this step because a gradient is not finite.

        Raises:
            RuntimeError: outside the context, or the first measured step saw no training forward of the model.
        """
        if not self._open:
            raise RuntimeError("Monitor.step() outside the context: enter it with `with Monitor(...) as monitor`")
        if not getattr(self._accelerator, "sync_gradients", True):
            return
        self._updates.finish(self._panel, self._taps.parameters, self._hand_over)
        self._record.deliver_rows()
        if self._due:
            self._taps.detach()
            began = perf_counter() - self._taps.seconds
            packet = self._filled(loss, loss_scale, scaler)
            finished = self._background.add(packet)  # before the new copies, whose results belong to a later row
            self._background.copy(self._panel.listening("in_background"), self._taps.parameters)
            self._panel.mark_failures(packet, everything=self._taps.failure is not None)
            probe = self._probe if self._due & self._probed else None
            outputs = frozenset(self._taps.sharded_outputs | (set() if probe is None else probe.sharded_outputs))
            due, later = self._panel.due | finished, tuple(self._panel.later)
            measured = MeasuredStep(self._step, due, outputs, probe is not None, began, later)
            if not self._updates.begin(measured, packet, self._panel.listening("after_update")):
                self._hand_over(measured, packet)
            self._proven = self._taps.tolerates_errors = True
        self._step += 1
        self._arm()

    def _hand_over(self, measured: MeasuredStep, packet: Packet) -> None:
        recorder = self._record.recorder
        if recorder is None:
            heads = packet.fields.heads
            if not self._record.is_open(heads):
                self._record.open_or_keep(heads, self._rank_model.meta(self._model, self._config, self.blocks))
            recorder = self._record.start(packet, self._layout, self._ranks, self._probed, self._rank_timeout_s)
            # Without `close` the timeline is finished when the monitor is garbage collected or the process ends.
            weakref.finalize(self, _end, self._taps, recorder)
        recorder.record(measured, packet)

    def _filled(self, *known) -> Packet:
        """The local sums of this step."""
        taps, sums = self._taps, self._taps.sums
        if taps.failure is None:
            if self._ranks is None:  # other ranks may have seen a forward; joining their sums shows that
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
            squares = total_squares(list(self._model.parameters()), self.blocks, self._known_squares())
            of_step["skipped"].copy_(~squares.isfinite())
        if scaler is not None:
            of_step["scaled"].fill_(1)
        taps.gather(loss_scale)
        if self._probe is not None and self._due & self._probed:
            self._probe.step(self._step, taps.sums, self._due & self._probed, tolerates_errors=self._proven)
        self._panel.notify("before_update", taps.sums.packet, Update(taps.parameters, ()))
        of_step = taps.sums.packet[Step.name]  # the probe may have replaced the packet
        if loss is not None:
            of_step["losses"].fill_(1)
            if isinstance(loss, Tensor):
                of_step["loss"].copy_(loss.detach().mean(), non_blocking=True)
            else:
                of_step["loss"].fill_(float(loss))

    def _known_squares(self) -> Tensor | None:
        """[L]: squares of the gradients of the blocks at the end of the last backward pass; None: not known."""
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
        """`torch.nn.utils.clip_grad_norm_` by the l2 norm; in a measured step it reuses the sums of the blocks.

        With several ranks it does not, because their sums are joined later. Call it between the backward pass and
        `step`; only `scaler.unscale_` may have changed the gradients.

        Args:
            max_norm: gradients are scaled down to this norm.
            parameters: whose gradients are clipped, by their total norm; None: all of the model.
            scaler: the gradient scaler that unscaled the gradients.

        Returns:
            The norm before clipping, float32 [].
        """
        parameters = list(self._model.parameters() if parameters is None else parameters)
        known = self._known_squares() if self._due and self._ranks is None else None
        return clip_by_known(parameters, max_norm, self.blocks, known, scaler)

    @property
    def timeline(self) -> Timeline:
        """The timeline so far. `RuntimeError` before the context is entered."""
        return self._record.timeline

    @property
    def folder(self) -> Path | None:
        """The folder of the timeline, final once the context is entered; None: in memory only."""
        return self._record.folder

    @property
    def dropped(self) -> int:
        """The number of measured steps without a row: the disk or a rank was too slow, or computing the row failed."""
        return self._record.dropped

    def flush(self) -> None:
        """Wait until every measured step is in the timeline, and call `on_row` for each."""
        self._record.scalars()  # waits
        self._record.deliver_rows()

    def scalars(self) -> dict[str, float]:
        """The last measured step, for trackers: every column as its mean over the measured places."""
        return self._record.scalars()

    @property
    def data_ranks(self) -> int:
        """The number of processes, or of groups under tensor parallelism, with a batch of their own."""
        return self._layout.data

    @property
    def measuring(self) -> bool:
        """Whether the optimizer step under way is a measured one."""
        return bool(self._due)


def _end(taps: ParallelTaps, recorder: Recorder) -> None:
    taps.detach()
    recorder.close()
