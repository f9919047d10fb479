"""The data of a run in sentences: source, split, and dropped texts."""

from __future__ import annotations

from typing import Any

from inflection_fast.report.folder import Run, Stage
from inflection_fast.report.words import MISSING, count, listed, percent

__all__ = ["described"]


def described(run: Run) -> list[str]:
    """One Markdown line per data set."""
    target = next((s for s in (run.measure, run.tune, *run.baselines) if s is not None and s.data), None)
    lines = []
    if run.source is not None or run.settings.get("source"):
        settings = (run.settings.get("source") or {}).get("data") or {}
        lines.append(f"**Source data:** {_data_set(settings, run.source)}")
    lines.append(f"**Target data:** {_data_set(run.settings.get('target') or {}, target)}")
    return lines


def _data_set(settings: dict[str, Any], stage: Stage | None) -> str:
    data = stage.data if stage is not None else None
    sentences = [f"`{settings['path']}`" if settings.get("path") else f"where it came from is {MISSING}"]
    if data is not None:
        probe = f" and {count(data.probe)} only to follow the representations" if data.probe else ""
        sentences[0] += f", {count(data.train)} texts to train on, {count(data.test)} to test on{probe}."
        if data.labels:
            labels = listed([f"`{label}`" for label in data.labels])
            share = None if stage is None else stage.majority
            majority = f"; the most frequent is {percent(share)} of the test texts" if share else ""
            sentences.append(f"Labels: {labels}{majority}.")
    else:
        sentences[0] += f"; sizes {MISSING}."
    if settings:
        sentences.append(_split(settings))
        sentences += _limits(settings)
        if not settings.get("deduplicate"):
            sentences.append("Duplicates were not looked for, so texts may stand on both sides of the split.")
    if data is not None and data.dropped:
        sentences.append(f"Left out: {listed([f'{count(number)} {why}' for why, number in data.dropped.items()])}.")
    elif data is not None and settings.get("deduplicate"):
        sentences.append("Duplicates were looked for, and there were none.")
    return " ".join(sentences)


def _split(settings: dict[str, Any]) -> str:
    if settings.get("test"):
        return f"Tested on `{settings['test']}`."
    share = percent(settings.get("test_share"), 0)
    seed = f"(split seed {settings.get('split_seed', MISSING)})"
    if settings.get("group"):
        group = f"Split at random by `{settings['group']}`"
        return f"{group}, {share} to test on, so that no value of it is on both sides {seed}."
    return f"Split at random by text, {share} to test on {seed}."


def _limits(settings: dict[str, Any]) -> list[str]:
    limits = [
        f"at most {count(settings[name])} to {verb} on"
        for name, verb in (("train_limit", "train"), ("test_limit", "test"))
        if settings.get(name)
    ]
    return [f"Drawn at random: {listed(limits)}."] if limits else []
