"""What the process holds, and that free memory is given back."""

import platform
import sys

import numpy as np
import pytest

from inflection_fast.checkpoints.memory import peak_bytes, resident_bytes, trim_memory

MIB = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="another C library")
def test_free_memory_below_what_is_still_held_is_given_back():
    trim_memory()
    before = resident_bytes()
    pieces = [np.ones(12_000) for _ in range(1000)]  # 92 MiB, each too small for pages of its own
    assert resident_bytes() - before > 80 * MIB
    del pieces[:-1]  # the last one keeps the end of the heap
    trim_memory()
    assert resident_bytes() - before < 20 * MIB
    assert peak_bytes() - before > 80 * MIB
