"""Several processes of one script, which train together over gloo on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 300


def run_ranks(script, folder, world, *names, seconds=SECONDS):
    """Run `script folder names...` on `world` ranks, whose output goes to `folder`/log0, log1, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, str(TESTS / script), str(folder), *names]
    processes, logs = [], []
    try:
        for rank in range(world):
            logs.append(open(folder / f"log{rank}", "wb"))
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, env=environment | ranks, stdout=logs[-1], stderr=subprocess.STDOUT)
            )
        for process in processes:
            process.wait(seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return folder


def told(folder, name, rank=0):
    """What a rank has left of a scenario, as JSON."""
    path = folder / name / f"rank{rank}.json"
    assert path.exists(), (folder / f"log{rank}").read_text()[-3000:]
    return json.loads(path.read_text())
