"""The monitor as a callback of MosaicML Composer, and of llm-foundry by the name "inflection" in its YAML.

Written against Composer 0.32 and llm-foundry 0.22. These need a torch below 2.7.1, so the tests use a stand-in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from composer.core import Callback
from torch import nn

from inflection_fast.integrations.scalars import Scalars
from inflection_fast.measure import Monitor, MonitorConfig

__all__ = ["ComposerCallback"]


class ComposerCallback(Callback):
    """`Trainer(callbacks=[ComposerCallback(MonitorConfig(every=10), out="runs/a")])`.

    A step ends after the backward passes of all micro-batches of a batch, before the optimizer steps. Scalars go to
    Composer's loggers with the number of the batch.

    Args:
        config: what is measured, and when; or a mapping of its fields, as from a YAML file.
        out: folder of the timeline; if it holds one, a new folder beside it is used.
        keys: patterns of further scalars; see `inflection_fast.integrations.scalars`.
    """

    def __init__(
        self,
        config: MonitorConfig | Mapping[str, Any] = MonitorConfig(),  # noqa: B008  frozen
        out: str | os.PathLike | None = None,
        *,
        keys: tuple[str, ...] = (),
    ):
        self.config = MonitorConfig(**config) if isinstance(config, Mapping) else config
        self.out = out
        self._scalars = Scalars(keys)
        self.monitor: Monitor | None = None

    def fit_start(self, state: Any, logger: Any) -> None:
        """Attach."""
        self.close(state, logger)
        model: nn.Module = state.model
        on_row = lambda row: logger.log_metrics(self._scalars.of(row), step=row.step)  # noqa: E731
        self.monitor = Monitor(model, self.config, self.out, on_row=on_row, if_exists="new")
        self.monitor.__enter__()

    def after_train_batch(self, state: Any, logger: Any) -> None:
        """End a step. Composer has unscaled the gradients, and steps the optimizer next."""
        if self.monitor is not None:
            # `state.scaler` always exists, but scales losses only in this precision.
            self.monitor.step(scaler=state.scaler if state.precision == "amp_fp16" else None)

    def fit_end(self, state: Any, logger: Any) -> None:
        """Detach."""
        self.close(state, logger)

    def close(self, state: Any, logger: Any) -> None:
        """Detach. Composer calls this also after an exception in training."""
        if self.monitor is not None:
            self.monitor.close()
