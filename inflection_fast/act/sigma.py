"""Sigma reparametrisation (Zhai et al. 2023, arXiv 2303.06296): weights W become gamma * W / sigma(W).

sigma(W) is the spectral norm, gamma a trained scalar for each weight. One parameter then controls the norms of queries
and keys, which bound attention entropy from below. sigma is u^T W v with singular vectors u and v from power iteration.
It runs between optimizer steps, not in the forward pass, so that recomputed activations use the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .handle import Scheduled, check_integer
from .planned import Layers
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
    """Replace the weights W of all `nn.Linear` of blocks by gamma * W / sigma(W), each with one trained gamma.

    For training from scratch gamma starts at 1, as in the paper; with `keep` it starts at sigma(W), so that outputs
    change only by rounding. Call `step()` of the handle after each optimizer step (or use its callback): it updates the
    singular vectors by `iterations` power iterations. Make the optimizer afterwards, or add the handle's `parameters`
    to it. Checkpoints hold `original`, `gamma` and the vectors. Call `merge()` before saving a model for others: it
    stores the product as the weight. `remove()` restores W without gamma, which after training is another function.

    `ValueError` if blocks have no `nn.Linear`, or weights that are parametrised already.
    """

    name = "sigma reparametrisation"

    def __init__(self, model: nn.Module, layers: Layers = None, *, keep: bool = False, iterations: int = 1):
        check_integer("iterations", iterations)
        super().__init__(model, layers)
        self.keep, self.iterations = keep, iterations
        every = {n: m for b in self.blocks for n, m in modules_of(b) if isinstance(m, nn.Linear)}
        taken = [name for name, module in every.items() if parametrize.is_parametrized(module)]
        if taken:
            raise ValueError(f"model: {taken[0]} is parametrised already; remove the parametrisation first")
        self._linear = {name: module for name, module in every.items() if type(module) is nn.Linear}
        if not self._linear:
            raise ValueError("layers: the blocks have no nn.Linear to reparametrise")
        for module in self._linear.values():
            sigma = _Sigma(module.weight.detach(), keep)
            parametrize.register_parametrization(module, "weight", sigma, unsafe=True)
        self._hold()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The gammas, for an optimizer that exists already."""
        return [sigma.gamma for sigma, _ in self._sigmas()]

    def _sigmas(self) -> list[tuple[_Sigma, Tensor]]:
        """The parametrisations, each with its original weight."""
        found: list[tuple[_Sigma, Tensor]] = []
        for module in self._linear.values():
            held = module.get_submodule("parametrizations.weight")
            sigma, original = held.get_submodule("0"), held.get_parameter("original")
            if isinstance(sigma, _Sigma):
                found.append((sigma, original))
        return found

    def _update(self) -> None:
        for sigma, original in self._sigmas():
            gather = getattr(original, "full_tensor", None)  # of a sharded weight (FSDP2, tensor parallelism)
            sigma.iterate(original if gather is None else gather(), self.iterations)

    def load_state_dict(self, state: dict) -> None:
        """Continue from the state of `state_dict()`. The singular vectors are in the checkpoint of the model."""
        self.steps_done = state["steps_done"]

    def merge(self) -> None:
        """Replace the weights by gamma W / sigma(W) without reparametrisation, for good. Outputs do not change."""
        if self._live:
            for module in self._linear.values():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            self.remove()

    def _remove(self) -> None:
        for module in self._linear.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

    def _settings(self) -> dict:
        return {"keep": self.keep, "iterations": self.iterations, "weights": len(self._linear)}


sigma_reparametrisation = SigmaReparametrisation
