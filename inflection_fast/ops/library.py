"""Loads the operator libraries: the CPU library always, the CUDA library if torch has CUDA.

Importing this module defines all ``torch.ops.inflection_fast.*`` operators. If a library is missing or cannot be
opened, the ImportError names the command that rebuilds it. There is no slower fallback.
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
            f"({error.__cause__ or error}); "  # torch's own error names only the file, its cause the reason
            f"it needs torch >= 2.10 on the platform it was built for; rebuild it with: {REBUILD}"
        ) from error
    return found[0]


CPU_LIBRARY = load("_cpu")
# A wheel built without a CUDA toolkit has no CUDA library. Its operators refuse CUDA tensors, and `doctor` reports it.
CUDA_LIBRARY = load("_cuda") if torch.version.cuda and list(FOLDER.glob("_cuda.*")) else None


def build_info() -> dict:
    """The loaded libraries: ``{"cpu": {"path", "isa"}, "cuda": {"path"} or None}``; `isa`: instruction set in use."""
    isa = ISA_NAMES[torch.ops.inflection_fast.cpu_isa(-1)]
    return {
        "cpu": {"path": str(CPU_LIBRARY), "isa": isa},
        "cuda": {"path": str(CUDA_LIBRARY)} if CUDA_LIBRARY else None,
    }


def refuse_second_derivative(operator: str) -> None:
    """Make differentiation of `operator`, itself a derivative, an error. Torch would only warn and return zeros."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{operator}: second derivatives are not implemented")

    torch.library.register_autograd(operator, backward)
