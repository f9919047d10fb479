"""Acting: LoRA on exactly the planned blocks. The only part of the package that imports peft."""

from .inject import inject
from .restore import restore_adapter

__all__ = ["inject", "restore_adapter"]
