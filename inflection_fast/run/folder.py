"""The output folder of a run: its settings, and which stages have begun or finished."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from inflection_fast.atomic import write_json, write_text
from inflection_fast.decide import Plan
from inflection_fast.records import RUN, STAGE, RunRecord, StageRecord
from inflection_fast.run import processes
from inflection_fast.run.config import RunConfig, differences, to_dict
from inflection_fast.run.errors import UserError, user_errors

__all__ = ["RunFolder", "load_settings", "package_versions", "write_json", "write_text"]

OWN_FILES = ("config.yaml", RUN)  # written before the first stage
PACKAGES = ("inflection_fast", "torch", "transformers", "peft", "datasets", "accelerate", "pyarrow", "numpy")
ORDER = ("source", "measure", "plan", "tune", "baseline-")  # every stage depends on those before it
FIRST_STAGE = {
    "measure": "measure",
    "select": "plan",
    "tune": "tune",
}  # that depends on a setting; others: on the first
FREE = ("output", "baselines")  # settings that no stage depends on


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of the installed packages among `names`, by default of those that results depend on."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class RunFolder:
    """A run's output folder.

    UserError for the folder of another run. A setting may change until a stage that depends on it has begun.
    """

    def __init__(self, config: RunConfig):
        self.path = config.folder
        self._settings = to_dict(config)
        self._seed = config.seed
        self._lock: FileLock | None = None  # of the first process
        processes.alone(self._open)

    def _open(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file, not a folder")
        saved = self.path / "config.yaml"
        used = self.path.is_dir() and any(_is_result(item.name) for item in self.path.iterdir())
        if used and not saved.is_file():
            raise UserError(f"output {self.path} is not empty and holds no run: choose another folder")
        self._lock = self._locked()
        if used:
            self._accept_changes(load_settings(saved))
        if not used or not (self.path / RUN).is_file():
            RunRecord((), package_versions(), self._seed).save(self.path / RUN)
        elif (record := self._record()).seed != self._seed:
            RunRecord(record.finished, record.versions, self._seed).save(self.path / RUN)
        if not saved.is_file() or load_settings(saved) != self._settings:
            import yaml

            write_text(saved, yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True))

    def _locked(self) -> FileLock:
        """The lock against other processes while this folder is open; this process may open the folder again."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"output {self.path} is in use by another process: wait until it ends, or choose another folder"
            ) from error
        return lock

    def _accept_changes(self, old: dict[str, Any]) -> None:
        """Delete a plan made with `old` settings. UserError if a stage has begun that depends on a changed setting."""
        changed: dict[str, list[str]] = {}
        for key in dict.fromkeys([*old, *self._settings]):
            found = differences({key: old.get(key)}, {key: self._settings.get(key)})
            if found and key not in FREE:
                changed[key] = found
        stages = {stage for key in changed for stage in ORDER[ORDER.index(FIRST_STAGE.get(key, ORDER[0])) :]}
        begun = [path for path in self._stages(tuple(stages)) if _begun(path)]
        if begun:
            names = "; ".join(name for found in changed.values() for name in found)
            folders = ", ".join(str(path) for path in begun)
            raise UserError(
                f"output {self.path} holds stages with other settings: {names}. Choose another output folder, give the"
                f" same settings to continue, or delete what depends on them ({folders})"
            )
        if "select" in changed:
            self._delete_plan(old.get("select") or {})

    def _stages(self, stages: tuple[str, ...]) -> list[Path]:
        return [path for path in sorted(self.path.iterdir()) if path.is_dir() and path.name.startswith(stages)]

    def _delete_plan(self, old: dict[str, Any]) -> None:
        """Delete the plan that was made with the old settings; a plan from elsewhere stays."""
        path = self.path / "plan.json"
        if path.is_file() and self.finished("plan"):
            with user_errors():
                made_with = to_dict(Plan.load(path).config)
            if all(made_with.get(name) == value for name, value in old.items()):
                path.unlink()

    def finished(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return processes.alone(lambda: stage in self._record().finished)

    def finish(self, stage: str) -> None:
        """Record a stage as finished, after its files are written."""

        def record_finished() -> None:
            record = self._record()
            if stage not in record.finished:
                RunRecord((*record.finished, stage), package_versions(), record.seed).save(self.path / RUN)

        processes.alone(record_finished)

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name

    def record(self, stage: str) -> StageRecord:
        """The record of a finished stage."""
        with user_errors():
            return processes.alone(lambda: StageRecord.load(self.stage(stage) / STAGE))

    def _record(self) -> RunRecord:
        with user_errors():
            return RunRecord.load(self.path / RUN)


def _begun(path: Path) -> bool:
    """Whether a stage has results, or a checkpoint to continue from."""
    results = [path / STAGE, path / "training.json"]
    return any(file.is_file() for file in results) or any(path.glob("checkpoints/checkpoint-*/clock.json"))


def _is_result(name: str) -> bool:
    return name not in OWN_FILES and not name.startswith(".")  # hidden files are of desktops and interrupted writes


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
