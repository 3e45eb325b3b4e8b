"""A base's training text: families mixed, rendered, packed into rows whose records do not see each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from luthier.practice.draw import Draw
from luthier.practice.tokenizer import END
from luthier.practice.world import FIRST, Record, family_named, records, split_of

SEED = 1
"""The world's seed for the base, so that seed 0, which everybody tunes on, gives other records."""
STAGES: tuple[tuple[int, dict[str, int]], ...] = (
    (0, {"facts": 12, "arithmetic": 4, "lists": 4, "tracking": 6, "refusals": 3, "stories": 2}),
    (80_000, {"facts": 4, "tracking": 10, "refusals": 6, "arithmetic": 4, "lists": 5}),
    (160_000, {"facts": 12, "tracking": 8, "refusals": 5, "arithmetic": 4, "lists": 6}),
)
"""From which record on, how often each family of `FIRST` is drawn (1 where it is not named). Facts and stories come early;
once most are known, copying and tracking, which take longest to learn, get more practice."""
SYSTEM = ("Answer in few words.", "You are a friendly miller.", "Help as well as you can.")
PROMPT_WEIGHT = 0.1
"""Loss weight of what users say, beside 1 for what the assistant says."""


@dataclass
class Rows:
    """A batch: token ids, labels-to-be (the ids), loss weight of each token as a target, positions and segment numbers,
    all (rows, length); segment 0 is padding."""

    ids: np.ndarray
    weight: np.ndarray
    position: np.ndarray
    segment: np.ndarray


class Stream:
    """Batches without end. ``drawn`` (records so far) is its whole state: a stream made with it goes on from there.
    ``tokens`` counts those in batches, without padding."""

    def __init__(
        self,
        tokenizer: Any,
        rows: int,
        length: int,
        drawn: int = 0,
        tokens: int = 0,
        seed: int = SEED,
        mixture: Mapping[str, int] | None = None,
        stretch: float = 1.0,
    ) -> None:
        """``tokenizer`` is the practice tokenizer; rows and length give the shape of every batch.

        mixture: how often each family is drawn, in place of the stages; ``recall:1`` is a family at one difficulty. Records
        longer than a row are then left out. stretch: the stages begin at this many times their record, for longer runs.
        """
        self.core = tokenizer.backend_tokenizer
        self.assistant, self.end = (self.core.token_to_id(t) for t in ("<|assistant|>", END))
        self.pad = tokenizer.pad_token_id
        self.rows, self.length, self.seed = rows, length, seed
        self.mixed = bool(mixture)
        stages = [(0, dict(mixture))] if mixture else [(round(at * stretch), shares) for at, shares in STAGES]
        self.starts = [start for start, _ in stages]
        self.names = tuple(mixture) if mixture else FIRST
        self.wheels = [[name for name in self.names for _ in range(shares.get(name, 1))] for _, shares in stages]
        self.mix = Draw(f"luthier/base/{seed}")
        counts = Counter(self._next(i)[0] for i in range(drawn))
        self.sources = {name: self._source(name, counts[name]) for name in self.names}
        self.drawn, self.tokens = drawn, tokens

    def _source(self, name: str, start: int) -> Iterator[Record]:
        family, _, level = name.partition(":")
        return records(family, "train", seed=self.seed, start=start, difficulty=int(level) if level else None)

    def _next(self, i: int) -> tuple[str, bool, str]:
        """Record i's family, whether it goes on in the conversation before it, and its system message."""
        stage = max(k for k, start in enumerate(self.starts) if start <= i)
        name, joins, system = self.mix.pick(self.wheels[stage]), self.mix.real() < 0.1, self.mix.real()
        return name, joins, self.mix.pick(SYSTEM) if system < 0.05 else ""

    def _draw(self) -> tuple[str, bool]:
        name, joins, system = self._next(self.drawn)
        self.drawn += 1
        record = next(self.sources[name])
        text = "".join(f"<|{turn['role']}|>{turn['content']}{END}" for turn in record["messages"])
        family = record["family"]
        for key, asked, answer in getattr(family_named(family), "further", lambda _: [])(record):
            if split_of(family, key) == "train":
                text += f"<|user|>{asked}{END}<|assistant|>{answer}{END}"
        return (f"<|system|>{system}{END}{text}", False) if system else (text, joins)

    def weights(self, ids: list[int]) -> list[float]:
        """Loss weight of every token: 1 on what the assistant says and its end, none on the role tokens that announce
        it."""
        out, speaking = [], False
        for i in ids:
            out.append(1.0 if speaking else 0.0 if i == self.assistant else PROMPT_WEIGHT)
            speaking = i == self.assistant or (speaking and i != self.end)
        return out

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        shape = (self.rows, self.length)
        batch = Rows(np.full(shape, self.pad), np.zeros(shape, np.float32), np.zeros(shape, int), np.zeros(shape, int))
        used, segments, last = [0] * self.rows, [0] * self.rows, -1
        # A record that fits nowhere closes the batch and is dropped: no state but a count then crosses batches.
        while True:
            text, joins = self._draw()
            ids = self.core.encode(text, add_special_tokens=False).ids
            if self.mixed and len(ids) > self.length:
                continue
            fits = [r for r in range(self.rows) if used[r] + len(ids) <= self.length]
            if not fits:
                self.tokens += sum(used)
                return batch
            joined = joins and last in fits
            row = last if joined else fits[0]
            at, to = used[row], used[row] + len(ids)
            segments[row] += not joined
            first = int(batch.position[row, at - 1]) + 1 if joined else 0
            batch.ids[row, at:to] = ids
            batch.weight[row, at:to] = self.weights(ids)
            batch.position[row, at:to] = range(first, first + len(ids))
            batch.segment[row, at:to] = segments[row]
            if first == 0:
                batch.weight[row, at] = 0.0  # nothing of its own conversation precedes it
            used[row], last = to, row


class Ahead:
    """The same batches, made by another process while the last one is being computed with: for a GPU, which is faster than
    the stream. ``drawn`` and ``tokens`` are those of the batches handed out so far."""

    def __init__(self, stream: Stream, ready: int = 16) -> None:
        self.drawn, self.tokens = stream.drawn, stream.tokens
        told = {
            "num_workers": 1,
            "prefetch_factor": ready,
            "multiprocessing_context": "fork",
        }  # generators do not pickle
        loader = DataLoader(_Told(stream), batch_size=None, collate_fn=_same, **told)
        self.batches = iter(loader)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        rows, self.drawn, self.tokens = next(self.batches)
        return rows


class _Told(IterableDataset[tuple[Rows, int, int]]):
    """Each batch with what the stream counts after it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Rows, int, int]]:
        for rows in self.stream:
            yield rows, self.stream.drawn, self.stream.tokens


def _same(batch: Any) -> Any:
    return batch
