"""The tables of docs/quantities.md are the columns of the code.

`PYTHONPATH=docs python tests/test_quantities_doc.py` writes them.
"""

import re
import sys
from pathlib import Path

import pytest
import site_pages

import inflection_fast
from inflection_fast.quantities import QUANTITIES

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


def table(name):
    """The columns of a quantity as Markdown."""
    return site_pages.columns_table(QUANTITIES[name])


def section(text, name):
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"docs/quantities.md has no section {name!r}"
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_that_of_the_code(name):
    assert table(name) in section(DOC.read_text(), name), "run PYTHONPATH=docs python tests/test_quantities_doc.py"


def test_every_quantity_and_every_public_name_has_a_page():
    made = site_pages.pages()
    assert list(made["Diagnostics"]) == [f"diagnostics/{name}.md" for name in QUANTITIES]
    named = {line for page in made["API"].values() for line in page.splitlines() if line.startswith("      heading: ")}
    assert named == {f"      heading: {name}" for name in inflection_fast.__all__}


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
