"""Acting: adapters and other interventions on exactly the planned blocks. The only part that imports peft."""

from .find import find_inflection_target_modules
from .inject import dead_adapters, inject
from .learning_rates import learning_rates, parameter_groups
from .lisa import lisa
from .restore import restore_adapter
from .unfreeze import unfreeze

__all__ = [
    "dead_adapters",
    "find_inflection_target_modules",
    "inject",
    "learning_rates",
    "lisa",
    "parameter_groups",
    "restore_adapter",
    "unfreeze",
]
