"""Several processes of one script, which train together over gloo on this machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from helpers import programs

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 300


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(words, folder, world, **environment):
    """`python WORDS` on `world` ranks, as torchrun starts them; rank i writes to `folder`/log{i}."""
    environment = os.environ | environment | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        programs.start(
            words, folder / f"log{rank}", environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world)
    ]


def finish(processes, seconds=SECONDS):
    """Wait for all of them, `seconds` for each; what still runs then is killed."""
    try:
        for process in processes:
            process.join(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_ranks(script, folder, world, *names, seconds=SECONDS):
    """Run `script folder names...` on `world` ranks, whose output goes to `folder`/log0, log1, ..."""
    finish(start_ranks([TESTS / script, folder, *names], folder, world), seconds)
    return folder


def told(folder, name, rank=0):
    """What a rank has left of a scenario, as JSON."""
    path = folder / name / f"rank{rank}.json"
    assert path.exists(), (folder / f"log{rank}").read_text()[-3000:]
    return json.loads(path.read_text())
