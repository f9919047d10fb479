"""Errors that the user can fix, apart from those of the program."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "disk_full", "refused_path", "takes_nothing", "user_errors"]

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class UserError(Exception):
    """A wrong setting, file or machine: its message is one sentence that says what to change."""


@contextmanager
def user_errors(kind: type[Exception] = ValueError, *more: type[Exception], about: str = "") -> Iterator[None]:
    """Turn exceptions of these classes into a UserError that begins with `about`.

    Only for calls whose errors of these classes are about the user's input. Other errors keep their traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (kind, *more) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{about}: {text}" if about else text) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, is that of a full disk.

    torch and safetensors write files in C++ and Rust, and report a full disk in a message without an errno.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if any(words in text for words in ("No space left on device", "Disk quota exceeded", "StorageFull")):
            return True
        if "PytorchStreamWriter failed writing" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def takes_nothing(error: Exception) -> bool:
    """Whether the disk is full or read-only, so that nothing can be recorded either."""
    return disk_full(error) or (isinstance(error, OSError) and error.errno == errno.EROFS)


def refused_path(error: BaseException | None) -> str | None:
    """The path that the system refused, and why, by this error or one that caused it; None for other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS and error.filename is not None:
            return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
        error = error.__cause__ or error.__context__
    return None
