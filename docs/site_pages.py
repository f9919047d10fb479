"""Pages of the site that are made of the code when it is built: one for every diagnostic, and the API.

`mkdocs.yml` names this file as a hook. Nothing is written into docs/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import inflection_fast
from inflection_fast.quantities import DEFAULT, QUANTITIES, Quantity

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

__all__ = ["columns_table", "on_config", "on_files", "pages"]

# Parts of the package in the order in which a run meets them, and what the page says of each.
PARTS = {
    "measure": "Measuring a model while it trains",
    "timeline": "What was measured",
    "alerts": "What goes wrong",
    "decide": "Choosing layers",
    "act": "Acting on layers",
    "integrations": "Where people train",
    "checkpoints": "Looking at checkpoints",
    "quantities": "Making a diagnostic of one's own",
    "blocks": "Finding blocks",
    "ops": "The operators",
}


def pages() -> dict[str, dict[str, str]]:
    """Section of the site -> path of a page -> its Markdown."""
    return {
        "Diagnostics": {f"diagnostics/{name}.md": _diagnostic(name) for name in QUANTITIES},
        "API": {f"api/{part}.md": _api(part) for part in PARTS},
    }


def columns_table(quantity: type[Quantity]) -> str:
    """The columns of a quantity as Markdown."""
    lines = ["| column | axes | unit | what |", "|---|---|---|---|"]
    for name, column in quantity.columns.items():
        axes = ", ".join(column.axes) or "step"
        rules = "".join(
            f"; alert `{rule.kind or rule.test}`"
            + ("" if rule.limit is None else f" ({rule.test.replace('_', ' ')} {rule.limit})")
            for rule in column.alerts
        )
        lines.append(f"| `{name}` | {axes} | {column.unit} | {column.explanation.rstrip('.')}{rules} |")
    return "\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages into the navigation, under the sections that are there."""
    assert config.nav is not None
    for section in config.nav:
        for title, entries in section.items() if isinstance(section, dict) else ():
            if title in (made := pages()):
                entries.extend({path.split("/")[1].removesuffix(".md"): path} for path in made[title])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for made in pages().values():
        for path, text in made.items():
            files.append(File.generated(config, path, content=text))
    return files


def _diagnostic(name: str) -> str:
    quantity = QUANTITIES[name]
    how = (
        "Measured unless you name others."
        if name in DEFAULT
        else f'`MonitorConfig(quantities=("attention", "{name}"))`'
    )
    where = f"{quantity.__module__}.{quantity.__qualname__}"
    options = {"heading": "In full", "heading_level": 2, "members": False}
    more = "[All diagnostics](../quantities.md), with their costs. [What NaN means](../signals.md#what-nan-means)."
    return "\n\n".join([f"# {name}", how, columns_table(quantity), _directive(where, options), more, ""])


def _api(part: str) -> str:
    names = sorted(name for name, home in inflection_fast._HOMES.items() if home.partition(".")[0] == part)
    found = [f"# {PARTS[part]}"]
    for name in names:
        thing: Any = getattr(inflection_fast, name)
        options = {"heading": name, "heading_level": 2}
        found.append(_directive(f"{thing.__module__}.{thing.__qualname__}", options))
    return "\n\n".join([*found, ""])


def _directive(where: str, options: dict[str, object]) -> str:
    """What mkdocstrings replaces by a docstring."""
    return "\n".join([f"::: {where}", "    options:", *(f"      {key}: {value}" for key, value in options.items())])
