"""Imports point left, the border is narrow, files are short, and the hot path does not synchronise."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "inflection_fast"
pytestmark = pytest.mark.sources
MEASURING, DECIDING = {"ops", "blocks", "timeline", "alerts", "quantities", "measure"}, {"timeline", "decide"}
ALL = MEASURING | DECIDING | {"act", "integrations", "report", "run"}
TORCH = {"ops", "blocks", "quantities", "measure", "act", "integrations", "run", "study"}
OWN = {  # part -> parts of ours that it may import; the table of docs/design.md
    "atomic": set(), "records": {"atomic"},
    "ops": set(), "blocks": set(), "timeline": {"atomic"}, "alerts": {"timeline"},
    "quantities": {"ops", "blocks", "timeline"}, "measure": (MEASURING - {"measure"}) | {"atomic"},
    "decide": {"timeline", "atomic"},
    "act": {"blocks", "decide", "ops", "quantities", "measure", "timeline"},
    "integrations": {"measure", "timeline", "alerts"}, "report": DECIDING | {"records", "alerts"},
    "run": (ALL - {"run"}) | {"atomic", "records"}, "study": ALL, "cli": {"run", "report", "decide", "study"},
    "__main__": {"cli"}, "__init__": ALL,
}  # fmt: skip
TYPES = {"decide": {"torch", "peft"}}  # for type checkers only
LATER = {"decide": {"act"}}  # inside functions only: methods of a plan that take a model
GUARDED = {  # third party -> parts that may name it at all, and those among them that may do so at import time
    "torch": (
        {"ops", "blocks", "quantities", "measure", "act", "integrations", "run", "study"},
        {"ops", "blocks", "quantities", "measure", "act", "integrations", "run", "study"},
    ),
    "numpy": (ALL | {"cli", "study"}, ALL | {"study"}),
    "pyarrow": ({"timeline", "run"}, set()),
    "transformers": ({"measure", "act", "integrations", "run", "study"}, {"act", "integrations", "run"}),
    "peft": ({"act"}, {"act"}),
    "matplotlib": ({"report", "study"}, set()),
    "rich": ({"report", "run", "cli", "study"}, set()),
    "scipy": ({"study"}, set()),
    "statsmodels": ({"study"}, set()),
    "datasketch": ({"study"}, set()),
    "ray": ({"study"}, set()),
    "datasets": ({"run"}, {"run"}),
    "pickle": (set(), set()),
    "pandas": ({"study"}, set()),
}


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """(module, at import time) for each import, None for type checkers; `from . import a` is `inflection_fast.a`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["inflection_fast", *path.relative_to(PACKAGE).parts[:-1]]

    def walk(node, eager):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, eager
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                if module == "inflection_fast":
                    for alias in child.names:
                        yield f"{module}.{alias.name}", eager
                else:
                    yield module, eager
            else:
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only
                yield from walk(child, None if typing_only else eager and not deferred)

    yield from walk(tree, True)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path):
    part = part_of(path)
    assert part in OWN, f"{part} is not in the table of docs/design.md"
    for module, eager in imports(path):
        top, *rest = module.split(".")
        if (
            top == "inflection_fast"
            and rest
            and (PACKAGE / rest[0]).with_suffix(".py").exists() | (PACKAGE / rest[0]).is_dir()
        ):
            allowed = OWN[part] if eager else OWN[part] | LATER.get(part, set())
            assert rest[0] == part or rest[0] in allowed, f"{part} imports {module}"
        elif top in GUARDED:
            anywhere, at_import = GUARDED[top]
            assert part in anywhere or (eager is None and top in TYPES.get(part, ())), f"{part} imports {top}"
            assert not eager or part in at_import, f"{part} imports {top} at import time"


def test_the_import_reader_sees_lazy_relative_and_typing_imports(tmp_path, monkeypatch):
    monkeypatch.setattr("test_spec_architecture.PACKAGE", tmp_path)
    path = tmp_path / "decide" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import numpy as np\nfrom ..act import inject\nfrom .. import ops\n"
        "if TYPE_CHECKING:\n    import peft\ndef f():\n    from torch import nn\n"
    )
    assert list(imports(path)) == [("numpy", True), ("inflection_fast.act", True), ("inflection_fast.ops", True),
                                   ("peft", None), ("torch", False)]  # fmt: skip


NATIVE = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".inl"}
UNSTABLE = ("ATen/", "torch/extension.h", "torch/torch.h", "torch/all.h")


def native():
    return sorted(
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".inl"}
    )


INCLUDES = {  # folder -> folders of ours it may include
    "core": {"core"}, "cpu": {"core", "cpu", "kernels.h"}, "cuda": {"core", "cuda", "kernels.h"},
    "torch": {"torch", "kernels.h"}, "kernels.h": set(),
}  # fmt: skip


@pytest.mark.parametrize("path", native(), ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_left_and_torch_stays_in_its_folder(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for line in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        name = line.strip("<>\"'")
        outside = name.split("/")[0]
        if folder != "torch":
            assert outside not in {"torch", "ATen", "c10", "pybind11"} and name != "Python.h", f"{path} includes {name}"
        if folder not in {"torch", "cuda"}:
            assert not name.startswith("cuda"), f"{path} includes {name}"
        if line.startswith('"'):
            near, far = path.parent / name, ROOT / "csrc" / name
            target = (near if near.exists() else far).resolve()
            assert target.is_relative_to(ROOT / "csrc"), f"{path} includes {name} from outside"
            assert target.relative_to(ROOT / "csrc").parts[0] in INCLUDES[folder] | {folder}, f"{path} includes {name}"


def test_only_the_stable_surface_of_torch_is_included():
    for path in native():
        for name in re.findall(r"#\s*include\s+[<\"]([^>\"]+)", path.read_text(encoding="utf-8")):
            assert not name.startswith(UNSTABLE), f"{path}: {name}"


def tracked():
    folders = [ROOT / n for n in ("csrc", "inflection_fast", "tests", "benchmarks", "docs", "examples", ".ci")]
    files = [p for f in folders if f.exists() for p in f.rglob("*") if p.is_file()] + [p for p in ROOT.glob("*.py")]
    return [
        p
        for p in files
        if p.suffix in {".py", ".h", ".cuh", ".cpp", ".cu", ".inc", ".sh"} and "__pycache__" not in p.parts
    ]


def test_no_file_is_longer_than_its_budget():
    long = {str(p.relative_to(ROOT)): n for p in tracked() if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert not long
    assert len((ROOT / "setup.py").read_text("utf-8").splitlines()) <= 60


# (file, name of the enclosing function) -> why a number may come to the host there.
HOST_READS = {
    ("ops/cka/result.py", "reasons"): "sentences for a reader",
    ("ops/cka/result.py", "__repr__"): "numbers for a reader",
    ("ops/cka/jackknife.py", "padded"): "which rows are multiplied together follows from the lengths of the sequences",
    ("ops/spectrum.py", "singular_values"): "of a checkpoint, or of a copy of the weights in a thread of its own",
    ("measure/recorder.py", "_row"): "the one copy of a measured step, on a thread that nobody waits for",
    ("measure/parameters.py", "_add"): "fills a tensor of the host that no device holds",
    ("measure/panel.py", "finish_later"): "of what is on its way to the host, on a thread that nobody waits for",
    ("measure/overhead.py", "_forward_backward"): "a stopwatch has to wait for the device",
    ("measure/probe.py", "save"): "the reference goes to a file once, at entering",
}


def host_reads(path):
    """Calls that make the host wait for a device, with the function that holds them."""
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            here = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else inside
            if isinstance(child, ast.Call):
                called = getattr(child.func, "attr", getattr(child.func, "id", ""))
                if called in {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "print"}:
                    found.append((path.relative_to(PACKAGE).as_posix(), here, called, child.lineno))
            walk(child, here)

    walk(ast.parse(path.read_text(encoding="utf-8")), "<module>")
    return found


def test_ops_and_measure_read_no_number_on_the_host_without_a_reason():
    found = [hit for p in sources() if part_of(p) in {"ops", "quantities", "measure"} for hit in host_reads(p)]
    unexplained = [hit for hit in found if hit[:2] not in HOST_READS]
    assert not unexplained, unexplained
    stale = set(HOST_READS) - {hit[:2] for hit in found}
    assert not stale, f"no such read any more: {stale}"


def test_the_reader_of_host_reads_sees_them(tmp_path, monkeypatch):
    monkeypatch.setattr("test_spec_architecture.PACKAGE", tmp_path)
    (tmp_path / "x.py").write_text(
        "class A:\n    def f(self, t):\n        print(t.item())\n        return t.sum().cpu()\n"
    )
    assert [(inside, what) for _, inside, what, _ in host_reads(tmp_path / "x.py")] == [
        ("f", "print"), ("f", "item"), ("f", "cpu")]  # fmt: skip


LOADERS = r"pickle\.load|allow_pickle=True|weights_only=False|joblib|(?<![.\w])(eval|exec)\("


def test_no_pickle_is_loaded_anywhere():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(LOADERS, text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
