"""Evidence of PLeaS (P111): permuted copies, least squares against averaging, units kept apart; layers and whole models."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.bases.roles import Roles
from luthier.cli import main
from luthier.errors import LuthierError
from luthier.merging.pleas import PLeaS
from luthier.parts.assignment import assign
from luthier.parts.units import averaged, shared
from luthier.verbs.merge import merge
from tests.tiny import tiny, tiny_ids, tiny_tokenizer

Layers = tuple[Tensor, Tensor]
N, HIDDEN, OUT = 6, 10, 4
TEXT = {"calibration": [{"path": "practice:facts", "limit": 40}], "tokens": 2048, "length": 64}


def network(seed: int) -> Layers:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN, N, generator=g), torch.randn(OUT, HIDDEN, generator=g)


def features(w: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.relu(x @ w[0].T)
    return hidden, hidden @ w[1].T


X = torch.randn(400, N, generator=torch.Generator().manual_seed(9))


def test_assignment_is_the_best_of_all() -> None:
    for seed in range(20):
        s = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
        best = max(permutations(range(5)), key=lambda p: sum(float(s[i, j]) for i, j in enumerate(p)))
        assert assign(s).tolist() == list(best)
    big = torch.randn(150, 150, generator=torch.Generator().manual_seed(3))
    assert sorted(assign(big).tolist()) == list(range(150))
    with pytest.raises(ValueError, match="square"):
        assign(torch.zeros(2, 3))


def test_layers_by_hand() -> None:
    """A permuted copy; least squares against averaging; more units, less error; all apart is both networks."""
    a, order = network(0), torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
    copy = (a[0][order], a[1][:, order])
    blocks = PLeaS().match(features(a, X)[0].T @ features(copy, X)[0])
    first, second = averaged(a[0], copy[0], blocks, shared(N)), averaged(a[1], copy[1], shared(OUT), blocks)
    assert torch.equal(first, a[0]) and torch.equal(second, a[1]), "a permuted copy merges to the network itself"

    b = network(2)
    (ha, ya), (hb, yb) = features(a, X), features(b, X)
    for keep in (1.0, 0.5):
        method = PLeaS(keep, ridge=1e-6)
        blocks = method.match(ha.T @ hb)
        assert blocks.width == HIDDEN + round((1 - keep) * HIDDEN)
        first = averaged(a[0], b[0], blocks, shared(N))
        z, y = torch.relu(X @ first.T), (ya + yb) / 2  # features the merged network really has
        start = averaged(a[1], b[1], shared(OUT), blocks)
        solved = method.solve((z.T @ z).double(), (y.T @ z).double(), start, shared(OUT), blocks)
        lost = [float((z @ w.T - y).square().mean()) for w in (start, solved)]
        assert lost[1] < 0.9 * lost[0], "least squares have less feature error than averaging"
    apart = PLeaS(0.0)
    blocks, out = apart.match(ha.T @ hb), apart.match(ya.T @ yb)
    assert blocks.width == 2 * HIDDEN and out.width == 2 * OUT
    whole = (averaged(a[0], b[0], blocks, shared(N)), averaged(a[1], b[1], out, blocks))
    both = features(whole, X)[1]
    assert torch.allclose(both[:, :OUT], ya[:, out.alone_a], atol=1e-5), "all apart: both models"
    assert torch.allclose(both[:, OUT:], yb[:, out.alone_b], atol=1e-5)
    z = out.joined(ya, yb)
    free = PLeaS(0.0, ridge=1e-3).solve((z.T @ z).double(), (z.T @ z).double(), torch.zeros(2 * OUT, 2 * OUT), out, out)
    assert not free[:OUT, OUT:].any() and not free[OUT:, :OUT].any() and free[:OUT, :OUT].any(), "lone units never meet"
    with pytest.raises(LuthierError, match="equal widths"):
        PLeaS().match(torch.zeros(4, 3))


# -- whole models


def moved(model: Any, seed: int) -> Any:
    """The same function with its units in another order: residual stream, heads, values inside heads, feed-forward units."""
    g = torch.Generator().manual_seed(seed)
    c, state, width = model.config, model.state_dict(), Roles(model).head_dim
    d, groups = c.hidden_size, c.num_key_value_heads
    each = c.num_attention_heads // groups
    stream = torch.randperm(d, generator=g)
    place, inside = torch.arange(width), torch.randperm(width, generator=g)
    for name, value in state.items():
        stem = name.rpartition(".")[0].rpartition(".")[2]
        if name.endswith(("norm.weight", "layernorm.weight")) and len(value) == d:
            value.copy_(value[stream].clone())
        if (
            stem in ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
            and value.dim() == 2
        ):
            value.copy_(value[:, stream].clone())
        if stem in ("o_proj", "down_proj"):
            value.copy_(value[stream].clone())
    for layer in model.model.layers:
        at, ffn = layer.self_attn, layer.mlp
        group_of = torch.randperm(groups, generator=g).tolist()
        heads = [j * each + int(k) for j in group_of for k in torch.randperm(each, generator=g)]
        rows = {
            at.q_proj: torch.cat([h * width + place for h in heads]),
            at.k_proj: torch.cat([j * width + place for j in group_of]),
            at.v_proj: torch.cat([j * width + inside for j in group_of]),
        }
        inner = torch.randperm(c.intermediate_size, generator=g)
        rows |= {ffn.gate_proj: inner, ffn.up_proj: inner}
        columns = {at.o_proj: torch.cat([h * width + inside for h in heads]), ffn.down_proj: inner}
        with torch.no_grad():
            for module, order in rows.items():
                for p in module.parameters():
                    p.copy_(p[order].clone())
            for module, order in columns.items():
                module.weight.copy_(module.weight[:, order].clone())
    return model


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tiny_ids(4, 16)).logits


def other(model: Any, seed: int, by: float = 0.05) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_p111_pleas(family: str, tmp_path: Path) -> None:
    """Merging a model with its own permuted copy recovers it; the least-squares step lowers the feature error; with no
    unit merged the feed-forward layers are both models'."""
    model, copy = other(tiny(family), 5), moved(other(tiny(family), 5), 1)
    assert torch.allclose(logits(copy), logits(model), atol=1e-4), "the copy is the same function"
    names = [
        saved(model, tmp_path / "a"),
        saved(copy, tmp_path / "copy"),
        saved(moved(other(tiny(family), 6), 2), tmp_path / "b"),
    ]
    made = merge({"method": "pleas", "models": names[:2], **TEXT}, out=tmp_path / "same")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "same").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-3) and made.kind == "checkpoint"
    for name, value in load_file(tmp_path / "same" / "model.safetensors").items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-4), name

    for keep in (1.0, 0.5, 0.0):
        made = merge(
            {"method": "pleas", "models": [names[0], names[2]], "keep": keep, **TEXT}, out=tmp_path / f"m{keep}"
        )
        after, before = (
            float(w.split()[0]) for w in (made.notes[0].split("error ")[1], made.notes[0].split("square, ")[1])
        )
        wide = AutoModelForCausalLM.from_pretrained(tmp_path / f"m{keep}")
        assert wide.config.intermediate_size == round((2 - keep) * model.config.intermediate_size)
        assert made.numbers == sum(p.numel() for p in wide.parameters())
        assert after < 0.9 * before, "least squares have less feature error than averaging"

    near = other(other(tiny(family), 5), 7, 0.002)
    plan = {"method": "pleas", "models": [names[0], saved(near, tmp_path / "near")], "keep": 0.0, "ridge": 1e9, **TEXT}
    merge(plan, out=tmp_path / "apart")
    apart = AutoModelForCausalLM.from_pretrained(tmp_path / "apart").eval()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for mine, theirs, merged in zip(model.model.layers, near.model.layers, apart.model.layers, strict=True):
        assert torch.allclose(merged.mlp(x), (mine.mlp(x) + theirs.mlp(x)) / 2, atol=1e-5), "none merged: both models"


def test_pleas_takes_deltas_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = saved(tiny(), tmp_path / "a"), saved(moved(tiny(), 1), tmp_path / "b")
    plan = {"method": "pleas", "models": [a, b]}
    for wrong, said in (
        (plan, "state calibration"),
        ({**plan, **TEXT, "keep": 2}, "keep must lie"),
        ({**plan, **TEXT, "kep": 1}, "keep"),
        ({**plan, **TEXT, "models": [a, b, a]}, "two different ones"),
        ({**plan, **TEXT, "models": [a, {"model": b, "keep": 0.5}]}, "without settings of their own"),
        ({**plan, **TEXT, "models": [a, saved(tiny(hidden_size=64), tmp_path / "wide")]}, "not of one shape"),
        ({**plan, **TEXT, "output": "delta"}, "leave output"),
        (
            {**plan, **TEXT, "models": [saved(tiny("gpt2"), tmp_path / "g"), saved(tiny("gpt2"), tmp_path / "h")]},
            "gpt2",
        ),
    ):
        with pytest.raises(LuthierError, match=said):
            merge(wrong, out=tmp_path / "no")
        assert not (tmp_path / "no").exists()
    words = [a, b, "-m", "pleas", "calibration=practice:facts", "tokens=512", "keep=0.5", "-o", str(tmp_path / "m")]
    with pytest.raises(SystemExit) as left:
        main(["merge", *words])
    assert left.value.code == 0 and "by pleas" in capsys.readouterr().out
    assert (tmp_path / "m" / "merge.yaml").read_text().count("calibration")
    assert merge(tmp_path / "m" / "merge.yaml", out=tmp_path / "again").numbers
