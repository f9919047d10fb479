"""Running a study: worker processes that share a folder, on one machine or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inflection_fast.run.errors import UserError, disk_full
from inflection_fast.study.cells import Cell, Job, cells_of, jobs_of
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.store import Busy, Store

__all__ = ["Progress", "finished", "progress_of", "retry", "run", "work_through"]

PAUSE_S = 0.5  # between two attempts at jobs that other workers hold
LOOK_S = 2.0  # between two updates of the progress
DEATHS = 20  # workers that may die before the study gives up
FULL = 28  # exit code of a worker that met a full disk, after ENOSPC


@dataclass(frozen=True)
class Progress:
    """Progress of a study."""

    cells: int
    done: int
    failed: int

    @property
    def left(self) -> int:
        """Cells that are not computed."""
        return self.cells - self.done


def progress_of(config: StudyConfig, store: Store, only: str | None = None) -> Progress:
    """How many cells there are, are done, and failed."""
    states: Counter[str] = Counter()
    for cell in cells_of(config, only):
        found = store.find(f"cells/{cell.name}.json")
        if found is not None:
            states["failed" if found["run_info"]["error_msg"] else "good"] += 1
        states["all"] += 1
    return Progress(states["all"], states["good"] + states["failed"], states["failed"])


def finished(cells: Sequence[Cell], store: Store) -> int:
    """How many of the cells are computed or failed, without reading them."""
    return sum(store.path(f"cells/{cell.name}.json").is_file() for cell in cells)


def retry(config: StudyConfig, store: Store, only: str | None = None) -> int:
    """Remove the cells that failed, so that they are computed again. Returns how many there were."""
    removed = 0
    for cell in cells_of(config, only):
        found = store.find(f"cells/{cell.name}.json")
        if found is not None and found["run_info"]["error_msg"]:
            store.path(f"cells/{cell.name}.json").unlink()
            removed += 1
    return removed


def work_through(config: StudyConfig, only: str | None = None, begun: Callable[[Job], None] = lambda job: None) -> None:
    """Run as one worker: compute every job that no other worker holds, until none is left.

    A job that another process holds is tried again later. Where only such jobs are left, the worker waits for them,
    because the other process may die.
    """
    from inflection_fast.study.work import Work

    work = Work(config, Store.of(config))
    left = jobs_of(config, only)
    while left:
        waiting = []
        did = False
        for place, job in enumerate(left):
            begun(job)
            try:
                did |= work.do(job)
            except Busy:
                waiting.append(job)
                continue
            if did and waiting:
                # Back to the first job that was held: the order is that of their worth.
                waiting += left[place + 1 :]
                break
        if waiting and not did:
            time.sleep(PAUSE_S)
        left = waiting


def run(
    config: StudyConfig,
    *,
    jobs: int,
    executor: str,
    only: str | None,
    show: Callable[[], None] = lambda: None,
) -> Progress:
    """Compute what is missing with `jobs` workers. Returns the progress; `show` is called every few seconds.

    UserError where the disk is full, or workers keep dying: what is finished stays, and the same call goes on.
    """
    store = Store.of(config)
    cells_of(config, only)  # an unknown arm is reported before anything is computed
    (_with_ray if executor == "ray" else _with_processes)(config, jobs, only, show)
    return progress_of(config, store, only)


def _worker(config: StudyConfig, only: str | None) -> None:
    from inflection_fast.run.quiet import quiet_libraries

    quiet_libraries()
    signal.signal(signal.SIGTERM, _interrupted)  # an interrupted cell must not count as one that killed its worker
    parent = multiprocessing.parent_process()
    if parent is not None:  # a parent that is killed cannot stop its workers
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        work_through(config, only)
    except UserError as error:
        print(f"inflection-fast study: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if disk_full(error):
            sys.exit(FULL)
        raise


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _with_processes(config: StudyConfig, jobs: int, only: str | None, show: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork

    def start() -> Any:
        process = context.Process(target=_worker, args=(config, only), daemon=False)
        process.start()
        return process

    workers = [start() for _ in range(jobs)]
    deaths = 0
    try:
        while workers:
            time.sleep(LOOK_S)
            show()
            for worker in list(workers):
                if worker.is_alive():
                    continue
                workers.remove(worker)
                if worker.exitcode == FULL:
                    raise UserError(
                        "the disk is full: free some space and give the same command again; it goes on from there"
                    )
                if worker.exitcode == 2:
                    raise UserError("a worker stopped, for the reason above")
                if worker.exitcode:
                    deaths += 1
                    if deaths > DEATHS:
                        raise UserError(f"{deaths} workers died, the last with exit code {worker.exitcode}")
                    workers.append(start())  # its cell is free again, and is given up after several deaths
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _with_ray(config: StudyConfig, jobs: int, only: str | None, show: Callable[[], None]) -> None:
    """So many tasks on a Ray cluster whose machines share the folder; Ray restarts a task whose machine is lost."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError("--executor ray needs the package ray: pip install ray") from error

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)
    device = config.train.device
    remote: Any = ray.remote(
        num_cpus=max(1, config.train.threads), num_gpus=0 if device == "cpu" else 1, max_retries=DEATHS
    )
    tasks = [remote(work_through).remote(config, only) for _ in range(jobs)]
    try:
        while tasks:
            done, tasks = ray.wait(tasks, timeout=LOOK_S)
            show()
            for task in done:
                try:
                    ray.get(task)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    if disk_full(cause):
                        raise UserError("the disk is full: free some space and give the same command again") from error
                    if isinstance(cause, UserError):
                        raise UserError(str(cause)) from error
                    raise
    finally:
        for task in tasks:
            ray.cancel(task, force=True)
        if started_here:
            ray.shutdown()
