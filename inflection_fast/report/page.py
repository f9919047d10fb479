"""The report folder with both pages, Markdown and HTML, replaced as a whole."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from inflection_fast.report import folder as run_folder_files
from inflection_fast.report import pictures, sections
from inflection_fast.report.content import Content, timeline_of
from inflection_fast.report.figures import write_figures
from inflection_fast.report.single_page import write_html

__all__ = ["write"]

FOLDER, PAGE, HTML, FIGURES = "report", "index.md", "index.html", "figures"


def write(run_folder: str | Path, *, figures: bool = False) -> Path:
    """Write `report/index.html` and `report/index.md` with its pictures into a run folder; returns the latter path.

    A folder with a timeline of a Monitor alone gets `index.html`, whose path is returned. With `figures`, every chart
    is written to `report/figures` as SVG and PDF. An earlier report is replaced when the new one is complete; other
    files in its folder are kept. ValueError if the folder is not a run or a file in it is damaged.
    """
    content = Content(Path(run_folder))
    bare = not (content.folder / "run.json").is_file() and timeline_of(content.folder).is_file()
    run = None if bare else run_folder_files.read(run_folder)
    content.update()
    target = content.folder / FOLDER
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} must be a folder for the report, and is a file.")
    fresh = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=content.folder))
    try:
        fresh.chmod(0o755)  # mkdtemp makes it private; a report is to be read
        if run is not None:
            drawn = pictures.draw(run, fresh)
            (fresh / PAGE).write_text(sections.page(run, drawn), encoding="utf-8")
        write_html(content, fresh / HTML)
        if figures:
            write_figures(content, run, fresh / FIGURES)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target / (HTML if bare else PAGE)


def _swap(fresh: Path, target: Path) -> None:
    """Replace the old folder by the fresh one; files that are not of a report are moved to it."""
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
    own = {PAGE, HTML, FIGURES, *pictures.FILES.values(), *_pictures_of(aside / PAGE)}
    for path in aside.iterdir():
        if path.name not in own:
            path.rename(target / path.name)
    shutil.rmtree(aside.parent)


def _pictures_of(page: Path) -> list[str]:
    """The pictures of an earlier page, whose columns may no longer exist."""
    if not page.is_file():
        return []
    return re.findall(r"!\[[^]]*\]\(([^()/]+\.png)\)", page.read_text(encoding="utf-8", errors="replace"))
