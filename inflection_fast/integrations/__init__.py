"""The monitor in training frameworks: one file for each framework, loaded on first use."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from inflection_fast.integrations.after_import import when_imported

if TYPE_CHECKING:
    from inflection_fast.integrations.callback import InflectionCallback as InflectionCallback
    from inflection_fast.integrations.diagnose import DiagnoseThenInject as DiagnoseThenInject
    from inflection_fast.integrations.trackers import track as track

_HOMES = {"DiagnoseThenInject": "diagnose", "InflectionCallback": "callback", "track": "trackers"}

__all__ = [*_HOMES]


def _register(reporting: ModuleType) -> None:
    """Let `TrainingArguments(report_to="inflection")` add an InflectionCallback."""
    from inflection_fast.integrations.callback import ReportedTo

    reporting.INTEGRATION_TO_CALLBACK["inflection"] = ReportedTo


when_imported("transformers.integrations.integration_utils", _register)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
