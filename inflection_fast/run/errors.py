"""What the person at the keyboard can mend, apart from what only a programmer can."""

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
    """Turns exceptions of these kinds into a UserError, said of `about`.

    Only around calls whose errors of that kind are known to speak of the user's input; anywhere else they keep their
    traceback.
    """
    try:
        yield
    except UserError:
        raise
    except (kind, *more) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{about}: {text}" if about else text) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that the disk took no more.

    torch and safetensors write files in C++ and Rust, and report a full disk in words instead of an errno.
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
    """Whether the disk is full, or cannot be written at all: then nothing could be recorded either."""
    return disk_full(error) or (isinstance(error, OSError) and error.errno == errno.EROFS)


def refused_path(error: BaseException | None) -> str | None:
    """The file or folder that this error, or one that it was raised from, says the system refused, and why."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSALS and error.filename is not None:
            return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
        error = error.__cause__ or error.__context__
    return None
