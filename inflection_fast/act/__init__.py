"""Acting: LoRA on exactly the planned blocks. The only part of the package that imports peft."""

from .inject import inject

__all__ = ["inject"]
