"""Between the folder of a study and what is published of it: one small JSON per cell, and what cells share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from inflection_fast.run.errors import UserError
from inflection_fast.run.folder import load_settings, write_json, write_text
from inflection_fast.study.cells import cells_of
from inflection_fast.study.choices import choices_of
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.store import Store
from inflection_fast.timeline import Timeline

__all__ = ["publish", "reuse"]


def publish(study: Path, out: Path) -> int:
    """Copy the cells of a study, what they share, the layers that its measurements would choose, and its confirmations.

    Returns the number of cells. What `out` holds beside them stays, so that a study may be computed in several folders.
    UserError where there is no study.
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
    for name in ("rates", "sources", "probes", "gradients"):
        paths = sorted((study / name).glob("*.json"))
        found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        _add(out / f"{name}.json", found)
    choices: dict[str, Any] = {}
    for path in sorted(study.glob("measured/*.json")):
        choices[path.stem] = choices_of(Timeline.load(path.with_suffix("")), settings["blocks"])
    _add(out / "choices.json", choices)
    _add(out / "confirmations.json", settings["confirmations"])
    return count


def reuse(published: Path, config: StudyConfig, store: Store) -> int:
    """Take published cells and learning rates into the folder of a study, where they count as computed.

    Returns the number of cells taken over. A cell that the study has already stays as it is. UserError where there are
    no published cells, or where one was trained with other settings.
    """
    if not (published / "cells").is_dir():
        raise UserError(f"{published} holds no published cells (it has no folder `cells`)")
    train = {name: getattr(config.train, name) for name in ("steps", "batch_size", "precision")}
    train["max_length"] = config.model.max_length
    count = 0
    for cell in cells_of(config):
        name = f"cells/{cell.name}.json"
        path = published / name
        if not path.is_file() or store.find(name) is not None:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["run_info"]["error_msg"]:
            continue
        trained = content["run_info"]["train_config"]
        for setting, value in train.items():
            if trained[setting] != value:
                raise UserError(f"{path} was trained with {setting} {trained[setting]}, this study says {value}")
        write_json(store.path(name), content)
        count += 1
    for name, rate in _entries(published / "rates.json").items():
        if store.find(f"rates/{name}.json") is None:
            write_json(store.path(f"rates/{name}.json"), rate)
    return count


def _entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _add(path: Path, found: dict[str, Any]) -> None:
    """Add entries to a JSON file, one line each, so that a diff shows which entry changed."""
    if not found:
        return
    entries = sorted((_entries(path) | found).items())
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
