"""An adapter that was saved, back on the model it was made for."""

from __future__ import annotations

import os

import peft
from torch import nn

__all__ = ["restore_adapter"]


def restore_adapter(model: nn.Module, folder: str | os.PathLike) -> peft.PeftModel:
    """`model` with the adapter that `PeftModel.save_pretrained` wrote to `folder`, frozen: for evaluation.

    `ValueError` where peft finds no adapter there.
    """
    return peft.PeftModel.from_pretrained(model, os.fspath(folder))
