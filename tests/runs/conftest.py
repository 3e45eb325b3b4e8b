"""One world of tiny bases and records for all tests of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from luthier.training import run
from tests.runs.support import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder of tiny bases and records, made once."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; tiny models run fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # A thread that first meets torch in a forked child finds no thread pool there: weights are read by the main one.
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def hardware_with_bf16() -> Iterator[None]:
    """bf16 runs compute in bfloat16 here, emulated where the processor lacks it: slow, but the same types."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "has_bf16", lambda device: True)
        yield
