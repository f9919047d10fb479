"""Compiles the CUDA kernels as C++ for the emulator, into a library that takes over the operators on CPU tensors."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIBRARY = "emulated.so"
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]


def stems() -> list[str]:
    """The operators that have a CUDA kernel."""
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """The library, compiled where a source is newer than its object. `sanitize` needs the program to preload ASan."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-DINFLECTION_EMULATION", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in include_paths())]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", *(SANITIZE if sanitize else [])]
    sources = sorted(HERE.glob("*.cpp"))
    sources += [ROOT / "csrc" / "cuda" / f"{stem}.cu" for stem in stems()]
    bindings = [ROOT / "csrc" / "torch" / f"{stem}.cpp" for stem in stems()]
    sources += [path for path in bindings if path.is_file()]
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> str:
        output = folder / f"{source.parent.name}-{source.name}.o"
        if not output.is_file() or output.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            subprocess.run(["c++", "-x", "c++", "-c", str(source), "-o", str(output), *flags], check=True)
        return str(output)

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / LIBRARY
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run(["c++", "-shared", "-o", str(library), *objects, *link, *(SANITIZE if sanitize else [])], check=True)
    return library
