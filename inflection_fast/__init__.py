"""Attention entropy, CKA and gradient diagnostics of transformers while they train, and LoRA where they point."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# isort: off
if TYPE_CHECKING:  # for editors and type checkers: the names of the table below
    from .act import (
        attention_entropy_loss as attention_entropy_loss,
        attention_temperature as attention_temperature,
        dead_adapters as dead_adapters,
        debias_source as debias_source,
        drop as drop,
        find_inflection_target_modules as find_inflection_target_modules,
        grow as grow,
        parameter_groups as parameter_groups,
        reinitialise_heads as reinitialise_heads,
        reset_feed_forward as reset_feed_forward,
        sigma_reparametrisation as sigma_reparametrisation,
    )
    from .act.head_dropout import head_dropout as head_dropout
    from .act.inherit import inherit as inherit
    from .act.inject import inject as inject
    from .act.learning_rates import learning_rates as learning_rates
    from .act.lisa import lisa as lisa
    from .act.unfreeze import unfreeze as unfreeze
    from .alerts import Alert as Alert, AlertConfig as AlertConfig, find_alerts as find_alerts
    from .blocks import find_blocks as find_blocks
    from .checkpoints import Comparison as Comparison, Scan as Scan, compare as compare, scan as scan
    from .decide import Plan as Plan, SelectConfig as SelectConfig
    from .decide.select import select as select
    from .decide.ski import ski as ski
    from .integrations import (
        DiagnoseThenInject as DiagnoseThenInject,
        InflectionCallback as InflectionCallback,
        track as track,
    )
    from .measure import Monitor as Monitor, MonitorConfig as MonitorConfig, measure_overhead as measure_overhead
    from .ops import (
        ActivationMoments as ActivationMoments,
        AttentionColumns as AttentionColumns,
        AttentionStats as AttentionStats,
        CkaBasis as CkaBasis,
        CkaResult as CkaResult,
        CkaState as CkaState,
        RowSample as RowSample,
        activation_moments as activation_moments,
        attention_column_mass as attention_column_mass,
        attention_entropy as attention_entropy,
        attention_entropy_qk as attention_entropy_qk,
        attention_stats as attention_stats,
        attention_stats_qk as attention_stats_qk,
        build_info as build_info,
        cka_jackknife as cka_jackknife,
        cka_matrix as cka_matrix,
        delta_cka as delta_cka,
        feature_rows as feature_rows,
        linear_cka as linear_cka,
        sum_of_squares as sum_of_squares,
    )
    from .quantities import Accumulator as Accumulator, AlertRule as AlertRule, Column as Column, Quantity as Quantity
    from .timeline import Timeline as Timeline
# isort: on

__version__ = version("inflection_fast")

# The module of every public name. Names are resolved on first use, so that importing the package is cheap and loads
# neither transformers, peft, matplotlib nor pyarrow.
_NAMES = {
    "measure": ("Monitor", "MonitorConfig", "measure_overhead"),
    "quantities": ("Accumulator", "AlertRule", "Column", "Quantity"),
    "integrations": ("DiagnoseThenInject", "InflectionCallback", "track"),
    "timeline": ("Timeline",),
    "alerts": ("Alert", "AlertConfig", "find_alerts"),
    "decide": ("Plan", "SelectConfig", "select", "ski"),
    "checkpoints": ("Comparison", "Scan", "compare", "scan"),
    "act": (
        "attention_entropy_loss", "attention_temperature", "dead_adapters", "debias_source", "drop",
        "find_inflection_target_modules", "grow", "head_dropout", "inherit", "inject", "learning_rates", "lisa",
        "parameter_groups", "reinitialise_heads", "reset_feed_forward", "sigma_reparametrisation", "unfreeze",
    ),
    "blocks": ("find_blocks",),
    "ops": (
        "ActivationMoments", "AttentionColumns", "AttentionStats", "CkaBasis", "CkaResult", "CkaState", "RowSample",
        "activation_moments", "attention_column_mass", "attention_entropy", "attention_entropy_qk", "attention_stats",
        "attention_stats_qk", "build_info", "cka_jackknife", "cka_matrix", "delta_cka", "feature_rows", "linear_cka",
        "sum_of_squares",
    ),
}  # fmt: skip
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
