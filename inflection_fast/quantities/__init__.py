"""One file per diagnostic: what it listens to, what it sums, what its columns mean and when they are alarming."""

from .quantity import Accumulator, AlertRule, Column, Quantity

__all__ = ["Accumulator", "AlertRule", "Column", "Quantity"]
