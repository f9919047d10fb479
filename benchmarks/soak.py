"""Measure very many steps of a very small model: memory, handles and threads have to stay as they were.

    python benchmarks/soak.py 20000

Prints resident memory, open file handles and threads at tenths of the run, and fails if they grow after the first one.
"""

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from inflection_fast import Monitor, MonitorConfig, Timeline

WIDTH, HEADS, TOKENS, BATCH = 8, 2, 6, 2
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
MOST_GROWTH_MIB = 4.0  # of the allocator's own unrest; a leak of 300 bytes a step would be more in 18000 steps


class Block(nn.Module):
    """Attention and nothing else."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """[B, T, WIDTH] to the same."""
        q, k, v = self.attention(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def used() -> dict[str, float]:
    """What this process holds: memory, handles, threads."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    handles = len(os.listdir("/proc/self/fd"))
    return {"MiB": resident * PAGE_MIB, "handles": handles, "threads": threading.active_count()}


def main() -> int:
    """Run the soak; 1 if something grew or a step is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", type=int, nargs="?", default=20_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(BATCH, TOKENS, WIDTH)
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        with Monitor(model, MonitorConfig(every=1, rows=4, blocks=("0", "1")), folder) as monitor:
            for step in range(steps):
                loss = model(x).square().mean()
                loss.backward()
                monitor.step(loss)
                model.zero_grad()
                if step % max(steps // 10, 1) == 0:
                    seen.append(used())
                    print(step, {name: round(value, 1) for name, value in seen[-1].items()}, flush=True)
        measured = len(Timeline.load(folder).steps)
    growth = {name: seen[-1][name] - seen[1][name] for name in seen[0]}
    print(f"{measured} of {steps} steps in the timeline, {monitor.dropped} dropped; growth after a tenth: {growth}")
    grew = growth["MiB"] > MOST_GROWTH_MIB or growth["handles"] > 0 or growth["threads"] > 0
    return int(grew or measured + monitor.dropped != steps)


if __name__ == "__main__":
    sys.exit(main())
