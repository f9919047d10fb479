"""The monitor as a callback of MosaicML Composer, and of llm-foundry by the name "inflection" in its YAML.

Written against Composer 0.32 and llm-foundry 0.22, which ask for a torch below 2.7.1: the tests stand on a stand-in.
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

    A step ends after the micro-batches of a batch have gone back, before the optimizer steps. Scalars go to Composer's
    loggers under the number of the batch.

    Args:
        config: what and when; a mapping of its fields, as a YAML file holds it, will do.
        out: folder of the timeline; a timeline that is there is kept, and a new folder beside it is taken.
        keys: patterns of scalars beside the dozen; see `inflection_fast.integrations.scalars`.
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
        """Attaches."""
        self.close(state, logger)
        model: nn.Module = state.model
        on_row = lambda row: logger.log_metrics(self._scalars.of(row), step=row.step)  # noqa: E731
        self.monitor = Monitor(model, self.config, self.out, on_row=on_row, if_exists="new")
        self.monitor.__enter__()

    def after_train_batch(self, state: Any, logger: Any) -> None:
        """Ends a step; Composer has unscaled the gradients by then, and steps the optimizer next."""
        if self.monitor is not None:
            # There is a scaler always, which multiplies losses in this precision only.
            self.monitor.step(scaler=state.scaler if state.precision == "amp_fp16" else None)

    def fit_end(self, state: Any, logger: Any) -> None:
        """Detaches."""
        self.close(state, logger)

    def close(self, state: Any, logger: Any) -> None:
        """Composer calls it also when training has raised."""
        if self.monitor is not None:
            self.monitor.close()
