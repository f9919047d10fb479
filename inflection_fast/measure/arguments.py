"""What goes into a module and what comes out of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["hidden_of", "loss_of", "named_inputs", "requiring_grad", "tensors_of"]


def hidden_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden state that a block is given: its first floating-point tensor."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def requiring_grad(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments of a block with a hidden state that autograd follows, if it did not: so gradients reach the block.

    A clone, not the tensor itself: the model may go on to change it in place, which a leaf would not allow, and nobody
    else's tensor is touched. The same happens when checkpointing runs the block again, or its graphs would differ.
    """
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else ((*args[:i], _followed(value), *args[i + 1 :]), kwargs)
    for name in sorted(kwargs, key=lambda name: name != "hidden_states"):  # before a mask, which is a float as well
        value = kwargs[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else (args, kwargs | {name: _followed(value)})
    return None


def _followed(hidden: Tensor) -> Tensor:
    return hidden.detach().requires_grad_().clone()


def loss_of(output: object) -> Tensor | None:
    """What a model returned under the name "loss"."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def tensors_of(output: object) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)


def named_inputs(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of the model's forward by name, where it has names for them."""
    if len(args) < 2:  # the first is the input itself, masks come later
        return kwargs
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs
