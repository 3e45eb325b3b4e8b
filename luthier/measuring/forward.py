"""Running a model over items: log-probabilities of what is there, classes, and answers. Nothing here judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from luthier.measuring.items import Item, Response

_LOGITS = 1 << 26  # logits held at once (256 MB in float32), whatever the vocabulary


@dataclass(frozen=True)
class Predicted:
    """Logits [N, V] at the counted positions of one item, in float32, with the tokens they predict and their weights."""

    logits: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@contextmanager
def measured(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and the caller's mode and random state given back afterwards."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)


def batches(items: Sequence[Item], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Positions of items of like length, together never more logits than fit in a bounded memory; longest first, so
    that what does not fit fails at once."""
    order = sorted(range(len(items)), key=lambda i: (-_length(items[i]), i))
    while order:
        longest = max(1, _length(items[order[0]]))
        take = max(1, min(batch_size, _LOGITS // (longest * vocabulary)))
        yield order[:take]
        order = order[take:]


def _length(item: Item) -> int:
    return len(item.source) + len(item.ids)


def vocabulary_of(model: Any) -> int:
    """Width of the output."""
    head = model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else int(getattr(model.config, "num_labels", 1))


def predict(model: Any, kind: str, items: Sequence[Item]) -> list[Predicted]:
    """One forward pass over a few items: what it predicts at every counted position."""
    if kind == "classify":
        logits = model(**_padded(model, [i.source for i in items])).logits.float()
        ones = torch.ones(1, device=logits.device)
        return [
            Predicted(row[None], torch.tensor([item.label or 0], device=logits.device), ones)
            for row, item in zip(logits, items, strict=True)
        ]
    if kind == "seq2seq":
        targets = _padded(model, [i.ids for i in items])["input_ids"]
        logits = model(**_padded(model, [i.source for i in items]), labels=targets).logits
        shift = 0
    else:
        logits = model(**_padded(model, [i.ids for i in items]), use_cache=False).logits
        shift = 1
    logits = logits[:, -max(len(i.ids) for i in items) :]  # a soft prompt stands before what was asked
    return [_counted(row, item, shift) for row, item in zip(logits, items, strict=True)]


def _counted(logits: torch.Tensor, item: Item, shift: int) -> Predicted:
    ids = torch.tensor(item.ids, device=logits.device)[shift:]
    weights = torch.tensor(item.weights, dtype=torch.float32, device=logits.device)[shift:]
    at = weights.nonzero()[:, 0]
    return Predicted(logits[at].float(), ids[at], weights[at])


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask; what stands under the padding is never counted."""
    longest = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), longest), _pad_id(model), dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n, : len(row)] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _pad_id(model: Any) -> int:
    pad = getattr(model.config, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def losses(model: Any, kind: str, items: Sequence[Item], batch_size: int) -> list[Response]:
    """Mean loss of each item over its counted tokens."""
    out: list[Response | None] = [None] * len(items)
    with measured(model):
        for at in batches(items, batch_size, vocabulary_of(model)):
            for n, found in zip(at, predict(model, kind, [items[n] for n in at]), strict=True):
                nll = torch.nn.functional.cross_entropy(found.logits, found.targets, reduction="none")
                total = float(found.weights.sum())
                loss = float((nll * found.weights).sum()) / total if total else None
                out[n] = Response(loss=loss, tokens=total)
    return [r for r in out if r is not None]


def classes(model: Any, items: Sequence[Item], batch_size: int) -> list[Response]:
    """The most likely class of each item and its probability."""
    out: list[Response | None] = [None] * len(items)
    names = getattr(model.config, "id2label", None) or {}
    with measured(model):
        for at in batches(items, batch_size, vocabulary_of(model)):
            for n, found in zip(at, predict(model, "classify", [items[n] for n in at]), strict=True):
                sure, best = found.logits.softmax(-1)[0].max(0)
                label = int(best)
                out[n] = Response(text=str(names.get(label, label)), label=label, confidence=float(sure))
    return [r for r in out if r is not None]


def answers(model: Any, tokenizer: Any, items: Sequence[Item], max_new_tokens: int, batch_size: int) -> list[Response]:
    """Greedy answers, special tokens removed."""
    from luthier.sampling.generate import generate

    with measured(model):
        found = generate(
            model, tokenizer, [list(i.source) for i in items], max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    return [Response(text=tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids in found]
