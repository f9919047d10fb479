"""The source distribution holds everything that a build needs."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.sources


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_a_build_without_torch_ends_in_a_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "install torch first" in done.stderr


def test_every_source_is_in_it(unpacked):
    listed = subprocess.run(["git", "ls-files", "csrc", "inflection_fast"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [*listed.stdout.split(), "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    present = [name for name in files if (ROOT / name).exists()]
    assert [name for name in present if not (unpacked / name).is_file()] == []
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".o", ".pyc")]


def test_every_include_is_found_in_it(unpacked):
    """The preprocessor alone takes seconds, where compiling takes minutes."""
    from torch.utils.cpp_extension import include_paths

    compiler = os.environ.get("CXX", "c++")
    include = [*include_paths(), sysconfig.get_paths()["include"], unpacked / "csrc"]
    flags = ["-E", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-o", os.devnull]
    for source in sorted((unpacked / "csrc").rglob("*.cpp")):
        command = [compiler, *flags, *(f"-I{path}" for path in include), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
