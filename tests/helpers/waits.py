"""Operators that make the host wait for a device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
# The host waits to hear whether these have gone well.
WAITING += ("_linalg_check_errors", "_linalg_eigh", "_linalg_eigvals", "_linalg_svd", "linalg_eig", "linalg_lstsq")


class Waits(TorchDispatchMode):
    """Counts operators after which the host knows a number of the device, or for which it hands one over."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING or (name.startswith("index") and self._by_mask(args)):
            self.found[name] += 1
        elif name == "lift_fresh":  # torch.tensor([...])
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(args):
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
