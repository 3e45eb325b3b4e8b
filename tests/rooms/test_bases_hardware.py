"""Hardware: what it states agrees with what the system shows."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from luthier.bases import hardware
from luthier.errors import LuthierError


def test_the_machine_is_described():
    found = hardware.describe("cpu")
    assert found.device == "cpu" and found.memory > 2**28 and found.threads == torch.get_num_threads()
    assert found.to_dict()["name"]


def test_a_device_by_name_or_the_best():
    assert hardware.choose_device("cpu").type == "cpu"
    assert hardware.choose_device().type == ("cuda" if torch.cuda.is_available() else hardware.choose_device().type)
    if not torch.cuda.is_available():
        with pytest.raises(LuthierError, match="cuda: not available"):
            hardware.choose_device("cuda")


def test_a_matrix_product_is_timed():
    assert hardware.peak_flops("cpu", size=128, seconds=0.02) > 1e7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_sees_a_block_and_forgets_it_when_reset():
    hardware.set_malloc()
    if not hardware.reset_peak():
        pytest.skip("/proc/self/clear_refs is not permitted here")
    before = hardware.peak_memory()
    with mmap.mmap(-1, 32 << 20) as block:  # pages of its own: an allocator may hand out some that are resident already
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert hardware.resident_memory() > 0
    assert hardware.peak_memory() - before > 24 << 20
    hardware.reset_peak()
    assert hardware.peak_memory() - before < 16 << 20
