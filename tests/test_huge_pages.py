"""Large results of the CPU lie in huge pages where Linux has them: small ones cost more than what is written there."""

import re
from pathlib import Path

import pytest
import torch
from helpers.programs import spawn

from inflection_fast import attention_entropy

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="no Linux kernel with transparent huge pages",
)
MEGABYTE = 2**20


def asked_for_huge_pages(address):
    """Whether the mapping in which an address lies has been advised, by its flag "hg"."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise LookupError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_gradient_lies_in_huge_pages_but_for_its_ends(dtype):
    spawn(check_pages, (dtype,), 1)  # a new process: here malloc may have memory again that was advised before


def check_pages(rank, dtype):
    x = torch.randn(320 // dtype.itemsize, 2**17, dtype=dtype, requires_grad=True)  # 40 MiB: malloc keeps up to 32
    assert not asked_for_huge_pages(x.data_ptr() + 20 * MEGABYTE)  # what torch allocates itself
    (grad,) = torch.autograd.grad(attention_entropy(x).sum(), x)
    first, last = grad.data_ptr(), grad.data_ptr() + grad.numel() * grad.element_size()
    huge = 2 * MEGABYTE
    assert all(map(asked_for_huge_pages, (-(-first // huge) * huge, last // huge * huge - 1)))
    # Beyond whole huge pages nothing is asked for: that would take memory from the system that nobody wants.
    assert first % huge == 0 or not asked_for_huge_pages(first)
    assert last % huge == 0 or not asked_for_huge_pages(last - 1)
