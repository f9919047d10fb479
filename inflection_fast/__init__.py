"""Attention entropy, CKA and gradient diagnostics of transformers while they train, and LoRA where they point."""

from importlib import import_module
from importlib.metadata import version

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
    "InflectionCallback": "integrations",
    "Timeline": "timeline",
    "Alert": "alerts",
    "AlertConfig": "alerts",
    "find_alerts": "alerts",
    "Plan": "decide",
    "SelectConfig": "decide",
    "select": "decide",
    "ski": "decide",
    "attention_temperature": "act",
    "dead_adapters": "act",
    "drop": "act",
    "find_inflection_target_modules": "act",
    "inherit": "act",
    "inject": "act",
    "learning_rates": "act",
    "lisa": "act",
    "parameter_groups": "act",
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


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
