"""What to do with a timeline that exists in the folder."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from .timeline import FILE_NAME

__all__ = ["IF_EXISTS", "folder_for"]

IF_EXISTS = ("error", "overwrite", "new")


def folder_for(out: str | os.PathLike, if_exists: str, also: tuple[str, ...] = ()) -> Path:
    """The folder of a new timeline that was requested for `out`.

    Args:
        out: folder
        if_exists: with a timeline in `out`: "error" refuses it; "overwrite" deletes it and the files `also` beside it;
            "new" gives the first of `out`-2, `out`-3, ... that holds none

    Raises:
        ValueError: `if_exists` is something else, or is "error" and there is a timeline.
    """
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists: expected one of {', '.join(IF_EXISTS)}, got {if_exists!r}")
    folder = Path(out)
    if not (folder / FILE_NAME).exists():
        return folder
    if if_exists == "error":
        raise ValueError(
            f"{folder / FILE_NAME} exists already: choose another folder, or if_exists='overwrite' to delete it, or"
            " if_exists='new' for a folder beside it, or give the step to continue at (start_step of a Monitor)"
        )
    if if_exists == "overwrite":
        for name in (FILE_NAME, *also):
            (folder / name).unlink(missing_ok=True)
        return folder
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in numbered if not (path / FILE_NAME).exists())
