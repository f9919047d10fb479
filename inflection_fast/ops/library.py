"""Loads the operator libraries: the CPU one always, the CUDA one where torch has CUDA.

Importing this module defines every ``torch.ops.inflection_fast.*`` operator. A library that is missing or cannot be
opened is an ImportError that says which command mends it: there is no slower path to fall back to unnoticed.
"""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["build_info"]

FOLDER = Path(__file__).resolve().parent.parent
ISA_NAMES = ("portable", "avx2", "avx512")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps inflection_fast (in a checkout: `make build`)"


def load(stem: str) -> Path:
    """Open ``<package>/<stem>.*.so`` and return its path."""
    found = sorted(FOLDER.glob(f"{stem}.*so")) + sorted(FOLDER.glob(f"{stem}.*pyd"))
    if not found:
        raise ImportError(f"inflection_fast: no library {stem} beside {FOLDER}; build it with: {REBUILD}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise ImportError(
            f"inflection_fast: {found[0].name} cannot be loaded into torch {torch.__version__} "
            f"({error.__cause__ or error}); "  # torch names the file, the loader beneath it the reason
            f"it needs torch >= 2.10 on the platform it was built for; rebuild it with: {REBUILD}"
        ) from error
    return found[0]


CPU_LIBRARY = load("_cpu")
# A wheel built without a CUDA toolkit has no CUDA library; its operators then refuse CUDA tensors, and doctor says so.
CUDA_LIBRARY = load("_cuda") if torch.version.cuda and list(FOLDER.glob("_cuda.*")) else None


def build_info() -> dict:
    """What is loaded: ``{"cpu": {"path", "isa"}, "cuda": {"path"} or None}``; `isa` is the instruction set in use."""
    isa = ISA_NAMES[torch.ops.inflection_fast.cpu_isa(-1)]
    return {
        "cpu": {"path": str(CPU_LIBRARY), "isa": isa},
        "cuda": {"path": str(CUDA_LIBRARY)} if CUDA_LIBRARY else None,
    }


def refuse_second_derivative(operator: str) -> None:
    """Make differentiating `operator`, itself a derivative, an error: torch would otherwise warn and return zeros."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{operator}: second derivatives are not implemented")

    torch.library.register_autograd(operator, backward)
