"""A tiny model under the knife, for tests of editing: token ids as they come, no tokenizer, no chat."""

from __future__ import annotations

import torch

from luthier.algebra.subject import ModelSubject
from luthier.bridge.target import target
from luthier.editing.engine import Request, Text
from tests.tiny import VOCABULARY, tiny


def text(seed: int, length: int = 8, target_length: int = 2, subject: int = 3) -> Text:
    """Random ids, the last `target_length` of them the target."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (length + target_length,), generator=g).tolist()
    return Text(tuple(ids), length, None, subject)


def general(tokens: int) -> list[Text]:
    """Random passages of 16 tokens."""
    g = torch.Generator().manual_seed(99)
    rows = torch.randint(3, VOCABULARY, (max(2, tokens // 16), 16), generator=g).tolist()
    return [Text(tuple(row)) for row in rows]


def subject(family: str = "llama", **settings: int) -> ModelSubject:
    """A fresh tiny model, its weights drawn wide: with the usual 0.02 a single matrix of it moves next to nothing."""
    model = tiny(family, initializer_range=0.2, **settings)
    if family == "llama":  # its head is its own: wide enough for a probability near one
        model.get_output_embeddings().weight.data *= 3  # pyright: ignore
    return ModelSubject(target(model), general, tokens=2000)


def requests(n: int = 3) -> list[Request]:
    """n requests with one other opening, an essence, a paraphrase and a neighbour each."""
    out = []
    for k in range(n):
        new = text(10 * k)
        opened = Text((7, 9, *new.ids), new.start + 2, None, new.subject + 2)
        other = Text((*new.ids[:2], 5, *new.ids[2:]), new.start + 1)
        out.append(Request(new, f"r{k}", (opened,), text(10 * k + 1, 4, 1, 2), (other,), (text(10 * k + 2),)))
    return out
