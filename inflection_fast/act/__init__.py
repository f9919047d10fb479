"""Acting: adapters on exactly the planned blocks. The only part of the package that imports peft."""

from .find import find_inflection_target_modules
from .inject import dead_adapters, inject
from .restore import restore_adapter

__all__ = ["dead_adapters", "find_inflection_target_modules", "inject", "restore_adapter"]
