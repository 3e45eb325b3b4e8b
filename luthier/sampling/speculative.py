"""Speculative decoding of an assembly: its small tuned model drafts, and all members check a whole draft at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.attach.assembly import Assembly, Voice
from luthier.errors import LuthierError
from luthier.parts.speculation import accept, draw
from luthier.sampling.generate import GREEDY, Sampling, shares, stop_ids


@dataclass
class Drafting:
    """What drafting brought: answers, tokens drafted, of these kept, and passes of the large model."""

    answers: list[list[int]]
    drafted: int = 0
    kept: int = 0
    passes: int = 0

    @property
    def share(self) -> float:
        """Of the drafted tokens, how many stayed."""
        return self.kept / self.drafted if self.drafted else 0.0


def speculate(
    model: Assembly,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    width: int = 4,
    drafter: int | None = None,
    stop: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    keep_stop: bool = False,
) -> Drafting:
    """Continues every prompt as `generate` does, in the same distribution (greedy: the same tokens, up to rounding).

    width: tokens drafted at a time. drafter: number of the voice that drafts, default the first expert. One prompt after
    the other. Errors: an empty or overlong prompt, and members whose caches cannot forget.
    Source: P160 for the use of the small tuned model; Leviathan et al. 2023 for the rule.
    """
    if width < 1:
        raise LuthierError(f"draft: a draft has at least one token, got {width}")
    stop = set(stop_ids(model, tokenizer) if stop is None else stop)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 62
    first = model.parts.pairs[0][0] if drafter is None else drafter
    out = Drafting([])
    model.eval()
    for number, prompt in enumerate(prompts):
        if not len(prompt) or len(prompt) >= room:
            raise LuthierError(
                f"prompt {number} has {len(prompt)} tokens, the model {room} positions: give 1 to {room - 1}"
            )
        g = torch.Generator().manual_seed(sampling.seed * 1_000_003 + number)
        talks = [_Talk(voice, model.vocabulary) for voice in model.voices]
        ids, most = list(prompt), min(max_new_tokens, room - len(prompt))
        while len(ids) - len(prompt) < most and not (len(ids) > len(prompt) and ids[-1] in stop):
            left = most - (len(ids) - len(prompt))
            new = _round(model, talks, first, ids, min(width, left - 1), sampling, g, out)
            for token in new:
                ids.append(token)
                if token in stop:
                    break
        answer = ids[len(prompt) :]
        out.answers.append(answer if keep_stop or not answer or answer[-1] not in stop else answer[:-1])
    return out


def _round(
    model: Assembly,
    talks: list[_Talk],
    first: int,
    ids: list[int],
    width: int,
    sampling: Sampling,
    g: torch.Generator,
    out: Drafting,
) -> list[int]:
    """One draft and its check: the tokens that follow `ids`, at least one."""
    drafted: list[int] = []
    guesses: list[Tensor] = []
    own: list[Tensor] = []
    for _ in range(width):
        own.append(talks[first].read(ids + drafted))
        guesses.append(distribution(own[-1][-1], sampling))
        drafted.append(draw(guesses[-1], float(torch.rand((), generator=g))))
    said = []
    for n, talk in enumerate(talks):
        read = talk.read(ids + drafted)
        whole = torch.cat([x[-1:] for x in own] + [read[-1:]]) if n == first and width else read
        said.append(whole[-(width + 1) :].to(model.device))
    out.passes, out.drafted = out.passes + 1, out.drafted + width
    truth = distribution(model.join(said), sampling).cpu()
    guess = torch.stack(guesses).cpu() if guesses else truth[:0]
    kept, token = accept(truth, guess, drafted, torch.rand(width + 1, generator=g))
    out.kept += kept
    for talk in talks:
        talk.forget(len(ids) + kept)
    return [*drafted[:kept], token]


class _Talk:
    """One voice in one conversation: reads on from what it has read."""

    def __init__(self, voice: Voice, vocabulary: int) -> None:
        self.voice, self.vocabulary, self.seen = voice, vocabulary, 0
        self.cache: Any = None

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """Logits [n, V] after each token that was not read yet."""
        fresh = torch.tensor([ids[self.seen :]], device=self.voice.model.device)
        logits, self.cache = self.voice.say(
            self.vocabulary, input_ids=fresh, past_key_values=self.cache, use_cache=True, logits_to_keep=0
        )
        self.seen = len(ids)
        return logits[0]

    def forget(self, length: int) -> None:
        """Keeps only the first `length` tokens read; what comes next is read anew."""
        if self.seen <= length:
            return
        if not hasattr(self.cache, "crop"):
            raise LuthierError(f"{self.voice.name} ({type(self.voice.model).__name__}) keeps a state that cannot forget tokens: "
                               "generate without --draft")  # fmt: skip
        self.cache.crop(-(self.seen - length))
        self.seen = length


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [..., V] that a token is drawn from, with temperature, top_k and top_p; greedy puts all on one."""
    if sampling.temperature <= 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    share, order = shares(logits.double(), sampling)
    share = share / share.sum(-1, keepdim=True)
    return torch.zeros_like(share).scatter(-1, order, share)
