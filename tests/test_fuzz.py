"""The same random cases every time; `make fuzz` runs others for as long as one likes."""

import pytest

pytest.importorskip("datasets")

from tests.fuzz import sums
from tests.fuzz.targets import FILES, OPERATORS, TARGETS, run_one

CASES = dict.fromkeys(OPERATORS, 40) | dict.fromkeys(FILES, 40)


@pytest.mark.parametrize("name", TARGETS)
def test_cases_that_are_always_the_same(name, on_cpu, monkeypatch):
    monkeypatch.setattr(sums.Emulated, "on", not on_cpu)
    for seed in range(CASES[name]):
        run_one(name, seed)
