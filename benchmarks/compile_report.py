"""Compiles every CUDA kernel for every target and lists registers, shared memory and spills; a spill fails, and so does
a warning of ptxas that it carries out products of warp groups one by one, or leaves registers where they are.

    python benchmarks/compile_report.py [--arch 80 90a 100 ptx] [--json FILE] [STEM ...]

Needs nvcc, no GPU and no torch. A compiler runs on every core. Shared memory that a launch asks for (`dynamic`) is not
known to the compiler: the kernels' header paragraphs say how much it is.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {  # name: -gencode
    "80": "arch=compute_80,code=sm_80",
    "90a": "arch=compute_90a,code=sm_90a",
    "100": "arch=compute_100,code=sm_100",
    "ptx": "arch=compute_80,code=compute_80",
}
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangle(symbol: str) -> str:
    """The kernel's name and template arguments, without parameters and namespaces."""
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    name = re.sub(r"inflection::|\(anonymous namespace\)::|^void ", "", name)
    return name[: name.index(">(") + 1] if ">(" in name else name.split("(")[0]


def kernels_of(log: str) -> list[dict]:
    """One record for every entry function that ptxas reports in `log`."""
    records = []
    for match in ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = {key: int(match[key]) for key in ("registers", "stack", "stores", "loads")}
        name, static = demangle(match["symbol"]), int(shared[1]) if shared else 0
        records.append({"kernel": name, "target": match["target"], "static_shared": static, **numbers})
    return records


def compile_for(source: Path, target: str) -> list[dict]:
    """Compile one source for one target; what its kernels use (nothing for PTX, which ptxas does not see)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-gencode={TARGETS[target]}", "-Xptxas=-v"]
        command = ["nvcc", "-c", str(source), "-o", f"{folder}/{source.stem}.o", "--expt-relaxed-constexpr", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} for {target} does not compile:\n{done.stderr[:4000]}")
    if refused := re.findall(r"^.*\(C75\d\d\).*$", done.stderr, re.MULTILINE):
        raise SystemExit(f"{source.name} for {target}: {refused[0][:400]}")
    records = kernels_of(done.stderr)
    if target != "ptx" and not records:
        raise SystemExit(f"{source.name} for {target}: ptxas reported no kernel")
    return [{"file": source.name, **record} for record in records]


def main() -> int:
    """Print the table; 1 if a kernel spills or keeps anything in local memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", nargs="*", help="files of csrc/cuda, without .cu; all if none is named")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write the records here as well")
    options = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if options.stems:
        sources = [source for source in sources if source.stem in options.stems]
    jobs, records = [(source, target) for source in sources for target in options.arch], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, target), found in zip(jobs, pool.map(compile_for, *zip(*jobs, strict=True)), strict=True):
            records += found
            worst = max((r["registers"] for r in found), default=0)
            print(f"{source.name} {target}: {len(found)} kernels, at most {worst} registers", flush=True)
    local = [r for r in records if r["stack"] or r["stores"] or r["loads"]]
    print(f"{'file':28} {'target':8} {'registers':>9} {'static':>6} {'spill':>5} {'stack':>5}  kernel")
    for r in records:
        spill = r["stores"] + r["loads"]
        row = f"{r['file']:28} {r['target']:8} {r['registers']:9} {r['static_shared']:6} {spill:5} {r['stack']:5}"
        print(row, r["kernel"], sep="  ")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    print(f"{len(records)} kernels, {len(local)} with spills or local memory")
    return 1 if local else 0


if __name__ == "__main__":
    sys.exit(main())
