"""Mixtures of experts: entropy of the routers, and load of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks import Block
from .quantity import Accumulator, AlertRule, Column, MeasuredModel, Quantity, SubmoduleForward, Sums

__all__ = ["Router"]

_KEY = "router"


_of_layer = partial(Column, "1", ("layer",), count="rows")


class Router(Quantity):
    """Entropy of the routers' softmax over all experts, and the share of the choices that each expert gets.

    A router is a module that has `top_k` and `num_experts` and returns (logits [N, E], weights [N, k], indices [N, k]),
    as those of Mixtral, Qwen3-MoE, OLMoE and GPT-OSS in Transformers do. Over the tokens of a step:

    * `router_entropy`: mean of -sum p log p, p = softmax(logits) over the E experts; log E is undecided;
    * `router_load`: share of the k choices of all tokens that go to an expert; 1 / E is balanced (the f_i of the load
      balancing loss of Switch Transformers, arXiv 2101.03961, with k choices);
    * `router_load_max`: the largest of these shares.

    Cost: a softmax over [N, E] per layer. Memory: 8 E + 16 bytes per layer.
    """

    name = "router"

    columns = {
        "router_entropy": Column(
            unit="nats",
            axes=("layer",),
            label="entropy of the router",
            explanation="Entropy of the router's softmax over all experts, mean over tokens.",
            count="rows",
        ),
        "router_load_max": _of_layer(
            "largest share of an expert",
            "Largest share of the tokens' choices that one expert gets; 1 / experts is balanced.",
            alerts=(AlertRule("above", 0.9, kind="router_collapse"),),
        ),
        "router_load": Column(
            unit="1",
            axes=("layer", "expert"),
            label="share of an expert",
            explanation="Share of the tokens' choices that an expert gets.",
            count="rows",
            drawn="none",
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Find the routers; `ValueError` where there is none."""
        routers = [module for block in model.blocks for module in self.submodules(block).values()]
        experts = [int(getattr(module, "num_experts")) for module in routers]  # noqa: B009  (no attribute of all modules)
        if not experts:
            raise ValueError(
                "router: this model has no router with `top_k` and `num_experts` inside its blocks; leave the quantity "
                "'router' out of MonitorConfig(quantities=...)"
            )
        self.axes = {"expert": max(experts)}
        self.accumulators = {
            "rows": Accumulator("layer"),
            "entropy": Accumulator("layer"),
            "choices": Accumulator(("layer", "expert")),
        }

    def submodules(self, block: Block) -> Mapping[str, nn.Module]:
        """The router of a block."""
        found = [m for m in block.module.modules() if hasattr(m, "top_k") and hasattr(m, "num_experts") and is_leaf(m)]
        return {f"{_KEY}{i}" if i else _KEY: module for i, module in enumerate(found)}

    def on_submodule(self, sums: Sums, seen: SubmoduleForward) -> None:
        """Add the choices of a router."""
        logits, indices = logits_and_indices(seen.output)
        logits = logits.detach().flatten(0, -2).double()
        log_p = logits.log_softmax(-1)
        # A logit of -inf is an expert that is out of reach: 0 log 0 is 0.
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
        counts = torch.ones_like(entropy)
        if seen.tokens is not None:
            if seen.tokens.numel() != counts.numel():
                raise ValueError(
                    f"router of block {seen.layer}: {counts.numel()} rows for {seen.tokens.numel()} tokens"
                )
            counts = seen.tokens.flatten().to(counts.dtype)
            entropy = entropy.masked_fill(counts == 0, 0.0)
        sums["rows"][seen.layer] += counts.sum()
        sums["entropy"][seen.layer] += entropy.sum()
        indices = indices.flatten(0, -2)  # [N, k]
        sums["choices"][seen.layer].index_add_(0, indices.flatten(), counts[:, None].expand(indices.shape).reshape(-1))

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over tokens."""
        load = sums["choices"] / sums["choices"].sum(-1, keepdims=True)
        return {"router_entropy": sums["entropy"] / sums["rows"], "router_load": load, "router_load_max": load.max(-1)}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children: a router holds its weight itself, the layer around it holds the router."""
    return next(module.children(), None) is None


def logits_and_indices(output: object) -> tuple[Tensor, Tensor]:
    """What a router returned; `ValueError` if it is not (logits, weights, indices)."""
    if isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, Tensor) for x in output):
        logits, _, indices = output
        if logits.is_floating_point() and not indices.is_floating_point():
            return logits, indices
    raise ValueError(f"router: expected (logits, weights, indices) from it, got {type(output).__name__}")
