"""Builds the operator libraries: the CPU one always, the CUDA one where torch has CUDA, or with INFLECTION_CUDA=1."""

import os
import shutil
import subprocess
from pathlib import Path

try:
    import torch.utils.cpp_extension
    from setuptools import setup
except ImportError as error:
    raise SystemExit(f"{error}: install torch first, then: pip install --no-build-isolation inflection_fast") from None

ROOT = Path(__file__).resolve().parent
CXX = ["-O3", "-g0", "-std=c++20", f"-I{ROOT / 'csrc'}", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
CXX += ["-fno-math-errno", "-fno-trapping-math", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # any torch >= 2.10
NVCC = shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin")) or shutil.which("nvcc")
KERNELS = {path.stem: path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}  # without one, no CUDA operator


def library(name, *folders):
    """A library that torch.ops.load_library opens; one binary serves every Python and torch from the target on."""
    found = [path for folder in folders for path in sorted((ROOT / folder).glob("*.cpp"))]
    sources = [str(path.relative_to(ROOT)) for path in found if name == "_cpu" or path.stem in KERNELS]
    headers = [str(path) for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".inc", ".cuh")]
    kwargs = {"depends": headers, "extra_compile_args": list(CXX), "py_limited_api": True}
    return torch.utils.cpp_extension.CppExtension(f"inflection_fast.{name}", sources, **kwargs)


class Build(torch.utils.cpp_extension.BuildExtension):
    """BuildExtension, and nvcc called by hand: it refuses .cu files where torch itself was built without CUDA."""

    def build_extension(self, ext):
        self.build_temp = os.path.join(self.build_temp, ext.name)  # both libraries compile csrc/torch, with other flags
        if ext.name.endswith("_cuda"):
            self.compile_kernels(ext)
        super().build_extension(ext)

    def compile_kernels(self, ext):
        dry = subprocess.run([NVCC, "--dryrun", "-c", "any.cu"], check=True, capture_output=True, text=True).stderr
        home = Path(dry.partition("TOP=")[2].splitlines()[0])  # from nvcc itself, which may be a script on the PATH
        flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX").replace(" ", ";").split(";"):
            cc = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{cc},code=[sm_{cc}{f',compute_{cc}' * arch.endswith('+PTX')}]")
        os.makedirs(self.build_temp, exist_ok=True)
        ext.extra_objects = [os.path.join(self.build_temp, f"{stem}.cu.o") for stem in KERNELS]
        for source, output in zip(KERNELS.values(), ext.extra_objects, strict=True):
            subprocess.run([NVCC, "-c", source, "-o", output, "--expt-relaxed-constexpr", *flags], check=True)
        ext.extra_compile_args += ["-DUSE_CUDA", f"-I{home / 'include'}"]
        ext.extra_link_args += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        ext.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]  # unused, but brings libtorch_cuda where there is one


wanted = NVCC and KERNELS and os.environ.get("INFLECTION_CUDA", "1" if torch.version.cuda else "0") == "1"
setup(
    ext_modules=[library("_cpu", "csrc/torch", "csrc/cpu")] + [library("_cuda", "csrc/torch")] * bool(wanted),
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
