"""Other people's CKA of two sets of rows [N, D], as their packages compute it; absent packages are named, not replaced.

`pip install --no-deps pytorch-cka torch-cka ckatorch seaborn`, or the extra `bench`, makes them present.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

BATCH = 256


def plain(x: Tensor, y: Tensor) -> Tensor:
    """Biased CKA in the dtype of the rows, as one would write it."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def feature_space(x: Tensor, y: Tensor) -> Tensor:
    """The debiased formula of Kornblith et al. (2019) that anatome uses, in the dtype of the rows."""
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.square().sum(1), b.square().sum(1)
        return (a.T @ b).square().sum() - n / (n - 2) * p @ q + p.sum() * q.sum() / ((n - 1) * (n - 2))

    return product(x, y) / (product(x, x) * product(y, y)).sqrt()


def rivals() -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], list[str]]:
    """Estimators of one pair by name, and the packages that are not there."""
    found: dict[str, Callable] = {"plain PyTorch": plain, "anatome's formula": feature_space}
    absent = []
    for name, make in (("pytorch-cka", pytorch_cka), ("torch-cka", torch_cka), ("ckatorch", ckatorch)):
        try:
            found |= make()
        except ImportError as error:
            absent.append(f"{name} ({error})")
    return found, absent


def pytorch_cka() -> dict[str, Callable]:
    """At once, and by minibatches added up as its `CKA` class does."""
    from cka import cka_from_features
    from cka.hsic import hsic

    def minibatch(x: Tensor, y: Tensor) -> Tensor:
        cross, own_x, own_y = (
            sum(terms) for terms in zip(*(hsic(*grams(a, b)) for a, b in batches(x, y)), strict=True)
        )
        return (cross / (own_x * own_y).clamp(min=0).sqrt()).clamp(0, 1)[0, 0]

    return {"pytorch-cka, all rows": lambda x, y: cka_from_features(x, y)[0, 0], "pytorch-cka": minibatch}


def torch_cka() -> dict[str, Callable]:
    """Its own HSIC over minibatches, added up as its `compare` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_cka import CKA

    device = type("OnCpu", (), {"device": "cpu"})

    def minibatch(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(3)
        for a, b in batches(x, y):
            k, m = ((side @ side.T).fill_diagonal_(0.0) for side in (a, b))
            total += torch.tensor([CKA._HSIC(device, *pair) for pair in ((k, m), (k, k), (m, m))])
        return total[0] / (total[1].sqrt() * total[2].sqrt())

    return {"torch-cka": minibatch}


def ckatorch() -> dict[str, Callable]:
    """Its minibatch estimate, which computes in float64; batches of one size."""
    from ckatorch.core import cka_batch

    def minibatch(x: Tensor, y: Tensor) -> Tensor:
        whole = len(x) // BATCH * BATCH
        return cka_batch(*(side[:whole].unflatten(0, (-1, BATCH)) for side in (x, y)))

    return {"ckatorch": minibatch}


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Consecutive minibatches of both sides."""
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def grams(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As pytorch-cka forms them, one layer a side."""
    return (x @ x.T)[None], (y @ y.T)[None]


def loop_over_pairs(estimate: Callable, x: Tensor, y: Tensor) -> Tensor:
    """`[L, L2]` from an estimator of one pair."""
    return torch.stack([torch.stack([estimate(a, b) for b in y]) for a in x])
