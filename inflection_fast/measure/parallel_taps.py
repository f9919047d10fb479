"""Taps of a rank that holds one pipeline stage, or a part of each sequence; see `parallel.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .graph_taps import GraphTaps
from .hooks import catch_hook_errors, patched
from .micro_batch import MicroBatch
from .parallel import Pipeline, RankModel

__all__ = ["ParallelTaps"]


class ParallelTaps(GraphTaps):
    """Taps on a model of which this rank holds a stage, or a part of each sequence. Arguments as for `Taps`, and:

    rank_model: what this rank holds; for a whole model the taps are those of `GraphTaps`.
    """

    def __init__(self, *args, rank_model: RankModel, **options):
        super().__init__(*args, **options)
        self._pipeline = rank_model if isinstance(rank_model, Pipeline) else None
        if rank_model.context is not None:
            if self._panel.has("on_attention_call"):
                raise ValueError(
                    "context: quantities that look into calls of attention (rank, attention_detail) would see the keys "
                    "of one rank alone; leave them out"
                )
            self._attention.context = rank_model.context
            self._frozen.possible = False  # it runs blocks again, without the other ranks
        self._in_chunk = False  # a forward of a micro-batch of the schedule runs
        self._losses: list[Tensor] = []

    def forget_model(self) -> None:
        """Drop all references to the model."""
        self._pipeline = None
        super().forget_model()

    @property
    def loss_seen(self) -> Tensor | None:
        """[]: the loss that the schedule trains on in this step; None: it is not computed on this rank."""
        if not self._losses:
            return None
        losses = torch.stack([loss.detach().mean() for loss in self._losses])
        return losses.mean() if self._pipeline is not None and self._pipeline.schedule.scale_grads else losses.sum()

    def _attach_to_model(self) -> None:
        super()._attach_to_model()
        self._losses = []
        if self._pipeline is not None:
            schedule, stage = self._pipeline.schedule, self._pipeline.schedule._stage
            add = self._attached.enter_context
            add(patched(stage, "forward_one_chunk", self._chunks))
            add(patched(stage, "perform_reduce_grad", partial(self._reduces, stage)))
            add(patched(schedule, "_compute_loss", self._computes_loss))

    def _chunks(self, run: Callable) -> Callable:
        def forward_one_chunk(*args, **kwargs):
            self._in_chunk = True
            try:
                return run(*args, **kwargs)
            finally:
                self._in_chunk = False

        return forward_one_chunk

    def _computes_loss(self, compute: Callable) -> Callable:
        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            if isinstance(loss, Tensor):
                self._losses.append(loss)
            return loss

        return compute_loss

    def _reduces(self, stage, reduce: Callable) -> Callable:
        def perform_reduce_grad(factor: int):
            reduce(1)
            self._read_whole()
            stage.scale_grads(factor)

        return perform_reduce_grad

    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pipeline is None or self._in_chunk:
            super()._forward_begins(model, args, kwargs)

    def _read_parameters(self, micro_batch: MicroBatch) -> None:
        if self._pipeline is None:
            super()._read_parameters(micro_batch)
        else:
            micro_batch.reads_parameters = False  # they are complete at the end of the schedule's step

    @catch_hook_errors
    def _read_whole(self) -> None:
        if self._panel.listening("on_backward_end") and self.backwards:
            self._notify_backward_end()

    def gather(self, loss_scale: float | Tensor) -> None:
        """As `Taps.gather`, without the scale of the schedule."""
        super().gather(loss_scale if self._pipeline is None else loss_scale * self._pipeline.loss_scale)
