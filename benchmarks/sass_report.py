"""Counts the machine instructions of CUDA kernels by class, block by block of their loops.

    python benchmarks/sass_report.py STEM [--arch 90a] [--kernel PATTERN] [--least 8] [--loops 1]

Needs nvcc, cuobjdump and nvdisasm (of CUDA, or on the PATH by any other way), no GPU. A line is one basic block:
address, where its branch leads, loops around it, instructions, and how many of them go where:

    mma     tensor cores           mufu    2^x, log, 1/x: 16 lanes per SM and clock
    ldsm    ldmatrix               lds/sts other shared memory
    ldg/stg global memory          fp32    multiply-adds and the like
    alu     integers, compares, selects, moves; control: branches, barriers

Which blocks a tile passes through, and how often, is for the reader to say: masks and odd tiles have their own.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (  # first match counts
    ("mma", r"HMMA|IMMA"), ("mufu", r"MUFU"), ("ldsm", r"LDSM"), ("lds", r"LDS\b|LDS\."), ("sts", r"STS|LDGSTS"),
    ("ldg", r"LDG|LD\b|LD\."), ("stg", r"STG|ST\b|ST\."), ("fp64", r"DADD|DMUL|DFMA|DSETP"),
    ("fp32", r"FFMA|FADD|FMUL|FMNMX|FSETP|FSEL|FCHK"), ("shuffle", r"SHFL|VOTE|REDUX|MATCH"),
    ("control", r"BRA|BSSY|BSYNC|BAR|EXIT|CALL|RET|WARPSYNC|DEPBAR|LDGDEPBAR|NOP|YIELD|BREAK"),
)  # fmt: skip
COLUMNS = [name for name, _ in CLASSES] + ["alu"]
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);")


def class_of(opcode: str) -> str:
    """The class that an instruction is counted under; what none claims is integer arithmetic or a move."""
    return next((name for name, pattern in CLASSES if re.match(pattern, opcode)), "alu")


def functions(listing: str) -> dict[str, list[tuple[int, str, int | None]]]:
    """Of every kernel in a listing of cuobjdump: (address, opcode, branch target or None) for each instruction."""
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        instructions = []
        for address, opcode, rest in LINE.findall(body):
            target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip()) if opcode.startswith("BRA") else None
            instructions.append((int(address, 16), opcode, int(target[1], 16) if target else None))
        found[name.strip()] = instructions
    return found


def blocks(instructions: list[tuple[int, str, int | None]]) -> list[tuple[int, int | None, int, Counter]]:
    """(address, where it may branch to, loops around it, instructions by class) of every basic block."""
    targets = {target for _, _, target in instructions if target is not None}
    loops = [(target, address) for address, _, target in instructions if target is not None and target < address]
    found, start, counts = [], instructions[0][0], Counter()
    for address, opcode, target in instructions:
        if address in targets and counts:
            found.append((start, None, counts))
            start, counts = address, Counter()
        counts[class_of(opcode)] += 1
        if opcode.startswith(("BRA", "EXIT", "RET")):
            found.append((start, target, counts))
            start, counts = address + 16, Counter()
    return [(at, to, sum(begin <= at <= end for begin, end in loops), counts) for at, to, counts in found]


def listing_of(stem: str, arch: str) -> str:
    """The machine code of csrc/cuda/<stem>.cu, demangled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{stem}.cubin"
        flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        flags.append("--expt-relaxed-constexpr")
        subprocess.run(["nvcc", "-cubin", str(ROOT / "csrc" / "cuda" / f"{stem}.cu"), "-o", cubin, *flags], check=True)
        sass = subprocess.run(["cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True).stdout
    return subprocess.run(["c++filt"], input=sass, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the blocks of every kernel whose name matches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem", help="a file of csrc/cuda, without .cu")
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--kernel", default="", help="regular expression on the demangled name")
    parser.add_argument("--least", type=int, default=8, help="leave out blocks of fewer instructions")
    parser.add_argument("--loops", type=int, default=1, help="leave out blocks with fewer loops around them; 0: none")
    options = parser.parse_args()
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not on the PATH: it comes with CUDA, and as the package nvidia-cuda-{tool}")
    for name, instructions in functions(listing_of(options.stem, options.arch)).items():
        short = re.sub(r"inflection::|\(anonymous namespace\)::|void ", "", name).split("(")[0]
        if not re.search(options.kernel, short):
            continue
        print(f"\n{short}: {len(instructions)} instructions")
        header = " ".join(f"{column:>7}" for column in COLUMNS)
        print(f"{'address':>8} {'to':>8} {'loops':>5} {'all':>5} {header}")
        for address, target, depth, counts in blocks(instructions):
            if depth >= options.loops and counts.total() >= options.least:
                row = " ".join(f"{counts[column] or '.':>7}" for column in COLUMNS)
                to = "." if target is None else f"{target:x}"
                print(f"{address:8x} {to:>8} {depth:5} {counts.total():5} {row}")


if __name__ == "__main__":
    main()
