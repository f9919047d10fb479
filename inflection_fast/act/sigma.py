"""Sigma reparametrisation (Zhai et al. 2023, arXiv 2303.06296): weights W become gamma * W / sigma(W).

sigma(W) is the spectral norm, gamma a learnt number for each weight. The growth of the norms of queries and keys, which
bounds attention entropy from below, is then up to one parameter instead of to all of them. sigma is u^T W v with
singular vectors u and v from power iteration, which runs between optimizer steps and not inside the forward pass, so
that recomputed activations meet the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..decide import Plan
from .handle import Scheduled, check_steps
from .targets import modules_of

__all__ = ["SigmaReparametrisation", "sigma_reparametrisation"]

_AT_START = 30  # power iterations when it is applied


class _Sigma(nn.Module):
    u: Tensor  # [out] float32
    v: Tensor  # [in] float32

    def __init__(self, weight: Tensor, keep: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same on every rank
        u = torch.randn(weight.shape[0], generator=generator).to(weight.device, torch.float32)
        self.register_buffer("u", nn.functional.normalize(u, dim=0))
        self.register_buffer("v", torch.zeros(weight.shape[1], device=weight.device))
        self.iterate(weight, _AT_START)
        start = self.norm(weight).detach() if keep else torch.ones((), device=weight.device)
        self.gamma = nn.Parameter(start.to(weight.dtype).reshape(1))  # FSDP2 takes no parameter without dimensions

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int) -> None:
        weight = weight.float()
        for _ in range(times):
            self.v.copy_(nn.functional.normalize(weight.T @ self.u, dim=0))
            self.u.copy_(nn.functional.normalize(weight @ self.v, dim=0))

    def norm(self, weight: Tensor) -> Tensor:
        return self.u @ (weight.float() @ self.v)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.gamma / self.norm(weight)).to(weight.dtype)


class SigmaReparametrisation(Scheduled):
    """Linear layers of the chosen blocks with reparametrised weights."""

    name = "sigma reparametrisation"

    def __init__(self, model: nn.Module, where: Plan | Sequence[int] | int | None, keep: bool, iterations: int):
        check_steps("iterations", iterations)
        super().__init__(model, where)
        self.keep, self.iterations = keep, iterations
        every = {n: m for b in self.blocks for n, m in modules_of(b) if isinstance(m, nn.Linear)}
        taken = [name for name, module in every.items() if parametrize.is_parametrized(module)]
        if taken:
            raise ValueError(f"model: {taken[0]} is parametrised already; remove that first")
        self._linear = {name: module for name, module in every.items() if type(module) is nn.Linear}
        if not self._linear:
            raise ValueError("layers: the blocks have no nn.Linear whose weight could be reparametrised")
        for module in self._linear.values():
            sigma = _Sigma(module.weight.detach(), keep)
            parametrize.register_parametrization(module, "weight", sigma, unsafe=True)
        self._hold()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The gammas, for an optimizer that was made before."""
        return [sigma.gamma for sigma, _ in self._sigmas()]

    def _sigmas(self) -> list[tuple[_Sigma, Tensor]]:
        """The parametrisations, each with the weight that it is put on."""
        found: list[tuple[_Sigma, Tensor]] = []
        for module in self._linear.values():
            held = module.get_submodule("parametrizations.weight")
            sigma, original = held.get_submodule("0"), held.get_parameter("original")
            if isinstance(sigma, _Sigma):
                found.append((sigma, original))
        return found

    def _update(self) -> None:
        for sigma, original in self._sigmas():
            gather = getattr(original, "full_tensor", None)  # of a weight that ranks share (FSDP2, tensor parallelism)
            sigma.iterate(original if gather is None else gather(), self.iterations)

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict()` was taken; the singular vectors are in the checkpoint of the model."""
        self.steps_done = state["steps_done"]

    def merge(self) -> None:
        """Make gamma W / sigma(W) the plain weights: outputs stay, and the reparametrisation is gone for good."""
        self._take_off(leave_parametrized=True)

    def _remove(self) -> None:
        for module in self._linear.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    def _take_off(self, *, leave_parametrized: bool) -> None:
        if self._live:
            for module in self._linear.values():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=leave_parametrized)
            self.remove()

    def _settings(self) -> dict:
        return {"keep": self.keep, "iterations": self.iterations, "weights": len(self._linear)}


def sigma_reparametrisation(
    model: nn.Module,
    layers: Plan | Sequence[int] | int | None = None,
    *,
    keep: bool = False,
    iterations: int = 1,
) -> SigmaReparametrisation:
    """Replace the weights W of all `nn.Linear` of blocks by gamma * W / sigma(W), with one learnt gamma each.

    For training from scratch gamma starts at 1, as in the paper; with `keep` it starts at sigma(W), so that outputs
    stay as they are up to rounding. Call `step()` of the handle after each optimizer step (or use its callback): it
    follows the singular vectors by `iterations` power iterations. Make the optimizer afterwards, or add its
    `parameters`. Checkpoints hold `original`, `gamma` and the vectors while it is applied: save a model for others
    after `merge()`, which makes the product the plain weight. `remove()` puts back W, without gamma: after training
    that is another function.

    `ValueError` where blocks have no `nn.Linear`, or weights that are parametrised already.
    """
    return SigmaReparametrisation(model, layers, keep, iterations)
