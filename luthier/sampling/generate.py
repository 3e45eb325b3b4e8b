"""Batched decoding with a key–value cache: greedy or sampled, decoder-only and encoder–decoder models."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from luthier.errors import LuthierError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 for all."""
    seed: int = 0
    """Prompt number i draws the same numbers whatever the batch size and the other prompts."""


GREEDY = Sampling()


def stop_ids(model: nn.Module, tokenizer: Any = None) -> set[int]:
    """Token ids that end an answer: of the generation config, the model's config and the tokenizer."""
    places = (getattr(model, "generation_config", None), getattr(model, "config", None))
    found: set[int] = set()
    for value in [*(getattr(p, "eos_token_id", None) for p in places), getattr(tokenizer, "eos_token_id", None)]:
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {int(value)}
    return found


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    stop: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    keep_stop: bool = False,
) -> list[list[int]]:
    """Continue every prompt; returns the new ids in the order of the prompts, without the stop token.

    Prompts (token ids, at least one each) are batched by length and padded on the left; a batch ends when all its rows
    have ended, and ended rows are dropped on the way. stop: ids that end an answer, default those of model and
    tokenizer. keep_stop: leave the stop token in, which tells an ended answer from one cut off. An answer is also cut
    off where the model's positions end. The model is read as it stands, with whatever deltas are on; its training mode
    is restored. Raises LuthierError for an empty prompt and for one longer than the model's positions.
    """
    stop = set(stop_ids(model, tokenizer) if stop is None else stop)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = pad if pad is not None else 0
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))  # pyright: ignore
    room = None if two_stacks else _positions(model)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise LuthierError(f"prompt {number} is empty; give it at least one token (the start token)")
        if room is not None and len(prompt) >= room:
            raise LuthierError(f"prompt {number} has {len(prompt)} tokens, the model {room} positions; shorten it")
    draws = _draws(len(prompts), max_new_tokens if room is None else min(max_new_tokens, room), sampling)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: list[list[int]] = [[] for _ in prompts]
    start = _start_two_stacks if two_stacks else _start
    with _evaluating(model):
        for at in range(0, len(order), batch_size):
            rows = order[at : at + batch_size]
            state = start(model, [prompts[i] for i in rows], pad)
            most = dict.fromkeys(rows, max_new_tokens)
            if room is not None:
                longest = 0 if "position_ids" in state.accepted else max(len(prompts[i]) for i in rows)
                most = {i: min(max_new_tokens, room - max(longest, len(prompts[i]))) for i in rows}
            _decode(state, rows, most, stop, sampling, draws, answers, pad)
    if not keep_stop:
        answers = [a[:-1] if a and a[-1] in stop else a for a in answers]
    return answers


@dataclass
class _State:
    """A batch in the middle of decoding."""

    model: nn.Module
    mask: torch.Tensor
    """(rows, tokens so far): which cached tokens are text."""
    tokens: torch.Tensor
    """(rows, tokens of this step): what goes in next."""
    cache: Any = None
    encoded: Any = None
    """Encoder states (rows, length, width) of an encoder–decoder model; mask is then the encoder's."""

    @cached_property
    def accepted(self) -> set[str]:
        """What the model's forward takes."""
        return set(inspect.signature(self.model.forward).parameters)

    def step(self) -> torch.Tensor:
        """Logits (rows, vocabulary) of the next token, in float32."""
        accepted = self.accepted
        if self.encoded is None:
            kwargs: dict[str, Any] = {"input_ids": self.tokens, "attention_mask": self.mask}
            if "position_ids" in accepted:
                room = _positions(self.model)  # rows that have ended go on beside the others, at the last one
                positions = (self.mask.cumsum(-1) - 1).clamp(0, room - 1 if room is not None else None)
                kwargs["position_ids"] = positions[:, -self.tokens.shape[1] :]
        else:
            kwargs = {"encoder_outputs": (self.encoded,), "attention_mask": self.mask, "decoder_input_ids": self.tokens}
        if "logits_to_keep" in accepted:
            kwargs["logits_to_keep"] = 1
        out = self.model(past_key_values=self.cache, use_cache=True, return_dict=True, **kwargs)
        self.cache = out.past_key_values
        return out.logits[:, -1].float()

    def push(self, tokens: torch.Tensor) -> None:
        """Append one token (rows,) to every row."""
        self.tokens = tokens[:, None]
        if self.encoded is None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all rows but these; False where the cache cannot."""
        if not hasattr(self.cache, "batch_select_indices"):
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.tokens = self.mask[rows], self.tokens[rows]
        self.encoded = None if self.encoded is None else self.encoded[rows]
        return True


def _start(model: nn.Module, prompts: list[Sequence[int]], pad: int) -> _State:
    ids, mask = _padded(prompts, pad, left=True, device=_device(model))
    return _State(model, mask, ids)


def _start_two_stacks(model: nn.Module, prompts: list[Sequence[int]], pad: int) -> _State:
    ids, mask = _padded(prompts, pad, left=False, device=_device(model))
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)[0]  # pyright: ignore
    first = getattr(model.config, "decoder_start_token_id", None)  # pyright: ignore
    first = pad if first is None else first
    return _State(model, mask, torch.full_like(ids[:, :1], first), encoded=encoded)


def _decode(
    state: _State,
    rows: list[int],
    most: Mapping[int, int],
    stop: set[int],
    sampling: Sampling,
    draws: torch.Tensor | None,
    answers: list[list[int]],
    pad: int,
) -> None:
    """most: tokens that each row may say, at least one."""
    open_rows, ended = list(rows), [False] * len(rows)
    for step in range(max(most.values())):
        logits = state.step()
        drawn = None if draws is None else draws[open_rows, step].to(logits.device)
        chosen = _choose(logits, sampling, drawn).tolist()
        for at, (row, token) in enumerate(zip(open_rows, chosen, strict=True)):
            if ended[at]:
                chosen[at] = pad
                continue
            answers[row].append(token)
            ended[at] = token in stop or len(answers[row]) == most[row]
        if all(ended):
            return
        state.push(torch.tensor(chosen, device=logits.device))
        going = [at for at, done in enumerate(ended) if not done]
        if 2 * len(going) <= len(ended) and state.keep(torch.tensor(going, device=logits.device)):
            open_rows, ended = [open_rows[at] for at in going], [False] * len(going)


def _choose(logits: torch.Tensor, sampling: Sampling, drawn: torch.Tensor | None) -> torch.Tensor:
    """Next tokens (rows,) from logits (rows, vocabulary) and one uniform number a row, by inverting the distribution."""
    if drawn is None:
        return logits.argmax(-1)
    share, tokens = shares(logits, sampling)
    total = share.cumsum(-1)
    at = torch.searchsorted(total, drawn[:, None].to(total) * total[:, -1:], right=True)
    last = (share > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, at.minimum(last)).squeeze(-1)


def shares(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [..., V] under temperature (above 0), top_k and top_p, the likeliest first, and their tokens. What is cut
    off has 0; the others are as they were, and do not sum up to 1 then."""
    ranked, tokens = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    share = ranked.softmax(-1)
    if sampling.top_k:
        share[..., sampling.top_k :] = 0
    if sampling.top_p < 1:
        share = share.masked_fill(share.cumsum(-1) - share >= sampling.top_p, 0)
    return share, tokens


def _draws(prompts: int, steps: int, sampling: Sampling) -> torch.Tensor | None:
    """Uniform numbers (prompts, steps); row i depends on seed and i alone. None for greedy decoding."""
    if sampling.temperature <= 0:
        return None
    rows = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in range(prompts)]
    return torch.stack([torch.rand(steps, generator=g) for g in rows]) if rows else torch.zeros(0, steps)


def _padded(
    prompts: list[Sequence[int]], pad: int, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        span = slice(longest - len(prompt), None) if left else slice(0, len(prompt))
        ids[row, span] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, span] = 1
    return ids.to(device), mask.to(device)


def _positions(model: nn.Module) -> int | None:
    config = model.config.get_text_config()  # pyright: ignore
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
