"""Reading GGUF files by Transformers in less memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from inflection_fast.quantities.spectrum import dequantised, forget_pages

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

__all__ = ["low_memory_gguf"]


@contextmanager
def low_memory_gguf() -> Iterator[None]:
    """While the context is open, Transformers reads a GGUF file once, the largest tensor first, dequantised in parts.

    By default it creates a reader each for the tokenizer, the configuration and the weights, which takes seconds with a
    large vocabulary, and a map of names for every module; it needs three times the memory of a tensor to dequantise it;
    and it keeps the pages of the file in memory besides the weights.
    """
    import gguf

    readers: dict[str, GGUFReader] = {}
    before = gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map
    reader_class = gguf.GGUFReader

    def once(file: str) -> GGUFReader:
        if str(file) not in readers:
            reader = reader_class(file)
            reader.tensors.sort(key=lambda tensor: -tensor.n_elements)
            readers[str(file)] = reader
        return readers[str(file)]

    def in_parts(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        found = dequantised(data, kind)
        for reader in readers.values():
            forget_pages(reader)
        return found

    try:
        setattr(gguf, "GGUFReader", once)  # noqa: B010  (to a type checker, a class is no variable)
        setattr(gguf, "dequantize", in_parts)  # noqa: B010
        setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))  # noqa: B010
        yield
    finally:
        for name, one in zip(("GGUFReader", "dequantize", "get_tensor_name_map"), before, strict=True):
            setattr(gguf, name, one)
