"""Pytest plugin: every operator that has a CUDA kernel runs it on the GPU, though the tests hold CPU tensors.

    PYTHONPATH=tests python -m pytest -p on_cuda tests/test_sum_of_squares.py

Each call moves its tensors to the device with their strides and their offset, runs the kernel there and moves the
results back; so the cases are those of the CPU kernels. The session fails if nothing ran on the device.
"""

import pytest
import torch

from inflection_fast import ops  # noqa: F401  (defines the operators)

OPERATORS = (
    "activation_moments",
    "sum_of_squares",
    "attention_stats",
    "attention_stats_backward",
    "attention_stats_qk",
    "attention_stats_qk_backward",
    "attention_column_mass",
    "cka_push",
    "cka_adopt",
    "cka_gram_terms",
    "cka_terms",
)
WRITTEN = {"cka_push": 2, "cka_adopt": 2}  # so many of the first arguments are written to
calls = dict.fromkeys(OPERATORS, 0)


def moved(value, device):
    """`value` on `device`: a tensor as the same view of a copy of its whole storage, anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def redirected(name, device):
    """The operator `name` for CPU tensors, carried out on `device`."""
    operator = getattr(torch.ops.inflection_fast, name)

    def run(*arguments):
        calls[name] += 1
        there = moved(arguments, device)
        result = operator(*there)
        for mine, theirs in zip(arguments[: WRITTEN.get(name, 0)], there, strict=False):
            mine.copy_(theirs)
        return moved(result, "cpu")

    return run


def pytest_configure(config):
    """Take the operators over; keep the registration alive as long as the session."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("on_cuda: torch sees no CUDA device")
    config.on_cuda = torch.library.Library("inflection_fast", "IMPL")
    for name in OPERATORS:
        config.on_cuda.impl(name, redirected(name, "cuda"), "CPU", allow_override=True)


def pytest_collection_modifyitems(config, items):
    """Keep one instruction set: the CUDA kernels know none."""
    kept = [item for item in items if not hasattr(item, "callspec") or item.callspec.params.get("isa", 0) == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_sessionfinish(session, exitstatus):
    """A session that never reached the device has shown nothing."""
    if exitstatus == pytest.ExitCode.OK and not any(calls.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Say how much ran."""
    terminalreporter.write_line(f"calls on CUDA: {calls}")
