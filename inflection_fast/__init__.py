"""Attention entropy, CKA and gradient diagnostics of transformers while they train, and LoRA where they point."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# isort: off
if TYPE_CHECKING:  # what editors and type checkers see; the same names as in the table below
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

# Every public name and the module that holds it. Resolved on first use, so that importing the package costs nothing and
# loads neither transformers, peft, matplotlib nor pyarrow.
_HOMES = {
    "Monitor": "measure",
    "MonitorConfig": "measure",
    "measure_overhead": "measure",
    "Accumulator": "quantities",
    "AlertRule": "quantities",
    "Column": "quantities",
    "Quantity": "quantities",
    "DiagnoseThenInject": "integrations",
    "InflectionCallback": "integrations",
    "track": "integrations",
    "Timeline": "timeline",
    "Alert": "alerts",
    "AlertConfig": "alerts",
    "find_alerts": "alerts",
    "Plan": "decide",
    "SelectConfig": "decide",
    "select": "decide",
    "ski": "decide",
    "Comparison": "checkpoints",
    "Scan": "checkpoints",
    "compare": "checkpoints",
    "scan": "checkpoints",
    "attention_entropy_loss": "act",
    "attention_temperature": "act",
    "dead_adapters": "act",
    "debias_source": "act",
    "drop": "act",
    "find_inflection_target_modules": "act",
    "grow": "act",
    "head_dropout": "act",
    "inherit": "act",
    "inject": "act",
    "learning_rates": "act",
    "lisa": "act",
    "parameter_groups": "act",
    "reinitialise_heads": "act",
    "reset_feed_forward": "act",
    "sigma_reparametrisation": "act",
    "unfreeze": "act",
    "find_blocks": "blocks",
    "ActivationMoments": "ops",
    "AttentionColumns": "ops",
    "AttentionStats": "ops",
    "CkaBasis": "ops",
    "CkaResult": "ops",
    "CkaState": "ops",
    "RowSample": "ops",
    "activation_moments": "ops",
    "attention_column_mass": "ops",
    "attention_entropy": "ops",
    "attention_entropy_qk": "ops",
    "attention_stats": "ops",
    "attention_stats_qk": "ops",
    "build_info": "ops",
    "cka_jackknife": "ops",
    "cka_matrix": "ops",
    "delta_cka": "ops",
    "feature_rows": "ops",
    "linear_cka": "ops",
    "sum_of_squares": "ops",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
