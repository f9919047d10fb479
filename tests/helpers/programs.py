"""Python programs in processes forked from one that has imported the large libraries, which take seconds to import."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

import torch

LIBRARIES = [
    "torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo",
    "numpy", "pyarrow", "yaml", "accelerate", "datasets", "transformers.trainer", "peft", "pytest",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "inflection_fast.integrations", "inflection_fast.cli", "inflection_fast.act", "helpers.tiny_models",
]  # fmt: skip


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    before = dict(os.environ)
    paths = os.pathsep.join(filter(None, sys.path))
    os.environ.update(PYTHONPATH=paths, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # read once, when a library is loaded
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _work(words: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    """What a new process does: it becomes `python WORDS`."""
    for descriptor, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    gc.freeze()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # a program has the one of the platform
    if "HF_DATASETS_CACHE" in environment:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def start(words, output, errors=None, *, environment=None):
    """A process that does what `python WORDS` does; it writes to the files `output` and `errors`, by default one.

    Numbers of threads, and whether a hub is asked, are those of the server: one thread, no hub.
    """
    environment = dict(os.environ if environment is None else environment)
    arguments = [str(word) for word in words], environment, os.getcwd(), str(output), str(errors or output)
    process = _server().Process(target=_work, args=arguments)
    process.start()
    return process


def spawn(work, arguments, count):
    """`work(i, *arguments)` in `count` processes, until all have ended, as `torch.multiprocessing.spawn` does."""
    _server()
    torch.multiprocessing.start_processes(work, arguments, count, start_method="forkserver")


def run(words, folder, *, environment=None, seconds=300):
    """The finished program, as `subprocess.run` gives it; `folder` keeps its output."""
    files = [Path(folder) / name for name in ("output.txt", "errors.txt")]
    for file in files:
        file.write_bytes(b"")
    process = start(words, *files, environment=environment)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(words, seconds, *(file.read_text() for file in files))
    return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))
