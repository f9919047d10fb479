"""The losses that are differentiated by Accelerate, which is what every Trainer trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["listen_to_losses"]

Listener = Callable[[Any, Tensor], None]
_listeners: list[Listener] = []
_backward: Callable[..., Any] | None = None  # that of Accelerate, while somebody listens


def listen_to_losses(listener: Listener) -> Callable[[], None]:
    """Calls `listener(accelerator, loss)` before every `Accelerator.backward`, until the returned function is called.

    The loss, detached, is divided as Accelerate divides it before it differentiates (by its own accumulation steps),
    but not multiplied by the scale of a gradient scaler. While nobody listens, Accelerate is as it was.
    """
    _listeners.append(listener)
    _patch()

    def stop() -> None:
        if listener in _listeners:
            _listeners.remove(listener)
        if not _listeners:
            _restore()

    return stop


def _patch() -> None:
    global _backward
    from accelerate.accelerator import Accelerator

    if _backward is None:
        _backward = Accelerator.backward
        Accelerator.backward = _listened


def _restore() -> None:
    global _backward
    from accelerate.accelerator import Accelerator

    if Accelerator.backward is _listened:  # else somebody has patched it after us, and calls us
        Accelerator.backward = _backward
        _backward = None


def _listened(accelerator: Any, loss: Tensor, **options: Any) -> Any:
    from accelerate.utils import DistributedType

    for listener in list(_listeners):
        # DeepSpeed divides by itself, and the Trainer asks it not to.
        deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        listener(accelerator, loss.detach() / (1 if deepspeed else accelerator.gradient_accumulation_steps))
    assert _backward is not None  # it is set before this function takes its place
    return _backward(accelerator, loss, **options)
