"""How far a delta moved the model on text it was not trained on: KL(base || tuned) per token of the base's own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from luthier.errors import LuthierError
from luthier.measuring import stats
from luthier.measuring.forward import Predicted, batches, measured, predict, vocabulary_of
from luthier.measuring.items import Item, Switch

_ANSWER = 32  # tokens the base writes after each start


@dataclass(frozen=True)
class Drift:
    """KL in nats per token and the share of tokens whose most likely successor is the same, with 95 % intervals over
    texts (tokens of one text are not independent)."""

    kl: stats.Interval
    agreement: stats.Interval
    tokens: int
    sequences: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def own_text(
    model: Any,
    tokenizer: Any,
    switch: Switch,
    starts: Sequence[Sequence[int]],
    tokens: int,
    *,
    kind: str = "causal",
    seed: int = 0,
    batch_size: int = 32,
) -> list[Item]:
    """Text sampled from the base at temperature 1, after each start in turn, until there are this many tokens. Only what
    the base wrote itself counts. Starts are used again when they are too few; each time the draw is another."""
    from luthier.sampling.generate import Sampling, generate

    if not starts:
        raise LuthierError("drift needs a text to start from: name a guard, or a tokenizer with a BOS or EOS token")
    out: list[Item] = []
    found, rounds = 0, 0
    with switch.off(), measured(model):
        while found < tokens:
            need = -(-(tokens - found) // _ANSWER)
            chunk = [list(start) for start in (list(starts) * (1 + need // len(starts)))[: max(need, 1)]]
            drawn = Sampling(temperature=1.0, seed=seed + rounds)
            written = generate(model, tokenizer, chunk, _ANSWER, batch_size, sampling=drawn, keep_stop=True)
            before = found
            for start, text in zip(chunk, written, strict=True):
                text = list(text)[: tokens - found]
                if text:
                    out.append(_item(len(out), start, text, kind))
                    found += len(text)
            rounds += 1
            if found == before:
                break  # no room behind these starts
    return out


def _item(number: int, start: list[int], text: list[int], kind: str) -> Item:
    if kind == "seq2seq":
        return Item(str(number), "", source=tuple(start), ids=tuple(text), weights=(1.0,) * len(text))
    ids = tuple(start) + tuple(text)
    return Item(str(number), "", ids=ids, weights=(0.0,) * len(start) + (1.0,) * len(text))


def drift(
    model: Any,
    switch: Switch,
    items: Sequence[Item],
    *,
    kind: str = "causal",
    source: str = "the base's own text",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> Drift | None:
    """Base against tuned on the counted tokens of these items (for a classifier: on its classes); None without any."""

    def base(group: list[Item]) -> list[Predicted]:
        with switch.off():
            return predict(model, kind, group)

    with measured(model):
        return between(
            base, lambda group: predict(model, kind, group), items, vocabulary_of(model),
            source=source, batch_size=batch_size, resamples=resamples, seed=seed,
        )  # fmt: skip


def between(
    old: Callable[[list[Item]], list[Predicted]],
    new: Callable[[list[Item]], list[Predicted]],
    items: Sequence[Item],
    vocabulary: int,
    *,
    source: str,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> Drift | None:
    """Any two models of one vocabulary, KL(old || new), on the counted tokens of these items; None without any."""
    found: list[tuple[float, float, int]] = []
    for at in batches(items, max(1, batch_size // 2), vocabulary):
        group = [items[n] for n in at]
        after, before = new(group), old(group)
        found += [_apart(b, a) for b, a in zip(before, after, strict=True) if len(b.targets)]
    if not found:
        return None
    kl, same, count = (list(column) for column in zip(*found, strict=True))
    options: dict[str, Any] = {"weights": count, "resamples": resamples, "seed": seed}
    return Drift(
        stats.bootstrap(kl, **options),
        stats.bootstrap(same, bounds=(0.0, 1.0), **options),
        int(sum(count)),
        len(count),
        source,
    )


def _apart(base: Predicted, tuned: Predicted) -> tuple[float, float, int]:
    """Mean KL(base || tuned), share of equal first choices, and number of tokens of one text."""
    p, q = base.logits.log_softmax(-1), tuned.logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)
    same = base.logits.argmax(-1) == tuned.logits.argmax(-1)
    return float(kl.mean()), float(same.float().mean()), len(kl)


def starts(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the base writes on from: these prompts, or without any its BOS (else EOS) token."""
    if prompts:
        return [list(p) for p in prompts]
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return [[int(token)]]
    return []
