"""The output folder of a run: whose it is, what is finished, and files that are either whole or not there."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from inflection_fast.run.config import RunConfig, differences, to_dict
from inflection_fast.run.errors import UserError

__all__ = ["RunFolder", "load_settings", "package_versions", "write_json", "write_text"]

FORMAT = 1
OWN_FILES = ("config.yaml", "run.json")  # what the folder of a run holds before its first stage
PACKAGES = ("inflection_fast", "torch", "transformers", "peft", "datasets", "accelerate", "pyarrow", "numpy")


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all, also when the machine goes down meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def package_versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RunFolder:
    """A run's output folder; opening it refuses the folder of another run."""

    def __init__(self, config: RunConfig):
        self.path = config.folder
        settings = to_dict(config)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file, not a folder")
        saved = self.path / "config.yaml"
        begun = self.path.is_dir() and [item.name for item in self.path.iterdir() if item.name not in OWN_FILES]
        if saved.is_file() and begun:
            old = load_settings(saved)
            # The name of the folder is not a setting of the run: a folder that was moved is still its own.
            changed = differences({**old, "output": None}, {**settings, "output": None})
            if changed:
                raise UserError(
                    f"output {self.path} holds a run with other settings: {'; '.join(changed)}."
                    " Choose another output folder, or the same settings to continue that run"
                )
        elif begun:
            raise UserError(f"output {self.path} is not empty and holds no run: choose another folder")
        else:
            import yaml

            write_text(saved, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        if not self._facts.is_file():
            self._write([], config.seed)

    @property
    def _facts(self) -> Path:
        return self.path / "run.json"

    def _write(self, finished: list[str], seed: int) -> None:
        write_json(
            self._facts,
            {"format": FORMAT, "finished": finished, "versions": package_versions(), "seed": seed},
        )

    def _read(self) -> dict[str, Any]:
        try:
            facts = json.loads(self._facts.read_text(encoding="utf-8"))
            facts["finished"], facts["seed"], facts["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._facts} is damaged: choose another output folder") from error
        if facts["format"] != FORMAT:
            raise UserError(f"{self._facts} has format {facts['format']!r}; this version writes format {FORMAT}")
        return facts

    def finished(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return stage in self._read()["finished"]

    def finish(self, stage: str) -> None:
        """Notes a stage as finished; last of all, when its files are written."""
        facts = self._read()
        if stage not in facts["finished"]:
            self._write([*facts["finished"], stage], facts["seed"])

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name


def load_settings(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings")
    return settings
