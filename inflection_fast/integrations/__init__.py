"""Where the monitor meets training frameworks."""

from inflection_fast.integrations.callback import InflectionCallback

__all__ = ["InflectionCallback"]
