"""Adapters by default in a model of any type: where they are, and whether a step of training reaches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from inflection_fast import Plan, dead_adapters, find_blocks, inject
from inflection_fast.act.targets import is_linear


@dataclass
class Injection:
    """What `inject` without target modules did in every other block of a model."""

    status: str  # "trained", "dead", "outside", "refused"
    rules: dict[str, int] = field(default_factory=dict)  # rule -> blocks
    modules: int = 0
    note: str = ""

    def __str__(self) -> str:
        rules = ", ".join(self.rules)
        return f"{rules}: {self.modules}" if self.status == "trained" else f"{self.status}: {self.note}"


def plan_of_every_other(model: nn.Module, among: Sequence[int] | None = None) -> Plan:
    """A plan of every other block with a linear layer, of all or `among` those given."""
    blocks = find_blocks(model)
    layers = tuple(among or range(len(blocks)))
    linear = tuple(i for i in layers if any(is_linear(module) for module in blocks[i].module.modules()))
    layers = (linear or layers)[::2]
    names = [block.name for block in blocks]
    made_for = {"model_type": model.config.model_type, "class": type(model).__name__, "named": False, "layers": names}
    return Plan(layers, "", {i: "because" for i in layers}, np.zeros(len(blocks)), {}, {}, made_for)


def injection(model: nn.Module, batch: dict, among: Sequence[int] | None = None) -> Injection:
    """Inject, and train one step. The model is changed; `ValueError` is a result, other errors are raised.

    `among`: indices of the blocks that a gradient reaches, as a measured plan has them; None: all.
    """
    try:
        plan = plan_of_every_other(model, among)
        paths = [find_blocks(model)[layer].path for layer in plan.layers]
        adapted = inject(model, plan)
    except ValueError as error:
        return Injection("refused", note=" ".join(str(error).split())[:200])
    ran: set[str] = set()  # modules: an adapter whose holder did not run for this batch cannot learn from it
    for name, module in adapted.get_base_model().named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    record = adapted.inflection_plans["default"].actions[0]
    result = Injection("trained", dict(Counter(record["rules"].values())), len(record["modules"]))
    trained = [name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    outside = [n for n in trained if not any(n.startswith(f"{path}.") for path in paths)]
    number = number_of(adapted(**batch))
    if not isinstance(number, torch.Tensor):  # as under activation checkpointing: reversible layers (Reformer)
        adapted.enable_input_require_grads()
        number = number_of(adapted(**batch))
    number.backward()
    dead = [name.removeprefix("base_model.model.") for name in dead_adapters(adapted)]
    dead = [name for name in dead if name.rpartition(".")[0] in ran]
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3).step()
    for status, names in (("outside", outside), ("dead", dead)):
        if names:
            result.status, result.note = status, ", ".join(names[:3])
    return result


def number_of(output) -> torch.Tensor:
    """A random projection of everything that a model returns: a mean square may be constant behind a norm."""
    tensors, queue = [], [output]
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Tensor) and value.requires_grad:
            tensors.append(value.float())
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, (list, tuple)):
            queue += value
    generator = torch.Generator().manual_seed(1)
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)
