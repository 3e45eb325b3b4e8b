"""What every form promises, as checks of one case (form, settings, family, sites). Used on the registry and on the docs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.attach import Attached, attached
from luthier.attach.sites import sites_for
from luthier.bases.roles import Roles
from luthier.delta import FORMS, Form, No, Site
from luthier.delta.artefact import Delta
from luthier.errors import LuthierError
from tests.tiny import tiny, tiny_ids

CAUSAL = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "qwen2_moe",
)


RECOMPUTE = next(
    n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(PreTrainedModel, n)
)


@dataclass(frozen=True)
class Case:
    """One form on one family."""

    form: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    sites: Sequence[str] | None = None

    def __str__(self) -> str:
        stated = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return "-".join(part for part in (self.form, self.family, stated, ",".join(self.sites or ())) if part)

    @cached_property
    def made(self) -> Form:
        return FORMS.make(self.form, self.settings)

    def model(self) -> nn.Module:
        return tiny(self.family)

    def where(self, model: nn.Module) -> list[Site]:
        return sites_for(Roles(model), self.made, self.sites)

    def on(self, model: nn.Module, *, move: bool = True, name: str = "piece", train: bool = True) -> Attached:
        """The form on a model; with `move` its numbers are pushed off their start, as training would."""
        handle = attached(model)
        piece = handle.build(name, self.made, self.where(model), seed=1)
        handle.add(piece, train=train)
        if move:
            shove(handle, name)
        return handle


def shove(handle: Attached, name: str, by: float | None = None) -> None:
    """Adds seeded noise to every trained number of a piece; as much as the form needs, unless stated."""
    by = handle.pieces[name].form.stride if by is None else by
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for q in handle.placed[name]:
            for value in q.state.p.values():
                value += torch.randn(value.shape, generator=g).to(value) * by


def logits(model: nn.Module, ids: Tensor | None = None, **more: Any) -> Tensor:
    """[B, T, V] (or class scores) of an eval-mode forward pass with gradients as the caller has them."""
    ids = tiny_ids() if ids is None else ids
    if model.config.is_encoder_decoder:  # pyright: ignore
        more["decoder_input_ids"] = ids
    return (
        model(input_ids=ids, use_cache=False, **more).logits if _cached(model) else model(input_ids=ids, **more).logits
    )


def _cached(model: nn.Module) -> bool:
    return model.config.model_type not in ("bert", "roberta")  # pyright: ignore


@torch.no_grad()
def quiet(model: nn.Module, ids: Tensor | None = None, **more: Any) -> Tensor:
    """logits() without gradients."""
    return logits(model, ids, **more)


def values(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters, copied."""
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, names too."""
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def steps(model: nn.Module, handle: Attached, count: int = 3, lr: float = 1e-2) -> None:
    """AdamW steps on a simple loss over whatever trains."""
    rows = [v for table in handle.trained().values() for _, v in table]
    optimiser = torch.optim.AdamW(rows, lr=lr)
    for k in range(count):
        optimiser.zero_grad()
        (logits(model, tiny_ids(seed=k)).float().square().mean() + handle.penalty()).backward()
        optimiser.step()
        handle.after_step()


# -- the checks


def identity(case: Case) -> None:
    model = case.model()
    base = quiet(model)
    case.on(model, move=False)
    gap = float((quiet(model) - base).abs().max())
    if isinstance(case.made.identity, No):
        assert gap > 0 and case.made.identity.reason
    else:
        assert gap == 0


def moves(case: Case) -> None:
    """A form that does nothing would pass all else."""
    model = case.model()
    base = quiet(model)
    case.on(model)
    assert float((quiet(model) - base).abs().max()) > 1e-6 * float(base.abs().max())


def base_unchanged(case: Case) -> None:
    model = case.model()
    before = values(model)
    handle = case.on(model, move=False)
    start = {n: v.detach().clone() for n, v in handle.trained()["piece"]}
    steps(model, handle)
    assert same(before, values(model))
    assert any(not torch.equal(start[n], v) for n, v in handle.trained()["piece"])


def folds(case: Case) -> None:
    model = case.model()
    handle = case.on(model, train=False)
    unfolded, before = quiet(model), values(model)
    if isinstance(case.made.dense, No) or _needs_bias(case, handle):
        reason = case.made.dense.reason if isinstance(case.made.dense, No) else "needs a bias"
        try:
            handle.fold()
        except LuthierError as e:
            assert reason in str(e)
        else:
            raise AssertionError("folded what cannot be")
        assert same(before, values(model)) and torch.equal(quiet(model), unfolded)
        return
    report = handle.fold()
    assert report.written and not same(before, values(model))
    assert torch.allclose(quiet(model), unfolded, atol=2e-5, rtol=1e-4)
    handle.unfold()
    assert same(before, values(model)) and torch.equal(quiet(model), unfolded)


def _needs_bias(case: Case, handle: Attached) -> bool:
    for q in handle.placed["piece"]:
        if "bias" in (q.form.delta(q.state) or {}) and q.state.bias is None:
            return True
    return False


def saves(case: Case) -> None:
    model = case.model()
    handle = case.on(model)
    tuned = quiet(model)
    with tempfile.TemporaryDirectory() as folder:
        handle.delta().save(Path(folder) / "delta")
        loaded = Delta.load(Path(folder) / "delta")
    assert loaded.pieces[0].form == case.made
    other = case.model()
    loaded.apply(other)
    assert torch.equal(quiet(other), tuned)


def counts(case: Case) -> None:
    model = case.model()
    handle = case.on(model)
    floats = sum(v.numel() for _, v in handle.trained()["piece"])
    assert handle.pieces["piece"].count() == floats
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == floats


def gradients(case: Case) -> None:
    model = case.model()
    handle = case.on(model)
    mine = {id(v) for _, v in handle.trained()["piece"]}
    logits(model).square().mean().backward()
    assert all((v.grad is not None) == (id(v) in mine) for v in model.parameters())
    for name in {n.rpartition("/")[2] for n, _ in handle.trained()["piece"]}:
        every = [v.grad for n, v in handle.trained()["piece"] if n.endswith("/" + name)]
        assert any(g is not None and bool(g.abs().max() > 0) for g in every), name


def bf16(case: Case) -> None:
    model = case.model().to(torch.bfloat16)
    before = values(model)
    handle = case.on(model)
    steps(model, handle, 2)
    out = quiet(model)
    assert out.isfinite().all() and out.dtype == torch.bfloat16 and same(before, values(model))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for _, v in handle.trained()["piece"])


def composes(case: Case) -> None:
    """With a LoRA on the queries: both act, each comes off alone, and both fold together where both can."""
    lora = Case("lora", case.family, {"rank": 2}, ["attn.q"])
    model, alone = case.model(), case.model()
    case.on(alone)
    handle = case.on(model)
    lora.on(model, name="other")
    both, one = quiet(model), quiet(alone)
    assert not torch.equal(both, one)
    if not isinstance(case.made.dense, No) and not _needs_bias(case, handle):
        handle.fold()
        assert torch.allclose(quiet(model), both, atol=2e-5, rtol=1e-4)
        handle.unfold()
    handle.detach("other")
    assert torch.equal(quiet(model), one)


def off(case: Case) -> None:
    model = case.model()
    base = quiet(model)
    handle = case.on(model)
    tuned = quiet(model)
    with handle.off():
        assert torch.equal(quiet(model), base)
    assert torch.equal(quiet(model), tuned) and not torch.equal(tuned, base)


def detaches(case: Case) -> None:
    model = case.model()
    next(model.parameters()).requires_grad_(False)  # a flag of one's own comes back too

    def look() -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        flags = [(n, v.requires_grad) for n, v in model.named_parameters()]
        held = [sorted(k for k in m.__dict__ if "luthier" in k and m.__dict__[k]) for m in model.modules()]
        return hooks, flags, held, model.config._attn_implementation  # pyright: ignore

    before, numbers, base = look(), values(model), quiet(model)
    handle = case.on(model)
    quiet(model)
    handle.detach()
    assert look() == before and same(numbers, values(model)) and torch.equal(quiet(model), base)


def checkpointing(case: Case) -> None:
    found = []
    for again in (False, True):
        model = case.model()
        handle = case.on(model)
        if again:
            getattr(model, RECOMPUTE)()
        model.train()
        torch.manual_seed(3)
        logits(model).square().mean().backward()
        found.append([v.grad for _, v in handle.trained()["piece"]])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-7, rtol=1e-4)


def scales(case: Case) -> None:
    """0 · d is the base, 1 · d is d, ½ · d folds to what it computes; or the refusal gives its reason."""
    model = case.model()
    base = quiet(model)
    d = case.on(model).delta()
    tuned = quiet(model)
    if isinstance(case.made.scales, No):
        try:
            0.5 * d
        except LuthierError as e:
            assert case.made.scales.reason in str(e)
            return
        raise AssertionError("scaled what cannot be")
    for factor, wanted in ((0.0, base), (1.0, tuned)):
        other = case.model()
        (factor * d).apply(other)
        assert torch.allclose(quiet(other), wanted, atol=1e-6)
    half = case.model()
    handle = (0.5 * d).apply(half)
    unfolded = quiet(half)
    assert 0 < float((unfolded - base).abs().max()) < 10 * float((tuned - base).abs().max())
    if not isinstance(case.made.dense, No) and not _needs_bias(case, handle):
        handle.fold()
        assert torch.allclose(quiet(half), unfolded, atol=2e-5, rtol=1e-4)


def padded(case: Case) -> None:
    """A row padded at the left or right gives the logits it gives alone."""
    if case.family not in CAUSAL or case.family == "bloom":
        return
    model = case.model()
    case.on(model)
    ids = tiny_ids(1, 7)
    alone = quiet(model, ids)
    for left in (True, False):
        pad = torch.zeros(1, 4, dtype=torch.long)
        row = torch.cat([pad, ids] if left else [ids, pad], 1)
        mask = (row > 0).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = quiet(model, row, attention_mask=mask, position_ids=places)
        assert torch.allclose(out[:, 4:] if left else out[:, :7], alone, atol=2e-5)


def packed(case: Case) -> None:
    """Two records in one row, kept apart by a 4-D mask, give the logits they give alone; or packing is refused."""
    if case.family not in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "phi"):
        return
    model = case.model()
    case.on(model)
    a, b = tiny_ids(1, 5, 1), tiny_ids(1, 6, 2)
    places = torch.cat([torch.arange(5), torch.arange(6)])[None]
    record = torch.tensor([1] * 5 + [2] * 6)
    mask = (record[:, None] == record[None]) & torch.ones(11, 11, dtype=torch.bool).tril()
    both = torch.cat([a, b], 1)
    more = [torch.zeros(1, 1, 11, 11).masked_fill(~mask, torch.finfo(torch.float32).min), mask[None, None], None]
    for form_of_mask in more:
        given = {"attention_mask": form_of_mask, "position_ids": places}
        if getattr(case.made, "packs", True):
            out = quiet(model, both, **given)
            assert torch.allclose(out, torch.cat([quiet(model, a), quiet(model, b)], 1), atol=2e-5)
            continue
        try:
            quiet(model, both, **given)
        except LuthierError as e:
            assert "packing" in str(e)
        else:
            raise AssertionError("packed rows went through")


def generates(case: Case) -> None:
    """Greedy decoding with a cache, from a padded batch, picks the tokens that full forward passes pick."""
    if case.family not in CAUSAL:
        return
    model = case.model()
    case.on(model, train=False)
    ids = tiny_ids(2, 6)
    mask = torch.ones_like(ids)
    if case.family != "bloom":
        ids[0, :2], mask[0, :2] = 0, 0
    with torch.no_grad():
        out = model.generate(  # pyright: ignore
            input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    for k in range(2):
        row = out[k][mask[k, 0] * 0 + int((mask[k] == 0).sum()) :][None]
        start = row.shape[1] - 5
        full = quiet(model, row)[0, start - 1 : -1].clone()
        full[:, 2] = -torch.inf  # min_new_tokens forbids the end
        picked = full.gather(1, row[0, start:, None])[:, 0]
        assert torch.allclose(picked, full.max(1).values, atol=1e-4)


CHECKS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        identity, moves, base_unchanged, folds, saves, counts, gradients, bf16, composes, off, detaches, checkpointing,
        scales, padded, packed, generates,
    )
}  # fmt: skip


def default_cases(name: str) -> list[Case]:
    """The families every form is tried on."""
    return [Case(name, family) for family in ("llama", "gpt2", "gpt_neox", "bert", "t5")]
