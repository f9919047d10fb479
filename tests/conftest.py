"""What the tests of the operators share: instruction sets, devices, temperaments of logits, the error budget."""

import functools
import gc
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

from inflection_fast import ops
from inflection_fast.ops import reference
from inflection_fast.ops.library import ISA_NAMES

BEST = torch.ops.inflection_fast.cpu_isa(len(ISA_NAMES))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and ops.build_info()["cuda"] else [])]


# Half a minute and more. They are first, so that no worker of xdist begins one when the others have nothing left.
LONG = (
    "test_study.py",
    "test_graph_taps.py",
    "test_run.py",
    "test_distributed.py",
    "test_exec.py",
    "test_model_types.py",
)


def pytest_configure(config):
    """Workers of xdist take files in the order of collection, and not those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first. Skip what reads the sources where only the tests lie beside an installed package."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if (Path(__file__).resolve().parent.parent / "csrc").is_dir():
        return
    for item in items:
        if item.get_closest_marker("sources"):
            item.add_marker(pytest.mark.skip(reason="no source tree here"))


TWINS = ("attention_stats", "attention_stats_qk", "attention_column_mass", "linear_cka", "activation_moments")


def _key(value):
    """What two calls have in common that give the same: settings as they are, tensors by their elements."""
    if isinstance(value, torch.Tensor):
        elements = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.shape, value.dtype, value.device, hashlib.sha1(elements).digest()
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_key, value))
    return value


def once(function: Callable, held: OrderedDict, most: int) -> Callable:
    """`function` of tensors, remembering its last `most` results where no gradient is asked for."""

    @functools.wraps(function)
    def remembering(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        asked = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if asked or not tensors or any(type(x) is not torch.Tensor for x in tensors) or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        key = function.__name__, _key(args), tuple((name, _key(value)) for name, value in sorted(kwargs.items()))
        if key not in held:
            held[key] = function(*args, **kwargs)
            if len(held) > most:
                held.popitem(last=False)
        return tree_map_only(torch.Tensor, torch.clone, held[key])

    return remembering


@pytest.fixture(autouse=True, scope="session")
def truths_computed_once():
    """The twins in plain PyTorch, for tests of every instruction set, which compare with the same truth."""
    held = OrderedDict()
    with pytest.MonkeyPatch.context() as patch:
        for name in TWINS:
            patch.setattr(reference, name, once(getattr(reference, name), held, 1000))
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_out_of_garbage_collection():
    """Training loops collect garbage after every run; over all that is imported this takes a quarter of a second."""
    gc.collect()
    gc.freeze()


ISA_PARAMS = [
    pytest.param(i, id=name, marks=getattr(pytest.mark, name)) for i, name in enumerate(ISA_NAMES[: BEST + 1])
]


@pytest.fixture(params=ISA_PARAMS)
def isa(request):
    """Every version of the CPU kernels that this CPU runs, the best one afterwards."""
    torch.ops.inflection_fast.cpu_isa(request.param)
    yield ISA_NAMES[request.param]
    torch.ops.inflection_fast.cpu_isa(BEST)


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that the operators run on here."""
    return request.param


@pytest.fixture
def on_cpu(pytestconfig) -> bool:
    """Whether the operators run their CPU kernels: no plugin has put those for CUDA in their place."""
    plugins = ("tests.emulation.plugin", "tests.emulation.sanitized", "on_cuda")
    return not any(pytestconfig.pluginmanager.has_plugin(name) for name in plugins)


@pytest.fixture
def cka_limit(on_cpu) -> Callable:
    """Largest error of CKA by dtype: CUDA kernels multiply 16-bit rows on tensor cores, which cut their sums off."""
    return lambda dtype: 1e-4 if dtype.itemsize == 2 and not on_cpu else 1e-6


@pytest.fixture
def budget() -> Callable:
    """Truth is float64: ours may be twice as wrong as plain PyTorch in the input's dtype, plus a floor."""

    def check(actual, eager, truth, *, slack=2.0, floor=1e-5):
        ours, theirs = ((x.detach().double() - truth).abs().max().item() for x in (actual, eager))
        assert ours <= slack * theirs + floor, f"error {ours:.2e}, plain PyTorch {theirs:.2e}"

    return check
