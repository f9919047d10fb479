"""The folder of a study: results that are whole or not there, and claims on the work that is not done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inflection_fast.run.errors import UserError
from inflection_fast.run.folder import load_settings, write_json, write_text
from inflection_fast.study.config import StudyConfig, changed, plain

__all__ = ["Busy", "Store", "damaged"]


class Busy(Exception):
    """Another process is computing this; there is other work."""


class Store:
    """Results by name under one folder.

    A claim is a lock on a file (flock), which the system releases when its process dies: nothing has to be cleaned up
    after a worker that was killed, and any number of processes on one disk can share the work.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of(cls, config: StudyConfig) -> Store:
        """The store of a study; UserError where the folder holds another study."""
        folder, settings = config.folder, plain(config)
        saved = folder / "study.yaml"
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output {folder} is a file, not a folder")
        if saved.is_file():
            differences = changed(load_settings(saved), settings)
            if differences:
                raise UserError(
                    f"output {folder} holds a study with other settings: {'; '.join(differences)}."
                    " Choose another output folder, or the same settings to continue that study"
                )
        elif folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir()):
            raise UserError(f"output {folder} is not empty and holds no study: choose another folder")
        import yaml

        write_text(saved, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return cls(folder)

    def path(self, name: str) -> Path:
        """Where a result lies."""
        return self.folder / name

    def find(self, name: str) -> Any | None:
        """A JSON result, or None where it has not been computed."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(path) from error

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Hold the claim on one result; Busy where another process holds it."""
        lock = self.folder / "claims" / f"{name.replace('/', '__')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                yield
        except Timeout as error:
            raise Busy(name) from error

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON result, computed where it is missing; Busy where another process computes it."""
        found = self.find(name)
        if found is None:
            with self.claim(name):
                found = self.find(name)
                if found is None:
                    found = compute()
                    write_json(self.path(name), found)
        return found


def damaged(path: Path) -> UserError:
    """What to do about a file of the study that cannot be read."""
    return UserError(f"{path} is damaged: remove it, and the same command computes it again")
