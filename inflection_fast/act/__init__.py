"""Acting: adapters and other interventions on exactly the planned blocks. The only part that imports peft."""

from .find import find_inflection_target_modules
from .inherit import drop, inherit
from .inject import dead_adapters, inject
from .learning_rates import learning_rates, parameter_groups
from .lisa import lisa
from .restore import restore_adapter
from .sigma import sigma_reparametrisation
from .temperature import attention_temperature
from .unfreeze import unfreeze

__all__ = [
    "attention_temperature",
    "dead_adapters",
    "drop",
    "find_inflection_target_modules",
    "inherit",
    "inject",
    "learning_rates",
    "lisa",
    "parameter_groups",
    "restore_adapter",
    "sigma_reparametrisation",
    "unfreeze",
]
