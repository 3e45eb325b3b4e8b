"""train.compile: the layers are compiled once, whatever the batch's shape, and the numbers are the eager run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs.support import World, run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_run_is_the_eager_one(world: World, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    lora = {"form": "lora", "rank": 2, "sites": ["attn.q", "ffn.down"]}
    settings = {"steps": 6, "rehearse": False, "batch_size": 3}
    none = {"every": 0}  # the certificate of a checkpoint is a pass without gradients: a graph of its own
    base = str(world.base("llama", num_hidden_layers=1))
    eager = run(world.plan(lora, base=base, train=settings, checkpoint=none), tmp_path / "eager")
    assert not counters["stats"], "the eager run compiled something"
    compiled = run(
        world.plan(lora, base=base, train={**settings, "compile": True}, checkpoint=none), tmp_path / "compiled"
    )
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-4)
    for name, tensor in eager.delta.items():
        assert torch.allclose(compiled.delta[name], tensor, rtol=1e-3, atol=1e-5), name
