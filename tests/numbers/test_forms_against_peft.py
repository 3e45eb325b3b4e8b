"""The forms that PEFT has too give its logits for its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.attach import attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS
from luthier.delta.artefact import Piece
from tests.tiny import tiny, tiny_ids

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # peft asks by the older name
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
]
MASK = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


def ours(family: str, form: str, settings: dict[str, Any], fill: Callable[[Piece], None]) -> torch.Tensor:
    """Logits of our form with numbers put in by `fill`."""
    model, made = tiny(family), FORMS.make(form, settings)
    handle = attached(model)
    piece = handle.build("p", made, sites_for(Roles(model), made))
    fill(piece)
    handle.add(piece)
    with torch.no_grad():
        return model(input_ids=tiny_ids(), attention_mask=MASK).logits


def theirs(family: str, config: Any, stir: Callable[[Any], None]) -> tuple[Any, torch.Tensor]:
    """PEFT's model with its numbers stirred, and its logits."""
    model = peft.get_peft_model(tiny(family), config).eval()
    torch.manual_seed(1)
    stir(model)
    with torch.no_grad():
        return model, model(input_ids=tiny_ids(), attention_mask=MASK).logits


def check(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Equal where there is a token."""
    assert torch.allclose(mine[MASK.bool()], other[MASK.bool()], atol=1e-5)


def normal(model: Any) -> None:
    model.prompt_encoder["default"].embedding.weight.data.normal_(0, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma"])
def test_prefix(family: str) -> None:
    """PEFT's past key values are ours, with positions shifted by the prefix as there; unshifted they differ."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, wanted = theirs(family, config, normal)
    table = model.prompt_encoder["default"].embedding.weight.data

    def fill(piece: Piece) -> None:
        for k, (key, site) in enumerate(piece.sites.items()):
            layers = table.view(5, -1, site.kv_heads * site.head_dim)
            piece.p[key] = {"keys": layers[:, 2 * k].clone(), "values": layers[:, 2 * k + 1].clone()}

    check(ours(family, "prefix", {"length": 5}, fill), wanted)
    unshifted = ours(family, "prefix", {"length": 5, "shift_positions": False}, fill)
    assert float((unshifted - wanted)[MASK.bool()].abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_prompt(family: str) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, wanted = theirs(family, config, normal)
    table = model.prompt_encoder["default"].embedding.weight.data
    check(
        ours(family, "prompt", {"length": 5}, lambda piece: piece.p.update({"": {"embeddings": table.clone()}})),
        wanted[:, 5:],
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora(family: str, dora: bool) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=dora,
        target_modules="all-linear",
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )

    def stir(model: Any) -> None:
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.data *= 1 + 0.3 * torch.rand_like(value)

    model, wanted = theirs(family, config, stir)
    table = {n: v.data for n, v in model.named_parameters()}

    def fill(piece: Piece) -> None:
        for key in piece.sites:
            at = f"base_model.model.{key}"
            piece.p[key] = {
                "A": table[f"{at}.lora_A.default.weight"],
                "B": table[f"{at}.lora_B.default.weight"],
                **({"m": table[f"{at}.lora_magnitude_vector.default.weight"]} if dora else {}),
            }

    check(ours(family, "dora" if dora else "lora", {"rank": 4, "alpha": 8.0}, fill), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_ia3(family: str) -> None:
    fused = family == "gpt2"
    down = {"llama": "down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}[family]
    targets = ["c_attn", down] if fused else ["k_proj", "v_proj", down]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[down], fan_in_fan_out=fused)

    def stir(model: Any) -> None:
        for name, value in model.named_parameters():
            if "ia3_l" in name:
                value.data += torch.randn_like(value)

    model, wanted = theirs(family, config, stir)
    table = {n: v.data for n, v in model.named_parameters()}

    def fill(piece: Piece) -> None:
        for key in piece.sites:
            piece.p[key] = {"l": table[f"base_model.model.{key}.ia3_l.default"].flatten()}

    check(ours(family, "ia3", {}, fill), wanted)
