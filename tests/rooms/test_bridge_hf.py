"""Exported checkpoints: plain transformers gives the tuned logits, and nothing half-written or rounded away appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bridge.hf import export_hf
from luthier.bridge.merged import verify_merged
from luthier.bridge.proof import Report, prove
from luthier.bridge.target import Target, logits_of, target
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from tests.tiny import tiny, tiny_ids, tiny_tokenizer


def on(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Target:
    return target(tiny(family, **settings).to(dtype), tiny_tokenizer())


def made(base: Target, form: str, sites: Any = None, size: float = 0.05, **settings: Any) -> Delta:
    kind = FORMS.make(form, settings)
    piece = attached(base.model).build(form, kind, sites_for(base.roles, kind, sites))
    attached(base.model).detach()
    g = torch.Generator().manual_seed(3)
    for numbers in piece.p.values():
        for name, value in numbers.items():
            numbers[name] = value + size * torch.randn(value.shape, generator=g)
    return prove(Delta([piece]), base)


def values(base: Target) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in base.model.named_parameters(remove_duplicate=False)}


def tuned(base: Target, delta: Delta) -> torch.Tensor:
    delta.apply(base.model)
    out = logits_of(base.model)(tiny_ids())
    delta.detach(base.model)
    return out


CASES = [
    ("llama", "lora", None),
    ("llama", "dora", None),
    ("llama", "ia3", None),
    ("llama", "sparse", None),
    ("gpt2", "lora", None),
    ("qwen2", "dora", ["attn"]),
    ("qwen3_moe", "lora", ["attn", "expert"]),
]


@pytest.mark.parametrize(("family", "form", "sites"), CASES)
def test_plain_transformers_gives_the_tuned_logits(family: str, form: str, sites: Any, tmp_path: Path) -> None:
    base = on(family)
    delta = made(base, form, sites)
    before, want = values(base), tuned(base, delta)
    checks = export_hf(base, delta, tmp_path / "out", max_shard_size="20KB")
    assert {"read back", "probes", "rounding"} <= {c.name for c in checks if c.ok}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits_of(model)(tiny_ids()) - want).abs().max() < 1e-4
    after = values(base)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "generation_config.json").exists() and (tmp_path / "out" / "README.md").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template


def test_tied_embeddings_come_apart(tmp_path: Path) -> None:
    base = on(tie_word_embeddings=True)
    delta = made(base, "lora", ["embed"], size=0.3)
    want = tuned(base, delta)
    checks = export_hf(base, delta, tmp_path / "out")
    assert any(c.name == "tied" and "tie_word_embeddings: false" in c.detail for c in checks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.tie_word_embeddings is False
    assert (logits_of(model)(tiny_ids()) - want).abs().max() < 1e-4
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight and base.model.config.tie_word_embeddings


def test_biases_that_the_config_can_carry(tmp_path: Path) -> None:
    base = on()
    delta = made(base, "scale-shift", ["attn.q", "attn.v", "ffn.down"])
    want = tuned(base, delta)
    checks = export_hf(base, delta, tmp_path / "out")
    assert any(c.name == "biases" and "attention_bias, mlp_bias" in c.detail for c in checks)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.attention_bias and model.config.mlp_bias
    assert (logits_of(model)(tiny_ids()) - want).abs().max() < 1e-4
    assert base.model.config.attention_bias is False and base.model.model.layers[0].self_attn.q_proj.bias is None


def test_biases_that_it_cannot(tmp_path: Path) -> None:
    base = on("mistral")
    with pytest.raises(LuthierError, match="needs a bias"):
        export_hf(base, made(base, "scale-shift", ["attn.q"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rounded_away(tmp_path: Path) -> None:
    base = on(dtype=torch.bfloat16)
    before = values(base)
    with pytest.raises(LuthierError, match=r"loses .*rounding.*dtype: float32"):
        export_hf(base, made(base, "lora", size=2e-5), tmp_path / "out")
    after = values(base)
    assert not list(tmp_path.iterdir()) and all(torch.equal(before[n], after[n]) for n in before)


def test_no_weight_change(tmp_path: Path) -> None:
    base = on()
    with pytest.raises(LuthierError, match="cannot be folded"):
        export_hf(base, made(base, "prefix"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_stands_there_stays(tmp_path: Path) -> None:
    base = on()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(LuthierError, match="not empty"):
        export_hf(base, made(base, "lora"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_written_wrong_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that loses a layer: the folder never appears."""
    base = on()
    delta = made(base, "lora")
    write = type(base.model).save_pretrained

    def faulty(self: Any, folder: Any, **settings: Any) -> None:
        weight = self.model.layers[1].mlp.up_proj.weight
        kept = weight.detach().clone()
        weight.data.zero_()
        write(self, folder, **settings)
        weight.data.copy_(kept)

    monkeypatch.setattr(type(base.model), "save_pretrained", faulty)
    with pytest.raises(LuthierError, match="read back"):
        export_hf(base, delta, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def slight(family: str, size: float) -> Delta:
    """A delta made on the base in bfloat16, smaller than what lies between the base's types."""
    return made(on(family, torch.bfloat16), "lora", size=size)


def test_a_small_delta_of_a_base_in_another_type(tmp_path: Path) -> None:
    """Its probes cannot tell the types' difference from the change: its seals do."""
    base, delta = on("t5"), slight("t5", 0.002)
    assert not delta.base["fingerprint"].endswith(base.card()["fingerprint"].split(":")[-1])
    checks = {c.name: c for c in export_hf(base, delta, tmp_path / "out")}
    assert checks["probes"].ok is None and "the seals decide" in checks["probes"].detail
    assert checks["seals"].ok and checks["read back"].ok
    report = verify_merged(Report("out", "delta"), base, tmp_path / "out", delta)
    assert report.ok and "the seals decide" in str(report)
    broken = slight("t5", 0.002)
    next(iter(broken.pieces[0].p.values()))["B"].mul_(1.5)
    with pytest.raises(LuthierError, match="seals: 1 of .* sites do not hold"):
        export_hf(on("t5"), broken, tmp_path / "other")


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float32, "keep the delta instead$"), (torch.bfloat16, "export with dtype: float32$")]
)
def test_probes_that_do_not_hold_name_what_can_be_done(dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    base = on(dtype=dtype)
    delta = made(base, "lora", size=0.3)
    delta.probes["tuned.top"] += 9
    delta.probes["tuned.projected"] += 9
    with pytest.raises(LuthierError, match=f"probes: .*{said}"):
        export_hf(base, delta, tmp_path / "out")
