"""Where the results of benchmarks are filed: one file for each kind of processor, however little its name says."""

import importlib.util
from pathlib import Path

import pytest

CASES = Path(__file__).resolve().parent.parent / "benchmarks" / "cases.py"
EPYC = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"


@pytest.fixture(scope="module")
def cases():
    spec = importlib.util.spec_from_file_location("cases_of_benchmarks", CASES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generations_of_one_name_have_files_of_their_own(cases, monkeypatch):
    names = [cases.cpu_model(EPYC.format(family=family, model=model)) for family, model in ((23, 1), (25, 17))]
    assert names == ["AMD EPYC (family 23, model 1)", "AMD EPYC (family 25, model 17)"]
    paths = []
    for name in names:
        monkeypatch.setattr(cases, "cpu_model", lambda text, name=name: name)
        paths.append(cases.results_path().name)
    assert paths[0].startswith("amd-epyc-family-23-model-1-") and paths[1].startswith("amd-epyc-family-25-model-17-")


def test_a_processor_that_has_no_name_is_told_by_its_part(cases):
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nprocessor\t: 1\nCPU part\t: 0xd41\n"
    assert cases.cpu_model(arm) == "Arm (implementer 0x41, part 0xd40)"
    assert cases.cpu_model("") == ""
