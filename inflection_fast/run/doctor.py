"""What is installed, loaded and missing on this machine, with the command that installs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["Finding", "examine", "show"]

NEEDED = ("torch", "numpy", "pyarrow")
FOR_RUNS = ("transformers", "peft", "accelerate", "datasets", "jsonargparse", "matplotlib", "rich")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Finding:
    """One fact about the machine."""

    topic: str
    text: str
    fix: str | None = None  # the command that installs what is missing
    broken: bool = False  # nothing works without it


def examine() -> list[Finding]:
    """All findings about this machine, in the order in which they are printed."""
    findings = [
        Finding("inflection_fast", version("inflection_fast")),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
    ]
    findings += [_package(name, "inflection_fast", broken=True) for name in NEEDED]
    findings += [_package(name, "inflection_fast[run]", broken=False) for name in FOR_RUNS]
    features = ", ".join(_cpu_features()) or "features unknown"
    findings.append(Finding("CPU", f"{os.cpu_count()} cores, {platform.machine()}, {features}"))
    if all(not finding.broken for finding in findings):
        findings += _kernels()
        findings += _cuda()
    return findings


def show(findings: list[Finding], say: Callable[[str], None] = print) -> int:
    """Print the findings with `say`, and return the exit code: 1 if something is broken."""
    width = max(len(finding.topic) for finding in findings)
    for finding in findings:
        say(f"{finding.topic:{width}}  {finding.text}")
        if finding.fix:
            say(f"{'':{width}}  -> {finding.fix}")
    broken = [finding.topic for finding in findings if finding.broken]
    say(f"not usable: {', '.join(broken)}" if broken else "everything that is needed is installed")
    return 1 if broken else 0


def _package(name: str, requirement: str, *, broken: bool) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed", f"pip install --no-build-isolation '{requirement}'", broken)


def _cpu_features() -> list[str]:
    """The flags of the processor that decide which kernels run; none if the system does not list them."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return [name for name in FEATURES if name in present]
    return []


def _kernels() -> list[Finding]:
    try:
        import torch

        from inflection_fast.ops import build_info

        info = build_info()
    except ImportError as error:
        text = " ".join(str(error).split())
        return [Finding("CPU kernels", text, "pip install --no-build-isolation inflection_fast", broken=True)]
    # Unlike the version of the package, `torch.__version__` always names the CUDA that torch was built with.
    where = f"from {info['cpu']['path']}, in torch {torch.__version__}"
    findings = [Finding("CPU kernels", f"{info['cpu']['isa']}, {where}")]
    if info["cuda"]:
        findings.append(Finding("CUDA kernels", ", ".join(f"{key} {value}" for key, value in info["cuda"].items())))
    else:
        findings.append(_why_no_cuda())
    return findings


def _why_no_cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        if shutil.which("nvidia-smi"):
            return Finding(
                "CUDA kernels", "not loaded: this torch is a CPU build, and the machine has a GPU", "pip install torch"
            )
        return Finding("CUDA kernels", "not loaded: this torch is a CPU build, which is right without a GPU")
    return Finding(
        "CUDA kernels",
        f"not built; tensors on the GPU are refused (torch has CUDA {torch.version.cuda})",
        "install a CUDA toolkit, then: pip install --no-build-isolation --force-reinstall --no-deps inflection_fast",
    )


def _cuda() -> list[Finding]:
    import torch

    findings = []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("CUDA_HOME", "") + "/bin", os.environ["PATH"]]))
    if nvcc:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = next((line for line in printed.splitlines() if "release" in line), "version unknown")
        findings.append(Finding("CUDA toolkit", f"{release.strip()} ({nvcc})"))
    else:
        findings.append(Finding("CUDA toolkit", "none (needed only to build the CUDA kernels)"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gib = facts.total_memory / 2**30
            findings.append(
                Finding(f"GPU {index}", f"{facts.name}, compute {facts.major}.{facts.minor}, {gib:.0f} GiB")
            )
    else:
        findings.append(Finding("GPU", "none that torch can use"))
    return findings
