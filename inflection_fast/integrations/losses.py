"""The losses that Accelerate differentiates, which every Trainer uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["listen_to_losses", "sum_of_means"]

Listener = Callable[[Any, Tensor], None]
_listeners: list[Listener] = []
_backward: Callable[..., Any] | None = None  # that of Accelerate, while there are listeners


def listen_to_losses(listener: Listener) -> Callable[[], None]:
    """Call `listener(accelerator, loss)` before every `Accelerator.backward`, until the returned function is called.

    The loss is detached and divided by the accumulation steps of Accelerate, as it is differentiated, but without the
    scale of a gradient scaler. Without listeners Accelerate is not patched.
    """
    global _backward
    from accelerate.accelerator import Accelerator

    _listeners.append(listener)
    if _backward is None:
        _backward, Accelerator.backward = Accelerator.backward, _backward_with_listeners

    def stop() -> None:
        global _backward
        if listener in _listeners:
            _listeners.remove(listener)
        # A later patch of someone else calls ours, so ours stays then.
        if not _listeners and Accelerator.backward is _backward_with_listeners:
            Accelerator.backward, _backward = _backward, None

    return stop


def sum_of_means(losses: Sequence[Tensor]) -> Tensor | None:
    """The sum of the means of the losses of micro-batches, float32 []; None for no losses."""
    return torch.stack([loss.float().mean() for loss in losses]).sum() if losses else None


def _backward_with_listeners(accelerator: Any, loss: Tensor, **options: Any) -> Any:
    from accelerate.utils import DistributedType

    for listener in list(_listeners):
        # With DeepSpeed Accelerate does not divide.
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        listener(accelerator, loss.detach() / (1 if deepspeed else accelerator.gradient_accumulation_steps))
    assert _backward is not None  # it is set before this function replaces it
    return _backward(accelerator, loss, **options)
