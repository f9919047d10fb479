"""Memory of weights that are read matrix by matrix: that of the largest, whatever the shards are."""

import subprocess
import sys

import torch
from safetensors.torch import save_file

MIB = 2**20
SCRIPT = """
import sys
from inflection_fast.checkpoints.files import find
from inflection_fast.checkpoints.weights import spectra

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

small, large = sys.argv[1:]
spectra(find(small))  # libraries and their buffers are there
before = peak()
found = spectra(find(large))
print(len(found), peak() - before)
"""


def shards(folder, count, matrices, rows, columns):
    folder.mkdir()
    for i in range(count):
        tensors = {f"h.{i}.{k}.w": torch.randn(rows, columns) for k in range(matrices)}
        save_file(tensors, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    return folder


def test_memory_is_that_of_the_largest_matrix_and_not_of_a_shard(tmp_path):
    rows, columns = 64, 131072  # 32 MiB
    small = shards(tmp_path / "small", 1, 1, 64, 4096)
    large = shards(tmp_path / "large", 2, 4, rows, columns)  # 256 MiB in shards of 128
    command = [sys.executable, "-c", SCRIPT, str(small), str(large)]
    count, more = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert count == 8
    assert more < 1.25 * 4 * rows * columns + 8 * MIB, f"{more / MIB:.0f} MiB"
