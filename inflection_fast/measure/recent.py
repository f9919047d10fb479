"""Tables of what was worked out before, which a run of months does not fill."""

from __future__ import annotations

__all__ = ["Recent"]


class Recent(dict):
    """A dict with no more than `most` keys; a new one takes the place of the oldest."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __setitem__(self, key, value) -> None:
        if key not in self and len(self) == self._most:
            del self[next(iter(self))]
        super().__setitem__(key, value)
