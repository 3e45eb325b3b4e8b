"""Which rows make up which batch, in which order: a function of seed and epoch alone, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from luthier.data.pack import first_fit_decreasing
from luthier.data.rows import Row
from luthier.errors import LuthierError

Unit = list[int]
"""Rows that share one line of a batch: one, or several when packed."""


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of n drawn from the key, by sorting raw Philox output (which no numpy version may change)."""
    bits = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(n), kind="stable") if n else np.zeros(0, np.int64)


def units(order: Sequence[int], lengths: np.ndarray, capacity: int | None, window: int) -> list[Unit]:
    """Each row alone, or, with a capacity, packed together within windows of the order."""
    if capacity is None:
        return [[int(i)] for i in order]
    out: list[Unit] = []
    for at in range(0, len(order), window):
        part = [int(i) for i in order[at : at + window]]
        out += [[part[j] for j in chosen] for chosen in first_fit_decreasing([int(lengths[i]) for i in part], capacity)]
    return out


def batches(
    lines: list[Unit], lengths: np.ndarray, size: int, bucket: int, key: tuple[int, ...] | None
) -> list[list[Unit]]:
    """Lines cut into batches: sorted by length among `bucket` batches at a time, then the batches shuffled by the key.

    The one incomplete batch is kept: losses are sums with counts, so a smaller batch weighs what it holds.
    """
    out = []
    for at in range(0, len(lines), size * bucket):
        part = lines[at : at + size * bucket]
        if bucket > 1:
            part = sorted(part, key=lambda unit: sum(int(lengths[i]) for i in unit))
        out += [part[j : j + size] for j in range(0, len(part), size)]
    return out if key is None else [out[i] for i in permutation(len(out), *key)]


class Rows(Protocol):
    """What Batches draws from: a store of rows."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class Ordered:
    """What batches over a store and over a stream have in common: how rows are ordered, cut, packed and shared out.

    batch_size: lines in a batch. collate: from lines of rows to a batch. seed: of the order. rank, world: which of how many
    processes. shuffle: a new order every epoch. bucket: batches taken together when sorting by length. capacity: tokens
    of a line into which rows are packed; None leaves each row alone.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        collate: Any,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        bucket: int = 64,
        capacity: int | None = None,
    ):
        self.batch_size, self.collate, self.seed, self.rank, self.world = batch_size, collate, seed, rank, world
        self.shuffle, self.bucket, self.capacity = shuffle, bucket, capacity

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no __next__")

    def one_epoch(self) -> Iterator[dict[str, Any]]:
        """The batches left in the current epoch."""
        for batch in self:
            yield batch
            if batch["last"]:
                return

    def settings(self) -> dict[str, Any]:
        """What must be the same for a resume to be one."""
        kept = {"batch_size": self.batch_size, "world": self.world, "seed": self.seed, "shuffle": self.shuffle}
        return kept | {"bucket": self.bucket, "packed to": self.capacity}

    def drawn(self, count: int, *key: int) -> np.ndarray:
        """The numbers below `count` in this seed's order for the key, or in their own without shuffling."""
        return permutation(count, self.seed, *key) if self.shuffle else np.arange(count)

    def cut(self, lines: list[Unit], lengths: np.ndarray, *key: int) -> list[list[Unit]]:
        """Lines as batches; with shuffling the batches stand in this seed's order for the key."""
        return batches(lines, lengths, self.batch_size, self.bucket, (self.seed, *key) if self.shuffle else None)


class Batches(Ordered):
    """An endless iterator over batches of a row store, epoch after epoch, that can be stopped and resumed anywhere.

    Every rank derives the same global order and takes batch i*world + rank. All ranks get the same number of batches:
    where the epoch's last round lacks some, a rank repeats the epoch's first batch with all weights 0 and no `where`,
    which adds nothing to sum and count and keeps collectives in step. batch["last"] is true on an epoch's last batch.

    packed rows are put together once (by the seed) and only the order of the lines changes between epochs, so that
    every epoch has the same number of batches.
    """

    def __init__(self, rows: Rows, batch_size: int, *, window: int = 2048, **how: Any):
        """window: rows that are packed together. how: as for Ordered."""
        super().__init__(batch_size, **how)
        self.rows = rows
        order, capacity = self.drawn(len(rows), 0, 0, 1).tolist(), self.capacity
        self._packed = None if capacity is None else units(order, rows.lengths, capacity, window)
        lines = len(rows) if self._packed is None else len(self._packed)
        self.total = -(-lines // batch_size)
        self.per_epoch: int = -(-self.total // self.world)
        """Batches that each rank gets in an epoch."""
        self.epoch, self.position = 0, 0
        self._plan: tuple[int, list[list[Unit]]] | None = None

    def plan(self, epoch: int) -> list[list[Unit]]:
        """All batches of an epoch, as lines of row numbers, over all ranks."""
        if self._plan is None or self._plan[0] != epoch:
            if self._packed is None:
                lines = [[i] for i in self.drawn(len(self.rows), epoch, 0, 1).tolist()]
            else:
                lines = [self._packed[i] for i in self.drawn(len(self._packed), epoch, 0, 2).tolist()]
            self._plan = epoch, self.cut(lines, self.rows.lengths, epoch, 0, 3)
        return self._plan[1]

    def __next__(self) -> dict[str, Any]:
        if not self.per_epoch:
            raise StopIteration
        plan = self.plan(self.epoch)
        number = self.position * self.world + self.rank
        chosen, silent = (plan[number], False) if number < len(plan) else (plan[0], True)
        self.position += 1
        last = self.position == self.per_epoch
        if last:
            self.epoch, self.position = self.epoch + 1, 0
        batch = self.collate([[self.rows[i] for i in unit] for unit in chosen], silent=silent)
        batch["last"] = last
        return batch

    def steps_per_epoch(self, accumulate: int = 1) -> int:
        """Optimiser steps in an epoch; the last one may have fewer micro-batches."""
        return -(-self.per_epoch // accumulate)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"rows": len(self.rows)}

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands: epoch, batches of it already given on this rank, and the settings."""
        return {"epoch": self.epoch, "position": self.position, "settings": self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved place. Other settings are an error that names them: the order would be another."""
        same_settings(state["settings"], self.settings())
        self.epoch, self.position = state["epoch"], state["position"]


def same_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a resume under which the next batches would be others."""
    changed = [f"{k} {saved.get(k)} -> {now.get(k)}" for k in sorted({*saved, *now}) if saved.get(k) != now.get(k)]
    if changed:
        raise LuthierError(
            f"cannot resume the data order, settings changed ({'; '.join(changed)}): restore them, or start anew"
        )
