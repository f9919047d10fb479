"""Builds the operator libraries: the CPU one always, the CUDA one where a toolkit is there (a GPU is not needed)."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # one binary for every torch >= 2.10
CXX = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
CXX += ["-fno-math-errno", "-fno-trapping-math"]
ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def sources(*folders):
    """Every C++ file of these folders, relative to the root, as setuptools wants them."""
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).glob("*.cpp"))]


def library(name, files, **kwargs):
    """A library that torch.ops.load_library opens; one binary serves every torch and Python from ABI on."""
    flags = ABI + CXX + kwargs.pop("flags", [])
    depends = [str(path) for path in (ROOT / "csrc").rglob("*.h*")]
    return CppExtension(
        f"inflection_fast.{name}", files, py_limited_api=True, depends=depends, extra_compile_args=flags, **kwargs
    )


def cuda_library(nvcc):
    """The kernels compiled by nvcc into objects: BuildExtension refuses .cu files where torch itself has no CUDA."""
    home, objects = Path(nvcc).resolve().parents[1], ROOT / "build" / "cuda"
    objects.mkdir(parents=True, exist_ok=True)
    targets = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    outputs = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        outputs.append(str(objects / f"{source.stem}.o"))
        flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
        subprocess.run([nvcc, "-c", str(source), "-o", outputs[-1], *flags], check=True)
    return library(
        "_cuda", sources("csrc/torch"), flags=["-DUSE_CUDA", f"-I{home / 'include'}"], extra_objects=outputs,
        library_dirs=[str(home / "lib64")], libraries=["cudart_static", "dl", "rt", "pthread"],
    )


extensions = [library("_cpu", sources("csrc/torch", "csrc/cpu"))]
nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
if nvcc and list((ROOT / "csrc" / "cuda").glob("*.cu")):
    extensions.append(cuda_library(nvcc))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
