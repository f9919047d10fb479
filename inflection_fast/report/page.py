"""The Markdown page and the folder around it, replaced as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from inflection_fast.report import folder as run_folder_files
from inflection_fast.report import pictures, sections

__all__ = ["write"]

FOLDER, PAGE = "report", "index.md"


def write(run_folder: str | Path) -> Path:
    """Writes `report/index.md` and its pictures into a run folder and returns the page's path.

    An earlier report is replaced once the new one is complete; if anything fails before, it stays as it was. Files in
    the report folder that are not a report's own are kept. ValueError if the folder is not a run or a file in it is
    damaged.
    """
    run = run_folder_files.read(run_folder)
    target = run.folder / FOLDER
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} must be a folder for the report, and is a file.")
    fresh = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=run.folder))
    try:
        fresh.chmod(0o755)  # mkdtemp makes it private; a report is to be read
        drawn = pictures.draw(run, fresh)
        (fresh / PAGE).write_text(sections.page(run, drawn), encoding="utf-8")
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target / PAGE


def _swap(fresh: Path, target: Path) -> None:
    """Puts the fresh folder where the old one was; what is not a report's own moves over."""
    if not target.exists():
        fresh.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-old-", dir=target.parent)) / FOLDER
    target.rename(aside)
    try:
        fresh.rename(target)
    except OSError:
        aside.rename(target)
        raise
    for path in aside.iterdir():
        if path.name != PAGE and path.name not in pictures.FILES.values():
            path.rename(target / path.name)
    shutil.rmtree(aside.parent)
