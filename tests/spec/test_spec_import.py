"""Importing is cheap, honest and complete."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import inflection_fast

HEAVY = ["transformers", "peft", "matplotlib", "pyarrow", "pandas", "scipy", "accelerate", "datasets", "rich"]
PUBLIC = [
    "attention_entropy", "attention_entropy_qk", "attention_stats", "attention_stats_qk", "AttentionStats",
    "linear_cka", "delta_cka", "sum_of_squares", "CkaState", "Monitor", "MonitorConfig", "Timeline", "ski", "select",
    "SelectConfig", "Plan", "inject", "find_blocks",
]  # fmt: skip
STAGES = """
import sys
import inflection_fast as f
def report():
    torch = sys.modules.get("torch")
    print(*[name for name in HEAVY if name in sys.modules], "cuda" if torch and torch.cuda.is_initialized() else "")
report()
import torch
f.attention_entropy(torch.zeros(2, 3)); f.linear_cka(torch.rand(2, 5, 3), torch.rand(2, 5, 3))
report()
f.ski, f.select, f.SelectConfig, f.Plan, f.Timeline
report()
f.scan, f.compare, f.Monitor
report()
import rich, accelerate
report()
""".replace("HEAVY", repr(HEAVY))


def test_import_operators_deciding_and_scanning_load_nothing_heavy_and_start_no_cuda():
    done = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported, operated, decided, scanned, provoked = (set(line.split()) for line in done.stdout.splitlines())
    assert imported == set() and operated == set()
    assert decided <= {"pyarrow"} and scanned <= {"pyarrow"}
    assert provoked >= {"rich", "accelerate"}, "the report does not notice a heavy import"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_importable_listed_and_documented(name):
    thing = getattr(inflection_fast, name)
    assert name in inflection_fast.__all__ and name in dir(inflection_fast)
    assert thing.__doc__ and thing.__doc__.strip()


def test_every_listed_name_exists_and_star_import_works():
    names = {}
    exec("from inflection_fast import *", names)
    assert set(inflection_fast.__all__) <= set(names)


@pytest.mark.sources
def test_type_checkers_see_what_is_exported(tmp_path):
    """Mistakes in calls of public names are errors where they are written, and right calls are not."""
    pytest.importorskip("mypy")
    root = Path(inflection_fast.__file__).parent
    tree = ast.parse((root / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: (node.module, alias.asname) for node in block.body for alias in node.names}
    assert {name: (home.split(".")[0], alias) for name, (home, alias) in seen.items()} == {
        name: (home, name) for name, home in inflection_fast._HOMES.items()
    }
    code = (
        "from inflection_fast import MonitorConfig, SelectConfig, ski\n"
        "MonitorConfig(every=1)\n"
        "SelectConfig(windw=2)\n"
        "SelectConfig(window='2')\n"
        "ski(1, 2, 3, 4)\n"
    )
    ours = [f"inflection_fast.{path.name}" for path in root.iterdir() if path.is_dir()]
    unused = [name for name in ours if name.split(".")[1] not in ("decide", "measure", "timeline")]
    skipped = ["torch", "numpy", *HEAVY, *unused]
    others = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in skipped)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n{others}")
    (tmp_path / "user.py").write_text(code)
    search = {**os.environ, "MYPYPATH": str(root.parent)}
    options = ["--config-file", "mypy.ini", "--no-incremental", "--no-error-summary", "user.py"]
    command = [sys.executable, "-m", "mypy", *options]
    said = subprocess.run(command, cwd=tmp_path, env=search, capture_output=True, text=True).stdout
    lines = [line.split(":")[1] for line in said.splitlines() if ": error:" in line]
    assert list(dict.fromkeys(lines)) == ["3", "4", "5"], said


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="entropie"):
        _ = inflection_fast.entropie
    with pytest.raises(ImportError):
        exec("from inflection_fast import entropie")


def test_the_package_has_a_version_and_is_typed():
    from importlib.resources import files

    assert inflection_fast.__version__.count(".") >= 1
    assert (files("inflection_fast") / "py.typed").is_file()
