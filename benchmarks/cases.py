"""The shared harness: rivals interleaved in one process, medians, a stamp of the machine, one results file per device.

To add a case, write a test that takes pytest-benchmark's fixture and hands the rivals over, ours first:

    def bench_entropy(benchmark):
        x = torch.randn(8, 12, 512, 512)
        race(
            benchmark,
            "entropy from logits, fp32, B8 H12 T512",
            {"ours": lambda: attention_entropy(x), "eager": lambda: eager(x), "x.sum()": lambda: x.sum()},
            goals={"eager": 20, "x.sum()": 1 / 1.8},   # ours must be so many times as fast as that rival
        )

One round calls every rival once, in a new random order, so that whatever disturbs the machine disturbs all of them.
Times are milliseconds, ratios are those of medians: rival / ours. What is not a time goes into `extra`, see
`extra_bytes`; what follows from the times is a function of their medians there.
Nothing fails by the clock: goals that were missed stand in the results and in the table like those that were met.

`python -m pytest benchmarks` runs all, `python benchmarks/table.py` then writes the README's table.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 15
PERCENTILES = (20, 50, 80)
L2_BYTES = 1 << 28  # more than any GPU's second-level cache: written between rivals, so that each reads from memory


def race(
    benchmark,
    name: str,
    rivals: dict[str, Callable[[], object]],
    *,
    goals: dict[str, float] | None = None,
    extra: dict[str, float] | Callable[[dict[str, float]], dict[str, float]] | None = None,
    rounds: int = ROUNDS,
    warmup: int = 2,
    calls: int = 1,
    device: str = "cpu",
) -> dict:
    """Time the rivals, `calls` calls each a round; store, print and return the record of this case."""
    ours, *others = rivals
    unknown = set(goals or {}) - set(others)
    if unknown:
        raise ValueError(f"goals: {sorted(unknown)} are no rivals of {name!r}; rivals: {others}")
    times: dict[str, list[float]] = {label: [] for label in rivals}
    clock = _cuda_ms if device == "cuda" else _cpu_ms

    order = random.Random(0)

    def one_round() -> None:
        for label in order.sample(list(rivals), len(rivals)):
            times[label].append(clock(rivals[label], calls))

    gc.collect()
    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup, iterations=1)
    record = _record(times, warmup, goals or {}, extra or {})
    benchmark.extra_info.update(record)
    _store(name, record, device)
    told = "  ".join(
        f"{label} {record['ms'][label]['p50']:.3g} ms (x{record['ratios'][label]:.2f})" for label in others
    )
    print(f"\n{name}: {ours} {record['ms'][ours]['p50']:.3g} ms; {told}")
    return record


def extra_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that tensors allocated during `call` held at once, outputs included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        keep = call()
    del keep
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def results_path(device: str = "cpu") -> Path:
    """Where the results of this machine stand."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", machine(device)["name"].lower()).strip("-") + ".json")


def machine(device: str = "cpu") -> dict:
    """What the numbers were measured on."""
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        versions = {"driver": drivers[0], "cuda": torch.version.cuda, "torch": torch.__version__}
        return {"name": torch.cuda.get_device_name(), **versions}
    from inflection_fast import build_info

    info = Path("/proc/cpuinfo")
    threads = torch.get_num_threads()
    model = cpu_model(info.read_text() if info.exists() else "") or platform.processor() or platform.machine()
    return {
        "name": f"{model}, {threads} threads, {build_info()['cpu']['isa']}",
        "torch": torch.__version__,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def cpu_model(cpuinfo: str) -> str:
    """Name and generation of the first processor that /proc/cpuinfo lists; "" where it names none.

    Virtual machines often give the vendor alone as the name: family and model, or implementer and part on Arm, tell the
    generations apart.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), " ".join(value.split()))
    words = {"cpu family": "family", "model": "model", "cpu implementer": "implementer", "cpu part": "part"}
    generation = ", ".join(f"{word} {fields[key]}" for key, word in words.items() if fields.get(key))
    name = fields.get("model name") or ("Arm" if "cpu part" in fields else "")
    return f"{name} ({generation})" if name and generation else name


def _record(times: dict[str, list[float]], warmup: int, goals: dict[str, float], extra) -> dict:
    ours, *others = times
    kept = {label: sorted(values[warmup:]) for label, values in times.items()}
    median = {label: statistics.median(values) for label, values in kept.items()}
    return {
        "ours": ours,
        "ms": {
            label: {f"p{p}": round(_percentile(values, p), 5) for p in PERCENTILES} for label, values in kept.items()
        },
        "ratios": {label: round(median[label] / median[ours], 3) for label in others},
        "goals": {label: round(goal, 3) for label, goal in goals.items()},
        "extra": extra(median) if callable(extra) else extra,
        "rounds": len(kept[ours]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _percentile(ordered: list[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def _cpu_ms(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / calls / 1e6


def _cuda_ms(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _store(name: str, record: dict, device: str) -> None:
    path = results_path(device)
    path.parent.mkdir(exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    stored["machine"] = machine(device)
    stored["cases"][name] = record
    path.write_text(json.dumps(stored, indent=1, sort_keys=False) + "\n")


def _commit() -> str:
    stamp = RESULTS.parent / "commit.txt"  # left by gpu.sh, whose copy is no repository
    if stamp.exists():
        return stamp.read_text().strip()
    asked = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
