"""The same plugin, with AddressSanitizer and UndefinedBehaviorSanitizer in the kernels; ASan has to be preloaded."""

from .plugin import pytest_collection_modifyitems, pytest_configure, pytest_sessionfinish, pytest_terminal_summary

__all__ = ["pytest_collection_modifyitems", "pytest_configure", "pytest_sessionfinish", "pytest_terminal_summary"]
