"""docs/quantities.md: its tables are the columns of the code; `python tests/test_quantities_doc.py` writes them."""

import importlib
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sources

DOC = Path(__file__).resolve().parent.parent / "docs" / "quantities.md"
NAMES = (
    "attention_detail",
    "residual",
    "update",
    "adapter",
    "gradient_noise",
    "rank",
    "output",
    "router",
    "spectrum",
    "trajectory",
    "layer_cka",
    "first_order",
)


def quantity(name):
    module = importlib.import_module(f"inflection_fast.quantities.{name}")
    return next(cls for cls in vars(module).values() if isinstance(cls, type) and getattr(cls, "name", None) == name)


def table(name):
    """The columns of a quantity as Markdown."""
    lines = ["| column | axes | unit | what |", "|---|---|---|---|"]
    for column, said in quantity(name).columns.items():
        axes = ", ".join(said.axes) or "step"
        rules = "".join(
            f"; alert `{r.kind or r.test}`" + ("" if r.limit is None else f" ({r.test.replace('_', ' ')} {r.limit})")
            for r in said.alerts
        )
        lines.append(f"| `{column}` | {axes} | {said.unit} | {said.explanation.rstrip('.')}{rules} |")
    return "\n".join(lines)


def section(text, name):
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"docs/quantities.md has no section {name!r}"
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_that_of_the_code(name):
    assert table(name) in section(DOC.read_text(), name), "run python tests/test_quantities_doc.py"


@pytest.mark.parametrize("name", NAMES)
def test_a_section_says_what_it_costs(name):
    assert "Cost" in section(DOC.read_text(), name) and "emory" in section(DOC.read_text(), name)


if __name__ == "__main__":
    text = DOC.read_text()
    for name in NAMES:
        old = section(text, name)
        text = text.replace(
            old, re.sub(r"\| column \|.*?(?=\n\n|\Z)", lambda _, name=name: table(name), old, flags=re.S)
        )
    DOC.write_text(text)
    sys.exit(0)
