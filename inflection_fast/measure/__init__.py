"""Measure a transformer while it trains: attention, gradients and features of every block, on scheduled steps."""

from .config import MonitorConfig
from .cost import Overhead, measure_overhead
from .monitor import Monitor
from .packet import Row

__all__ = ["Monitor", "MonitorConfig", "Overhead", "Row", "measure_overhead"]
