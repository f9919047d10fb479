"""Short trainings under every intervention, alone or as one of two processes (run as a script)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from inflection_fast import find_blocks

STEPS, HALVES = 4, 2


def interventions() -> dict:
    """How each is applied, by name."""
    from inflection_fast import act

    return {
        "temperature": lambda model: act.attention_temperature(model, [0, 1], start=2.0, end=1.0, steps=3),
        "entropy": lambda model: act.attention_entropy_loss(model, 2.5, weight=1.0, rows=4, add_to_loss=True),
        "dropout": lambda model: act.head_dropout(model, [0, 1], p=0.5),
        "lisa": lambda model: act.lisa(model, active=1, interval=1),
        "unfreezing": lambda model: act.unfreeze(model, [1]),
        "sigma": lambda model: act.sigma_reparametrisation(model, [1], keep=True),
        "fewer blocks": lambda model: act.drop(model, [1]),
        "heads": lambda model: act.reinitialise_heads(model, [0], heads=[1]),
        "feed-forward": lambda model: act.reset_feed_forward(model, [0]),
    }


def halves() -> list[dict]:
    """Of the batch of every step, as equal in size as in number of tokens: means of them are means of the whole."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 40, (HALVES * 2, 9), generator=generator)
    labels = torch.tensor([0, 1, 1, 0])
    return [{"input_ids": ids[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2)]


def model_of():
    import helpers.tiny_models as tiny

    torch.manual_seed(0)
    return tiny.sharpened(tiny.bert().train())


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(name, manner="plain", rank=None, saved=None, steps=range(STEPS)) -> dict[str, torch.Tensor]:
    """The weights after the steps. Into an empty `saved` goes the run after two of them; a full one is resumed."""
    model, parts = model_of(), halves()
    wrapped = model
    if manner == "sharded":
        handle = interventions()[name](model)
        for block in find_blocks(model):
            fully_shard(block.module)
        fully_shard(model)
    elif rank is not None and name == "lisa":  # which parameters train changes, so DDP has to know all of them
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        handle = interventions()[name](wrapped)
    else:
        handle = interventions()[name](model)
        if rank is not None:
            wrapped = DistributedDataParallel(model, find_unused_parameters=name == "unfreezing")
    if manner == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = torch.compile(wrapped, backend="eager") if manner == "compiled" else wrapped
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=manner == "scaled")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if saved and steps[0]:
        model.load_state_dict(saved["model"])
        if hasattr(handle, "load_state_dict"):
            handle.load_state_dict(saved["handle"])
    for step in steps:
        for half in range(HALVES) if rank is None else [rank]:
            torch.manual_seed(100 * step + half)  # what a head dropout draws
            loss = run(**parts[half]).loss / (HALVES if rank is None else 1)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(handle, "step"):
            handle.step()
        if saved is not None and step == 1 and not saved:
            saved["model"] = {key: value.clone() for key, value in model.state_dict().items()}
            saved["handle"] = handle.state_dict() if hasattr(handle, "state_dict") else None
    weights = {key: whole(value).detach().clone() for key, value in model.state_dict().items()}
    if not handle.permanent:
        handle.remove()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert handle.permanent or not frozen, f"{name} left {frozen} frozen"
    return weights


def main(folder: Path) -> None:
    """One rank's part of all trainings."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    for manner in ("plain", "sharded"):
        found = {name: train(name, manner, rank=rank) for name in interventions()}
        torch.save(found, folder / f"{manner}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
