"""Pytest plugin: every operator that has a CUDA kernel runs it, compiled as C++ for the emulator, on CPU tensors.

    python -m pytest -p tests.emulation.plugin tests/test_sum_of_squares.py

The tests are those of the CPU kernels; where they run once per instruction set, they run once here. The session fails
if no kernel was launched.
"""

import ctypes
from pathlib import Path

import pytest
import torch

from inflection_fast import ops  # noqa: F401  (defines the operators that the library takes over)

from .build import LIBRARY, build

FOLDER = Path(__file__).resolve().parents[2] / "build" / "emulation"


def pytest_configure(config):
    """Compile what changed, load it, and remember how to count launches."""
    sanitize = config.pluginmanager.has_plugin("tests.emulation.sanitized")
    folder = FOLDER / ("sanitized" if sanitize else "plain")
    is_worker = hasattr(config, "workerinput")  # of xdist: whoever started it has compiled
    library = folder / LIBRARY if is_worker else build(folder, sanitize=sanitize)
    torch.ops.load_library(str(library))
    counts = ctypes.CDLL(str(library))
    for name in ("emulator_launches", "emulator_products"):
        getattr(counts, name).restype = ctypes.c_long
        setattr(config, name, getattr(counts, name))
    config.launches_of_workers = 0
    if config.pluginmanager.has_plugin("xdist"):
        config.pluginmanager.register(Workers(config))


class Workers:
    """Adds up what the workers of xdist launched."""

    def __init__(self, config):
        self.config = config

    def pytest_testnodedown(self, node, error):
        """A worker that crashed has reported nothing."""
        self.config.launches_of_workers += getattr(node, "workeroutput", {}).get("launches", 0)


def launches_of(config):
    """Kernel launches of this process and of its workers."""
    return config.emulator_launches() + config.launches_of_workers


def pytest_collection_modifyitems(config, items):
    """Keep one instruction set: the emulated kernels know none."""
    kept = [item for item in items if not hasattr(item, "callspec") or item.callspec.params.get("isa", 0) == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_sessionfinish(session, exitstatus):
    """A session without a launch has shown nothing."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = launches_of(session.config)
    elif exitstatus == pytest.ExitCode.OK and launches_of(session.config) == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Say how much ran."""
    terminalreporter.write_line(f"{launches_of(config)} emulated kernel launches")
