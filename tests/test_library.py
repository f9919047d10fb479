"""The operator library as a file: a missing or foreign one is an ImportError that says what mends it."""

import shutil
import subprocess

import pytest
from helpers import programs

from inflection_fast import build_info
from inflection_fast.ops import library

PROBE = """
import sys
from pathlib import Path
from inflection_fast.ops import library
library.FOLDER = Path(sys.argv[1])
try:
    library.load("_cpu")
except ImportError as error:
    print(error)
"""


def refused(folder):
    done = programs.run(["-c", PROBE, folder], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_library_is_an_import_error_that_names_the_command(tmp_path):
    told = refused(tmp_path)
    assert str(tmp_path) in told and library.REBUILD in told


@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "text"])
def test_a_library_that_cannot_be_opened_is_an_import_error_that_names_the_command(tmp_path, content):
    (tmp_path / library.CPU_LIBRARY.name).write_bytes(content)
    told = refused(tmp_path)
    assert library.CPU_LIBRARY.name in told and "torch >= 2.10" in told and library.REBUILD in told
    assert "file too short" in told or "invalid ELF header" in told  # why, which torch's own message leaves out


def listed(stem, *command):
    """What a program of binutils says of a library: the CUDA one can be read where it cannot be loaded."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) reads a library")
    path = next(library.FOLDER.glob(f"{stem}.*so"), None)
    if path is None:
        pytest.skip(f"no {stem} library was built")
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_a_library_asks_torch_for_its_stable_interface_only(stem):
    names = [line.split()[-1] for line in listed(stem, "nm", "-D", "--undefined-only").splitlines()]
    of_torch = [name for name in names if name.startswith(("aoti_torch", "torch_"))]
    assert of_torch, "the library calls torch through its C interface"
    # Mangled names of torch's C++ namespaces change between versions; Python's would bind it to an interpreter.
    foreign = [name for name in names if any(part in name for part in ("2at", "3c10", "5torch", "N2at", "_Py", "Py_"))]
    # The runtime is linked statically, so that the wheel needs a driver and no toolkit of its version.
    foreign += [name for name in names if name.startswith(("cuda", "__cuda", "cuInit", "nv"))]
    assert foreign == []


def test_the_cuda_library_finds_that_of_torch_wherever_it_was_linked():
    """libtorch_cuda, which no CPU build of torch has, is found through libtorch, which as needed is not named."""
    assert "[libtorch.so]" in listed("_cuda", "readelf", "-d", "-W")


def test_build_info_names_the_instruction_set_in_use():
    info = build_info()
    assert info["cpu"]["isa"] in library.ISA_NAMES and info["cpu"]["path"].endswith(".so")
