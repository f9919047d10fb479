"""The worked example of docs/own_operator.md: its ten files are put where it says, built, tested and measured."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import programs
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "own_operator.md"
pytestmark = pytest.mark.sources
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# One instruction set is enough here; the rest of the kernels is in the library that is loaded already.
KERNEL = """
#define INFLECTION_ISA portable
#define INFLECTION_VECTOR_BYTES 16
#include "cpu/row_squares.inc"
namespace inflection {
void row_squares_cpu(const RowSquaresArgs& args, int64_t a, int64_t b) { portable::row_squares(args, a, b); }
}
"""
PLUGIN = """
import sys, torch
from pathlib import Path
from importlib.util import module_from_spec, spec_from_file_location
from inflection_fast import ops
from inflection_fast.ops import reference
here = Path(__file__).parent
torch.ops.load_library(here / "example.so")
spec = spec_from_file_location("inflection_fast.ops.row_squares", here / "inflection_fast/ops/row_squares.py")
module = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(module)
ops.row_squares = module.row_squares
exec((here / "inflection_fast/ops/reference.py").read_text(), vars(reference))
"""


def blocks():
    """(path, code) of every block of the page, in order."""
    found, path = [], None
    for part in re.split(r"^(```\w+\n.*?^```)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        code = re.fullmatch(r"```\w+\n(.*?)```", part, re.DOTALL)
        if code:
            found.append((path, code[1]))
        elif headings := re.findall(r"^\*\*\d+\. `([^`]+)`\*\*", part, re.MULTILINE):
            path = headings[-1]
    return found


def inserted(name, *pairs):
    """A file of ours with each of the additions before its anchor, which it has once."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for anchor, addition in pairs:
        assert text.count(anchor) == 1, f"{name}: {anchor}"
        text = text.replace(anchor, addition + anchor)
    return text


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The tree with the operator in it, and its library."""
    folder = tmp_path_factory.mktemp("operator")
    for name in ("csrc", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "study", "__pycache__"))
    arguments, entry = (code for path, code in blocks() if path == "csrc/kernels.h")
    rest = {path: code for path, code in blocks() if path != "csrc/kernels.h"}
    assert len(rest) == 9
    header = inserted(
        "csrc/kernels.h",
        ("// ---- every CPU kernel", arguments + "\n"),
        ("  X(sum_of_squares, SumOfSquaresArgs)", entry),
    )
    rest["csrc/kernels.h"] = header
    include = '#include "sum_of_squares.inc"\n'
    rest["csrc/cpu/kernels.inc"] = inserted("csrc/cpu/kernels.inc", (include, rest["csrc/cpu/kernels.inc"]))
    for path, code in rest.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code, encoding="utf-8")
    (folder / "kernel.cpp").write_text(KERNEL)
    (folder / "plugin.py").write_text(PLUGIN)
    includes = [f"-I{folder / 'csrc'}", *(f"-I{path}" for path in include_paths())]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    sources = [str(folder / "kernel.cpp"), str(folder / "csrc/torch/row_squares.cpp")]
    subprocess.run(["c++", "-shared", *FLAGS, *includes, *sources, "-o", folder / "example.so", *link], check=True)
    return folder


def test_the_list_of_kernels_makes_a_launcher_for_it(example):
    code = subprocess.run(
        ["c++", "-E", *FLAGS, f"-I{example / 'csrc'}", str(example / "csrc/cpu/isa.cpp")],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "void row_squares_cpu(const RowSquaresArgs& args, int64_t begin, int64_t end)" in code


def test_its_cuda_kernel_compiles_as_the_emulator_takes_it(example):
    includes = [f"-I{ROOT / 'tests/emulation'}", f"-I{example / 'csrc'}", "-DINFLECTION_EMULATION"]
    subprocess.run(
        ["c++", "-x", "c++", "-fsyntax-only", *FLAGS, *includes, str(example / "csrc/cuda/row_squares.cu")], check=True
    )


def test_its_test_passes_and_its_benchmark_runs(example):
    sources = [str(example / "tests/test_row_squares.py"), str(example / "benchmarks/bench_row_squares.py")]
    options = ["-p", "plugin", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(example), "-q"]
    paths = f"{example}:{ROOT}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = programs.run(["-m", "pytest", *options, *sources], example, environment={**outside, "PYTHONPATH": paths})
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert list((example / "benchmarks" / "results").glob("*.json")), done.stdout


def test_contributing_lists_the_same_ten_files():
    listed = re.findall(r"^\d+\. `([^`]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = list(dict.fromkeys(path for path, _ in blocks()))
    assert listed == [path.replace("row_squares", "<stem>") for path in named] and len(listed) == 10
