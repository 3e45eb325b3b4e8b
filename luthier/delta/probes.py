"""Probes: a few fixed inputs with the base's and the tuned model's logits, so that any later form of the model can be
asked whether the delta is there, and whether it is this one.

Of every position the 64 largest logits and a seeded 64-dimensional projection of all of them are kept: 128 tokens cost
about 0.1 MB at any vocabulary. All distances are root mean squares in logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from luthier.errors import LuthierError

ModelFn = Callable[[torch.Tensor], torch.Tensor]
"""From token ids [B, T] to logits [B, T, V] (or [B, V] for a classifier)."""

TOTAL_TOKENS = 128
KEPT = 64
_RANDOM_ROWS, _RANDOM_LENGTH = 3, 16
_PROMPT_LENGTH = 20
_NOISE = 1e-4  # logits: far above float32 rounding, far below what a delta worth the name does
_VERSION = 1


@dataclass(frozen=True)
class ProbeVerdict:
    """What the probes say. Distances are to the stored logits; `gap` is the stored distance from base to tuned."""

    nearer: Literal["tuned", "base", "neither"]
    distance_tuned: float
    distance_base: float
    gap: float
    ok: bool | None
    """None where the probes cannot tell."""
    reason: str


def probe_inputs(tokenizer: Any, extra_prompts: Sequence[str | Sequence[int]] = (), seed: int = 0) -> list[list[int]]:
    """Fixed token sequences, at most 128 tokens together: seeded random ids, then the prompts, cut at the end.

    `tokenizer` is a Hugging Face tokenizer, or the size of the vocabulary when there are only ids. Special tokens are
    never drawn: they can mean an image or a tool to a model. A prompt is text that already went through the template.
    """
    size = tokenizer if isinstance(tokenizer, int) else len(tokenizer)
    special = set() if isinstance(tokenizer, int) else set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(plain), (_RANDOM_ROWS, _RANDOM_LENGTH), generator=g)
    rows: list[list[int]] = plain[drawn].tolist()
    left = TOTAL_TOKENS - sum(map(len, rows))
    for prompt in extra_prompts:
        if isinstance(prompt, str):
            if isinstance(tokenizer, int):
                raise LuthierError("a probe prompt is text but there is no tokenizer: pass token ids instead")
            prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [int(i) for i in prompt][-min(_PROMPT_LENGTH, left) :] if left else []
        if ids:
            rows.append(ids)
            left -= len(ids)
    return rows


def record_probes(
    base_fn: ModelFn,
    tuned_fn: ModelFn,
    tokenizer: Any,
    extra_prompts: Sequence[str | Sequence[int]] = (),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Named tensors for `probes.safetensors`: the inputs and both models' kept logits, all on the CPU."""
    rows = probe_inputs(tokenizer, extra_prompts, seed)
    base, tuned = _run(base_fn, rows), _run(tuned_fn, rows)
    if base.shape != tuned.shape:
        raise LuthierError(
            f"base and tuned model give logits of shape {tuple(base.shape)} and {tuple(tuned.shape)}: "
            "record probes after the vocabulary or head of both is the same"
        )
    return {
        "tokens": torch.tensor([i for row in rows for i in row], dtype=torch.int32),
        "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
        "meta": torch.tensor([_VERSION, seed, base.shape[-1]], dtype=torch.int64),
        **{f"base.{k}": v for k, v in _kept(base, seed).items()},
        **{f"tuned.{k}": v for k, v in _kept(tuned, seed).items()},
    }


def check_probes(
    stored: dict[str, torch.Tensor],
    model_fn: ModelFn,
    *,
    tolerance: float | None = None,
    base_fn: ModelFn | None = None,
) -> ProbeVerdict:
    """Whether a model is the stored tuned one. It is nearer to one of the two within half the gap between them, and `ok`
    when tuned and within `tolerance` logits: by default a quarter of the gap, which leaves room for another precision
    but not for a wrong scale; state a small one after a save and load in the same precision.

    base_fn: the base as it is held now, where that is another type than the probes were taken in: how far it is from
    the stored base is the types' own difference and is allowed on top. Where that exceeds a quarter of the gap the
    probes cannot tell, and `ok` is None.
    """
    version, seed, vocabulary = _meta(stored)
    rows = [row.tolist() for row in stored["tokens"].split(stored["lengths"].tolist())]
    gap = _distance_kept(stored, vocabulary)
    logits = _run(model_fn, rows)
    if logits.shape[-1] < vocabulary:
        reason = f"the model has {logits.shape[-1]} logits, the probes were taken with {vocabulary}"
        return ProbeVerdict("neither", math.inf, math.inf, gap, False, reason)
    logits = logits[:, :vocabulary]  # rows added behind the vocabulary do not change what was there
    if not torch.isfinite(logits).all():
        return ProbeVerdict("neither", math.inf, math.inf, gap, False, "the model gives logits that are not finite")
    projected = _projected(logits, seed)
    tuned = _distance(stored, "tuned", logits, projected)
    base = _distance(stored, "base", logits, projected)
    types = 0.0
    if base_fn is not None:
        plain = _run(base_fn, rows)[:, :vocabulary]
        types = _distance(stored, "base", plain, _projected(plain, seed))
    return _verdict(tuned, base, gap, tolerance, types)


def _verdict(tuned: float, base: float, gap: float, tolerance: float | None, types: float = 0.0) -> ProbeVerdict:
    if types > 0.25 * gap + _NOISE:
        reason = (
            f"not decided: the delta moves them by {gap:.3g}, the base's other type by {types:.3g}; the seals decide"
        )
        return ProbeVerdict("neither", tuned, base, gap, None, reason)
    near = 0.5 * gap + types + _NOISE
    allowed = 0.25 * gap + types + _NOISE if tolerance is None else tolerance
    told = f"{tuned:.3g} from tuned, {base:.3g} from base, {gap:.3g} between them"
    if tuned <= min(near, base):
        if tuned > allowed:
            return ProbeVerdict("tuned", tuned, base, gap, False, f"the delta is there but altered: {told}")
        silent = "the delta does not change the probes, and the model is as stored"
        return ProbeVerdict(
            "tuned", tuned, base, gap, True, f"{'the delta is there' if gap > _NOISE else silent}: {told}"
        )
    if base <= near:
        return ProbeVerdict("base", tuned, base, gap, False, f"the delta is not there, this is the base: {told}")
    return ProbeVerdict("neither", tuned, base, gap, False, f"neither the base nor the tuned model: {told}")


def _meta(stored: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    wanted = ["tokens", "lengths", "meta"] + [
        f"{m}.{k}" for m in ("base", "tuned") for k in ("top", "ids", "projected")
    ]
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise LuthierError(f"the probes lack {', '.join(missing)}: the file is not a delta's probes or was cut")
    version, seed, vocabulary = (int(v) for v in stored["meta"])
    if version != _VERSION:
        raise LuthierError(f"the probes are of version {version}, this luthier reads {_VERSION}: update luthier")
    return version, seed, vocabulary


def _run(model_fn: ModelFn, rows: list[list[int]]) -> torch.Tensor:
    """Logits of all positions of all rows, [N, V], float32 on the CPU; one row at a time, so nothing is padded."""
    out = []
    with torch.no_grad():
        for row in rows:
            logits = model_fn(torch.tensor([row]))
            out.append(logits.reshape(-1, logits.shape[-1]).float().cpu())
    return torch.cat(out)


def _kept(logits: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    top, ids = logits.topk(min(KEPT, logits.shape[-1]))
    return {"top": top, "ids": ids.int(), "projected": _projected(logits, seed)}


def _projected(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """[N, V] -> [N, 64] onto random signs, scaled so that its mean square estimates the mean square logit."""
    vocabulary = logits.shape[-1]
    return logits @ _signs(vocabulary, KEPT, seed) / math.sqrt(vocabulary)


def _signs(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random signs, one hashed 64-bit word a row (splitmix64): the same on every machine and in every version."""
    start = (seed * 1442695040888963407 + (1 << 63)) % (1 << 64) - (1 << 63)  # as a signed 64-bit number
    z = torch.arange(1, rows + 1, dtype=torch.int64) * -7046029254386353131 + start
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    return (((z[:, None] >> torch.arange(columns)) & 1) * 2 - 1).float()


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _distance(stored: dict[str, torch.Tensor], which: str, logits: torch.Tensor, projected: torch.Tensor) -> float:
    top = logits.gather(1, stored[f"{which}.ids"].long()) - stored[f"{which}.top"]
    rest = projected - stored[f"{which}.projected"]
    return math.sqrt(0.5 * (float((top**2).mean()) + float((rest**2).mean())))


def _distance_kept(stored: dict[str, torch.Tensor], vocabulary: int) -> float:
    """Base to tuned from what is kept: on the logits that both kept, and on the projection."""
    both = stored["base.ids"][:, :, None] == stored["tuned.ids"][:, None, :]
    gaps = (stored["base.top"][:, :, None] - stored["tuned.top"][:, None, :])[both]
    rest = stored["base.projected"] - stored["tuned.projected"]
    shared = float((gaps**2).mean()) if gaps.numel() else float((rest**2).mean())
    return math.sqrt(0.5 * (shared + float((rest**2).mean())))
