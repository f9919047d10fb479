"""Deciding: from the numbers of a timeline to the layers to adapt. Needs NumPy only, so a plan can be made anywhere."""

from .plan import Plan
from .select import SelectConfig, select
from .ski import ski

__all__ = ["Plan", "SelectConfig", "select", "ski"]
