"""From the folder of a study to what is published: one small JSON per cell, and what cells share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from inflection_fast.run.errors import UserError
from inflection_fast.run.folder import load_settings, write_text
from inflection_fast.study.choices import choices_of
from inflection_fast.timeline import Timeline

__all__ = ["publish"]


def publish(study: Path, out: Path) -> int:
    """Copies the cells of a study, its learning rates and sources, and what its measurements point at.

    Returns the number of cells. UserError where there is no study.
    """
    if not (study / "study.yaml").is_file():
        raise UserError(f"{study} holds no study (it has no study.yaml)")
    settings = load_settings(study / "study.yaml")
    count = 0
    for path in sorted((study / "cells").rglob("*.json")):
        target = out / path.relative_to(study)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        count += 1
    for name, pattern in (("rates", "rates/*.json"), ("sources", "sources/*.json"), ("gradients", "gradients/*.json")):
        found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(study.glob(pattern))}
        if found:
            _write(out / f"{name}.json", found)
    choices: dict[str, Any] = {}
    for path in sorted(study.glob("measured/*.json")):
        choices[path.stem] = choices_of(Timeline.load(path.with_suffix("")), settings["blocks"])
    if choices:
        _write(out / "choices.json", choices)
    return count


def _write(path: Path, found: dict[str, Any]) -> None:
    """One line for each entry: small, and a change of one shows as one."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in found.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
