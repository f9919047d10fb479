"""How the code of a module's class uses the weights of its children."""

from __future__ import annotations

import dis
import inspect

__all__ = ["read_directly"]

_HARMLESS = {"dtype", "device", "shape", "ndim", "is_cuda"}  # attributes of a weight that do not use its values
_READ: dict[type, frozenset[str]] = {}  # results by class, because reading code takes time


def read_directly(cls: type) -> frozenset[str]:
    """Attributes of a class whose `weight` or `bias` one of its methods uses, as in `self.out_proj.weight`."""
    if cls in _READ:
        return _READ[cls]
    found: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.startswith("torch.nn.modules.module"):
            continue
        for name, function in vars(owner).items():
            # The code inside a decorator uses the weights, not the decorator.
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is None or name.startswith(("_init", "init", "reset", "tie", "_tie", "extra_repr", "__init__")):
                continue
            before: list[dis.Instruction | None] = [None, None]
            ops = [op for op in dis.get_instructions(code) if op.opname not in ("CACHE", "RESUME", "NOP")]
            for op, after in zip(ops, [*ops[1:], None], strict=True):
                reads = op.opname == "LOAD_ATTR" and op.argval in ("weight", "bias")
                asks = after is not None and after.opname == "LOAD_ATTR" and after.argval in _HARMLESS
                if reads and not asks and before[1] is not None and before[1].opname == "LOAD_ATTR":
                    found.add(before[1].argval)
                before = [before[1], op]
    return _READ.setdefault(cls, frozenset(found))
