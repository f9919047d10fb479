"""What a study would compute, and how long that would take: from one timed step and one timed evaluation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from inflection_fast.run.models import load_model, load_tokenizer
from inflection_fast.study.adaptation import Spending, on_layers
from inflection_fast.study.arms import arm_of
from inflection_fast.study.cells import Job, jobs_of
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.texts import TASK, Tokens
from inflection_fast.study.training_loop import logits_of, train

__all__ = ["estimate"]

TIMED_STEPS = 4
# A step that trains everything reads and writes all weights, their gradients and two states each: measured at 1.6 to
# 2.2 of a step of LoRA everywhere on the encoders tried.
FULL_STEP = 2.0


def estimate(config: StudyConfig, only: str | None, jobs: int) -> Iterator[str]:
    """Lines to print: the cells, the shared work, and the hours it takes at most, with texts of full length."""
    work = jobs_of(config, only)
    cells = [job.cell for job in work if job.cell is not None]
    yield from (cell.name for cell in cells)
    counts = Counter(job.what for job in work)
    yield (
        f"{counts['cell']} cells, {counts['tune']} trainings of the search for learning rates, {counts['source']}"
        f" sources, {counts['gradients']} trainings that are measured all along"
    )
    step, text = _timed(config)
    seconds = sum(_seconds(config, job, step, text) for job in work)
    yield (
        f"a step of LoRA everywhere takes {1000 * step:.0f} ms and a text of an evaluation {1000 * text:.2f} ms here,"
        f" with texts of {config.model.max_length} tokens, the most there can be"
    )
    yield (
        f"at most about {seconds / 3600 / jobs:.1f} hours with {jobs} worker{'s' if jobs > 1 else ''}, if each has a"
        " processor to itself; arms that choose alike share a training, which is not counted on"
    )


def _timed(config: StudyConfig) -> tuple[float, float]:
    """Seconds of a step of LoRA everywhere, and of a text of an evaluation."""
    loop = config.train
    if loop.threads:
        torch.set_num_threads(loop.threads)
    model = load_model(config.model, TASK, load_tokenizer(config.model), labels=("a", "b"))
    rng = np.random.default_rng(0)
    length, count = config.model.max_length, max(loop.batch_size * 2, loop.eval_batch_size)
    ids = rng.integers(5, model.config.vocab_size, (count, length)).astype(np.int32)
    tokens = Tokens(ids, np.full(count, length, np.int32), rng.integers(0, 2, count))
    from inflection_fast.blocks import find_blocks

    everywhere = on_layers(model, range(len(find_blocks(model))), Spending(config.budget).over)
    adapted = everywhere.apply(model, TIMED_STEPS)
    train(adapted, tokens, loop, learning_rate=1e-3, seed=0, steps=1)  # warms up
    trained = train(adapted, tokens, loop, learning_rate=1e-3, seed=0, steps=TIMED_STEPS)
    begin = time.perf_counter()
    logits_of(adapted, tokens, loop)
    return trained.clock.wall / TIMED_STEPS, (time.perf_counter() - begin) / count


def _seconds(config: StudyConfig, job: Job, step: float, text: float) -> float:
    if job.what == "source":
        length = config.regimes[job.regime]
        steps = length.steps_of(config.source.limit, config.train.batch_size)
        return steps * step * FULL_STEP + config.source.test * text
    if job.what == "probes":
        return config.target.validation * text
    judged = config.target.validation if job.what == "tune" else config.target.test + config.source.test
    cost = config.train.steps * step * _factor(job.arm) + judged * text
    if job.what == "gradients":
        cost += 2 * config.target.validation * text
    return cost


def _factor(arm: str) -> float:
    return FULL_STEP if getattr(arm_of(arm), "kind", "lora") in ("full", "lisa", "unfreeze") else 1.0
