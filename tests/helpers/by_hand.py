"""Quantities without a Monitor: their sums as plain tensors, their taps called by hand."""

from types import SimpleNamespace

import numpy as np
import torch

START = {"sum": 0.0, "max": -torch.inf}


def sums_of(quantity, layers, heads=1):
    """The accumulators of a quantity as a step begins."""
    sizes = {"layer": layers, "head": heads}
    sizes |= {axis: places if isinstance(places, int) else len(places) for axis, places in quantity.axes.items()}
    return {
        name: torch.full([sizes[axis] for axis in a.axes], START[a.join], dtype=getattr(torch, a.dtype))
        for name, a in quantity.accumulators.items()
    }


def values_of(quantity, sums):
    """The columns, with shapes checked and NaN where nothing was counted."""
    arrays = {name: value.double().numpy() for name, value in sums.items()}
    with np.errstate(all="ignore"):
        values = {name: np.array(value, dtype=np.float64) for name, value in quantity.values(arrays).items()}
    assert set(values) <= set(quantity.columns)
    for name, value in values.items():
        column = quantity.columns[name]
        if column.count is not None:
            counted = arrays[column.count] != 0
            assert counted.shape == value.shape[: counted.ndim]
            counted = counted.reshape(counted.shape + (1,) * (value.ndim - counted.ndim))
            values[name] = np.where(counted, value, np.nan)
    return SimpleNamespace(**values)


def measured(model, blocks=(), **config):
    """What `prepare` is told."""
    from inflection_fast.quantities.quantity import MeasuredModel

    settings = SimpleNamespace(**{"cka_debiased": True, "cka_rank": None} | config)
    return MeasuredModel(model, tuple(blocks), torch.device("cpu"), settings)


class HandParameters:
    """Parameters as taps get them, of one process; see `quantities.quantity.Parameters`."""

    def __init__(self, blocks):
        first = {}
        for block in blocks:
            for name, parameter in block.module.named_parameters():
                first.setdefault(parameter, (block.index, name))
        self.parameters, self._count = tuple(first), len(blocks)
        self.layers, self.names = (tuple(one[i] for one in first.values()) for i in (0, 1))

    def gradients(self):
        """Of those that have one."""
        found = [
            (i, n, p.grad)
            for i, n, p in zip(self.layers, self.names, self.parameters, strict=True)
            if p.grad is not None
        ]
        return tuple([one[i] for one in found] for i in range(3))

    def squares(self, tensors, layers):
        """Summed by layer."""
        total = torch.zeros(self._count, dtype=torch.float64)
        for tensor, layer in zip(tensors, layers, strict=True):
            total[layer] += tensor.double().square().sum()
        return total

    def marked(self, layers):
        """1 at those layers."""
        return torch.tensor([float(layer in set(layers)) for layer in range(self._count)], dtype=torch.float64)


def stack_of_linears(layers=2, width=6):
    """A model whose blocks are linear layers, and the blocks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
    return model, [SimpleNamespace(index=i, name=f"{i}", module=module, stack="") for i, module in enumerate(model)]
