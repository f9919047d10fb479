"""Imports point left, the border is narrow, files are short, and the hot path does not synchronise."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "inflection_fast"
pytestmark = pytest.mark.sources
MEASURING, DECIDING = {"ops", "blocks", "timeline", "alerts", "quantities", "measure"}, {"timeline", "decide"}
ALL = MEASURING | DECIDING | {"act", "integrations", "report", "run", "checkpoints"}
TORCH = {"ops", "blocks", "quantities", "measure", "act", "integrations", "run", "study", "checkpoints"}
OWN = {  # part -> parts of ours that it may import; the table of docs/design.md
    "atomic": set(), "records": {"atomic"},
    "ops": set(), "blocks": set(), "timeline": {"atomic"}, "alerts": {"timeline"},
    "quantities": {"ops", "blocks", "timeline"}, "measure": (MEASURING - {"measure"}) | {"atomic"},
    "decide": {"timeline", "atomic"},
    "act": {"blocks", "decide", "ops", "quantities", "measure", "timeline", "atomic"},
    "integrations": {"ops", "measure", "timeline", "alerts", "blocks", "decide", "act"},
    "report": DECIDING | {"records", "alerts", "atomic"},
    "run": (ALL - {"run", "checkpoints"}) | {"atomic", "records"}, "checkpoints": (ALL - {"checkpoints"}) | {"atomic"},
    "study": ALL | {"atomic"}, "cli": {"run", "report", "decide", "study", "checkpoints", "integrations"},
    "__main__": {"cli"}, "__init__": ALL,
}  # fmt: skip
TYPES = {"decide": {"torch", "peft"}}  # for type checkers only
# Inside functions only: methods of a plan that take a model; pictures and the verdict of what was measured.
LATER = {"decide": {"act"}, "integrations": {"report"}, "timeline": {"report"}}
GUARDED = {  # third party -> parts that may name it at all, and those among them that may do so at import time
    "torch": (
        TORCH,
        TORCH,
    ),
    "numpy": (ALL | {"cli", "study"}, ALL | {"study"}),
    "pyarrow": ({"timeline", "run"}, set()),
    "transformers": ({"measure", "act", "integrations", "run", "study", "checkpoints"}, {"act", "integrations", "run"}),
    "peft": ({"act"}, {"act"}),
    "matplotlib": ({"report", "study", "integrations", "timeline"}, set()),
    "rich": ({"report", "run", "cli", "study", "checkpoints"}, set()),
    "scipy": ({"study", "decide"}, set()),
    "statsmodels": ({"study"}, set()),
    "datasketch": ({"study"}, set()),
    "ray": ({"study"}, set()),
    "datasets": ({"run"}, {"run"}),
    "pickle": (set(), set()),
    "pandas": ({"study", "timeline"}, set()),
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


NATIVE = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu", ".inl", ".inc"}
UNSTABLE = ("ATen/", "torch/extension.h", "torch/torch.h", "torch/all.h")
OPERATORS = (
    "activation_moments", "attention_column_mass", "attention_stats", "attention_stats_qk", "cka", "sum_of_squares",
    "tap_attention", "tap_gradient",
)  # fmt: skip


def native():
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in NATIVE)


def included(path):
    """(as written, the file of ours or None) for every include of a source."""
    for line in re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        found = [p for p in (path.parent / line.strip('"'), ROOT / "csrc" / line.strip('"')) if p.is_file()]
        yield line, found[0].resolve() if line.startswith('"') and found else None


def reached(path, seen=None):
    """Every file of ours that a source includes, directly or not."""
    seen = set() if seen is None else seen
    for _, target in included(path):
        if target is not None and target not in seen:
            seen.add(target)
            reached(target, seen)
    return seen


INCLUDES = {  # folder -> folders of ours it may include
    "core": {"core", "kernels.h", "taps.h"}, "cpu": {"core", "cpu", "kernels.h", "taps.h"},
    "cuda": {"core", "cuda", "kernels.h", "taps.h"}, "torch": {"torch", "kernels.h", "taps.h"}, "kernels.h": set(),
    "taps.h": {"kernels.h"},
}  # fmt: skip


@pytest.mark.parametrize("path", native(), ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_left_and_torch_stays_in_its_folder(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for line, target in included(path):
        name = line.strip("<>\"'")
        outside = name.split("/")[0]
        if folder != "torch":
            assert outside not in {"torch", "ATen", "c10", "pybind11"} and name != "Python.h", f"{path} includes {name}"
        if folder not in {"torch", "cuda"}:
            assert not name.startswith("cuda"), f"{path} includes {name}"
        if line.startswith('"'):
            assert target is not None, f"{path} includes {name} from outside"
            assert target.relative_to(ROOT / "csrc").parts[0] in INCLUDES[folder] | {folder}, f"{path} includes {name}"


def test_only_the_stable_surface_of_torch_is_included():
    for path in native():
        for name in re.findall(r"#\s*include\s+[<\"]([^>\"]+)", path.read_text(encoding="utf-8")):
            assert not name.startswith(UNSTABLE), f"{path}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_the_maths_of_a_kernel_is_that_of_csrc_core_on_both_devices(path):
    """The CPU and the CUDA kernel of one name, or its variant, reach the same headers of core, one at least."""
    core = [
        {p.name for p in reached(source) if p.parent.name == "core"}
        for source in (path, ROOT / "csrc" / "cpu" / f"{path.stem.removesuffix('_hopper')}.inc")
    ]
    assert core[0] and core[0] == core[1]


def test_a_formula_of_core_is_written_nowhere_else():
    formulas = {  # what the code of each looks like, whatever its names
        "entropy": r"log_?sum\w*(\[\w+\])? - [\w.\[\]>-]*dot\b",
        "rebasing": r"= f \* \([\w.\[\]]*dot",
        "two-sum": r"\(\w+ - from_\w+\) \+ \(",
        "gradient": r"grad_entropy\[",
        "debiasing": r"/ \(\(\w[\w.]* - 1\.0\) \*",
    }
    for name, pattern in formulas.items():
        holders = [p.name for p in native() if re.search(pattern, p.read_text(encoding="utf-8"))]
        assert len(holders) == 1, f"{name}: {holders}"
        assert (ROOT / "csrc" / "core" / holders[0]).exists(), f"{name}: {holders}"


@pytest.mark.parametrize("stem", OPERATORS)
def test_an_operator_has_one_stem_from_kernel_to_benchmark(stem):
    places = (
        f"csrc/cpu/{stem}.inc", f"csrc/cuda/{stem}.cu", f"csrc/torch/{stem}.cpp", f"inflection_fast/ops/{stem}",
        f"tests/test_{stem}.py", f"benchmarks/bench_{stem}.py",
    )  # fmt: skip
    missing = [place for place in places if not any((ROOT / f"{place}{end}").exists() for end in ("", ".py"))]
    assert not missing


def test_there_is_no_kernel_of_another_stem():
    for folder, suffix in (("cuda", ".cu"), ("torch", ".cpp")):
        stems = {p.stem for p in (ROOT / "csrc" / folder).glob(f"*{suffix}")} - {"isa"}
        assert not {stem for stem in stems if not stem.startswith(OPERATORS)}


def test_every_cpu_kernel_is_in_the_one_list():
    listed = re.findall(r"^  X\((\w+), \w+\)", (ROOT / "csrc" / "kernels.h").read_text(encoding="utf-8"), re.MULTILINE)
    defined = {
        name
        for path in (ROOT / "csrc" / "cpu").glob("*.inc")
        for name in re.findall(r"^void (\w+)\(const \w+Args&", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(listed) > 20 and set(listed) <= defined


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cpu").glob("*.inc")), ids=lambda p: p.stem)
def test_every_part_of_the_cpu_kernels_compiles_alone(path):
    flags = ["-fsyntax-only", "-std=c++20", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    isa = ["-DINFLECTION_ISA=portable", "-DINFLECTION_TABLE=kPortableKernels", "-DINFLECTION_VECTOR_BYTES=16"]
    done = subprocess.run(
        ["c++", *flags, *isa, "-include", str(path), "-x", "c++", os.devnull], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
    (
        "ops/cka/jackknife.py",
        "padded_sequences",
    ): "the lengths of the sequences decide which rows are multiplied together",
    ("ops/spectrum.py", "power_law"): "of numbers that are on the host already",
    ("ops/spectrum.py", "singular_values"): "of a checkpoint, or of a copy of the weights in a thread of its own",
    ("ops/cka/basis.py", "same_as"): "two bases are compared once, where states are merged",
    ("ops/cka/basis.py", "find_basis"): "the rank that keeps a share of the variance is a shape",
    ("ops/checks.py", "cu_seqlens"): "on the CPU only, and not while compiling",
    ("ops/spectrum.py", "spectrum_of"): "of singular values that are on the host",
    ("ops/spectrum.py", "outliers"): "of singular values that are on the host",
    ("quantities/gradient_noise.py", "values"): "sums that are on the host",
    ("quantities/trajectory.py", "bends"): "a curve that is on the host",
    ("quantities/calls.py", "refuse_foreign_keys"): "at a first step alone, to raise what is wrong at once",
    ("measure/ranks.py", "__call__"): "sums that are on the host",
    ("measure/recorder.py", "_row"): "the one copy of a measured step, on a thread that nobody waits for",
    ("measure/parameters.py", "_add"): "fills a tensor of the host that no device holds",
    ("measure/panel.py", "finish_later"): "of what is on its way to the host, on a thread that nobody waits for",
    ("measure/graph.py", "refuse_missing_attention"): "the first measured step alone, to find a graph without taps",
    ("measure/graph.py", "refuse_missing_gradients"): "the same",
    ("measure/cost.py", "__call__"): "a stopwatch has to wait for the device",
    ("measure/cost.py", "extra_bytes"): "the same",
    ("measure/parallel.py", "run"): "a batch of the probe goes from stage to stage over the host",
    ("measure/probe.py", "save"): "the reference goes to a file once, at entering",
}


READS = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "print"}
REDUCTIONS = {
    "all", "allclose", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "equal", "is_nonzero",
    "isfinite", "isinf", "isnan", "max", "mean", "min", "norm", "sum",
}  # fmt: skip
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
TENSORS = {"Tensor", "Tensor | None", "torch.Tensor"}


def named_tensors(node, kind):
    """Names that annotations below `node` say are tensors: of parameters (`ast.arg`) or of fields (`ast.AnnAssign`)."""
    found = [n for n in ast.walk(node) if isinstance(n, kind) and n.annotation and ast.unparse(n.annotation) in TENSORS]
    return {getattr(n, "arg", None) or ast.unparse(n.target).split(".")[-1] for n in found}


def is_tensor(node, names, fields):
    """Whether an expression is a tensor as far as its text tells: a named one, arithmetic on one, a reduction."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in fields
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn):
        return False
    parts = [getattr(node, part, None) for part in ("value", "left", "right", "operand")]
    return any(is_tensor(part, names, fields) for part in (*parts, *getattr(node, "comparators", ())) if part)


def conditions(node):
    """Expressions of which `node` asks whether they are true, or which number they are."""
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.comprehension):
        return node.ifs
    return node.args if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"bool", "int", "float"} else []


def host_reads(path):
    """What makes the host wait for a device, with the function that holds it: calls, and truth values of tensors."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields, found = named_tensors(tree, ast.AnnAssign), []

    def walk(node, inside, names):
        for child in ast.iter_child_nodes(node):
            here, known = inside, names
            if isinstance(child, FUNCTIONS | ast.ClassDef):
                here = child.name
                known = names | named_tensors(child.args, ast.arg) if isinstance(child, FUNCTIONS) else names
            if isinstance(child, ast.Call):
                called = getattr(child.func, "attr", getattr(child.func, "id", ""))
                if called in READS:
                    found.append((path.relative_to(PACKAGE).as_posix(), here, called, child.lineno))
            for condition in conditions(child):
                if is_tensor(condition, names, fields):
                    found.append((path.relative_to(PACKAGE).as_posix(), here, ast.unparse(condition), child.lineno))
            walk(child, here, known)

    walk(tree, "<module>", set())
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
        "class A:\n    seen: Tensor\n    def f(self, t):\n        print(t.item())\n        return t.sum().cpu()\n"
        "    def g(self, t: Tensor | None, n: int):\n        if t is not None and n > 1: return int(t[0])\n"
        "        return bool(self.seen) if (n * t).any() else n\n"
        "def h(t: Tensor, n):\n    assert n\n    while t > n: n = float(n)\n"
    )
    assert [(inside, what) for _, inside, what, _ in host_reads(tmp_path / "x.py")] == [
        ("f", "print"), ("f", "item"), ("f", "cpu"), ("g", "t[0]"), ("g", "(n * t).any()"), ("g", "self.seen"),
        ("h", "t > n")]  # fmt: skip


LOADERS = r"pickle\.load|allow_pickle=True|weights_only=False|joblib|(?<![.\w])(eval|exec)\("


def test_no_pickle_is_loaded_anywhere():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(LOADERS, text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path
