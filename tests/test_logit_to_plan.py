"""docs/logit_to_plan.md names the files on the way of a logit: each function it names is called, each name is there."""

import re
import sys
import threading
from pathlib import Path

import pytest
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401

import inflection_fast
from inflection_fast import Monitor, MonitorConfig, SelectConfig, select

pytestmark = pytest.mark.sources

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(inflection_fast.__file__).resolve().parent
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", (ROOT / "docs" / "logit_to_plan.md").read_text(), re.M)
README = (ROOT / "README.md").read_text()

# Called too, but no logit passes them: settings, hooks, checks of arguments, other quantities, what columns mean.
BESIDE_THE_WAY = {
    *(
        f"measure/{name}.py"
        for name in (
            "config",
            "frozen",
            "hooks",
            "parameters",
            "placements",
            "probe",
            "ranks",
            "graph",
            "graph_taps",
            "context",
            "parallel",
        )
    ),
    *(f"ops/{name}.py" for name in ("checks", "qk_arguments", "sum_of_squares")),
    *(
        f"quantities/{name}.py"
        for name in ("__init__", "activation_grad", "delta_cka", "dtensors", "parameter_grad", "calls", "step")
    ),
    *(f"timeline/{name}.py" for name in ("columns", "signals")),
}


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """(file below the package, qualified name) of every function of ours that a measured step and a selection call."""
    found, out = set(), tmp_path_factory.mktemp("run")

    def look(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            found.add((str(Path(code.co_filename).relative_to(PACKAGE)), name_of(code, frame)))

    model, batch = model_and_batch("llama")
    threading.setprofile(look)  # of the recorder's thread
    sys.setprofile(look)
    try:
        with Monitor(model, MonitorConfig(every=1), out=out) as monitor:
            for _ in range(4):
                loss_of(model(**batch)).backward()
                sys.setprofile(look)  # a compiler or a C++ callback may have taken it away
                monitor.step()
                model.zero_grad()
        plan = select(monitor.timeline, SelectConfig(method="greedy", significance=None))
        plan.save(out / "plan.json")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert (out / "plan.json").is_file()
    return found


def name_of(code, frame):
    """The qualified name; Python 3.10 knows the plain one and the class of `self` alone."""
    if hasattr(code, "co_qualname"):
        return code.co_qualname
    owner = frame.f_locals.get("self")
    return f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_name


@pytest.mark.parametrize("file, name", [row for row in ROWS if row[0].endswith(".py")])
def test_every_function_is_called_on_the_way(file, name, called):
    assert (file, name) in called


@pytest.mark.parametrize("file, name", [row for row in ROWS if not row[0].endswith(".py")])
def test_every_name_of_the_kernels_is_defined_in_its_file(file, name):
    text = (PACKAGE / file).read_text()
    assert re.search(rf"^[^/\n]*\b{re.escape(name)}\b[^;\n]*[({{]", text, re.M)


@pytest.mark.parametrize("file, line", re.findall(r"^\| [^|`]+ \| `(\S+/\S+)` \| `([^`]+)` \|$", README, re.M))
def test_every_line_that_the_readme_points_at_is_there_once(file, line):
    assert (ROOT / file).read_text().count(line) == 1


def test_no_file_of_the_package_that_the_way_must_pass_is_left_out(called):
    passed = {
        file for file, _ in called if file.split("/")[0] in ("measure", "quantities", "timeline", "decide", "ops")
    }
    named = {file for file, _ in ROWS}
    assert passed - named <= BESIDE_THE_WAY
    assert not BESIDE_THE_WAY & named
    assert len(ROWS) > 25
