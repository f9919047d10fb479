"""Python runs this at its start under `inflection-fast exec`. It then runs the sitecustomize that it hides."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_the_hidden_one() -> None:
    others = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


def _watch_this_process() -> None:
    try:
        from inflection_fast.integrations.exec_child import start
    except ImportError:  # another Python, without this package: not measured
        return
    start()


_watch_this_process()
_run_the_hidden_one()
