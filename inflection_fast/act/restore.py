"""A saved adapter, loaded into the model that it was made for."""

from __future__ import annotations

import os
from pathlib import Path

import peft
from torch import nn

from ..decide import Plan
from .inject import attach_plan

__all__ = ["restore_adapter"]


def restore_adapter(model: nn.Module, folder: str | os.PathLike) -> peft.PeftModel:
    """`model` with the frozen adapter that `PeftModel.save_pretrained` wrote to `folder`, for evaluation.

    A plan beside the adapter is attached to the model. `ValueError` if peft finds no adapter in `folder`.
    """
    adapted = peft.PeftModel.from_pretrained(model, os.fspath(folder))
    if (Path(folder) / Plan.FILE).is_file():
        attach_plan(adapted, Plan.from_pretrained(folder), "default")
    return adapted
