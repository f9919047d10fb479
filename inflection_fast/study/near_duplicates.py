"""Near-duplicates: texts whose sets of letter sequences overlap, found by MinHash and confirmed exactly."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LETTERS", "near_duplicates"]

LETTERS = 5  # length of the letter sequences: shorter ones are shared by unrelated texts
PERMUTATIONS = 128
CANDIDATES = 0.7  # of the threshold: the estimate of 128 permutations errs by some 0.04


def near_duplicates(texts: Sequence[str], others: Sequence[str] | None, threshold: float) -> list[int]:
    """Indices of the texts that resemble one of `others`, or an earlier text where `others` is None.

    Two texts resemble each other where the Jaccard similarity of their sets of five consecutive letters is at least
    `threshold`. Candidates come from MinHash with locality-sensitive hashing (datasketch), asked for pairs well below
    the threshold so that it seldom misses one; every candidate is confirmed by the exact similarity, so no pair below
    the threshold is reported.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=CANDIDATES * threshold, num_perm=PERMUTATIONS)
    pieces: dict[int, frozenset[str]] = {}

    def sketch(letters: frozenset[str]) -> MinHash:
        hashed = MinHash(num_perm=PERMUTATIONS, seed=1)
        hashed.update_batch([piece.encode() for piece in letters])
        return hashed

    for i, text in enumerate(others or ()):
        pieces[i] = letters_of(text)
        index.insert(i, sketch(pieces[i]))
    found = []
    for i, text in enumerate(texts):
        letters = letters_of(text)
        hashed = sketch(letters)
        if any(jaccard(letters, pieces[j]) >= threshold for j in index.query(hashed)):
            found.append(i)
        elif others is None:
            pieces[i] = letters
            index.insert(i, hashed)
    return found


def letters_of(text: str) -> frozenset[str]:
    """All sequences of five letters of a text; the text itself where it is shorter."""
    return frozenset(text[i : i + LETTERS] for i in range(max(1, len(text) - LETTERS + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """The share that two sets have in common."""
    return len(a & b) / len(a | b)
