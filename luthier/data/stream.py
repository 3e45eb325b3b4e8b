"""Rows while they are read: constant memory, from a million records as from ten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from luthier.data.order import Ordered, same_settings, units
from luthier.data.read import Cursor, Record, open_source, read
from luthier.data.records import example, mark, meant, recognise
from luthier.data.rows import Maker, Row
from luthier.errors import LuthierError
from luthier.plan.schema import SourceSpec

CHUNK = 256
"""Records rendered and tokenised together."""


@dataclass(frozen=True)
class Place:
    """Between two records of several sources: the source, the cursor in it, and how many records came before in all."""

    source: int = 0
    cursor: Cursor | None = None
    number: int = 0

    def to_list(self) -> list[int | None]:
        c = self.cursor
        return [self.source, self.number, *([c.file, c.row, c.byte] if c else [])]

    @classmethod
    def from_list(cls, values: list[Any]) -> Place:
        return cls(values[0], Cursor(*values[2:]) if len(values) > 2 else None, values[1])


class Records:
    """The records of several sources in their order, as examples; at most `stop` of them, from `begin` on."""

    def __init__(self, sources: list[SourceSpec], begin: int = 0, stop: int | None = None):
        self.sources, self.begin, self.stop = sources, begin, stop
        self._shapes: dict[int, str] = {}
        self._marked: dict[int, bool] = {}

    def shape(self, source: int) -> str:
        """The record shape of a source: what it states, or what its first record shows."""
        if source not in self._shapes:
            spec = self.sources[source]
            first: Record | None = next(iter(read(spec)), None) if spec.format == "auto" else None
            self._shapes[source] = recognise(first.fields, first.where) if first else spec.format
        return self._shapes[source]

    def marked(self, source: int) -> bool:
        """Whether every record of a source has a prompt, a completion and a label of 0 or 1 (or of true or false in a
        table), so that it says whether the answer is a wanted one. Reads the source until one has not."""
        if source not in self._marked:
            seen = self.shape(source) == "prompt-completion"
            self._marked[source] = seen and all(
                mark(r.fields.get("label")) is not None for r in read(self.sources[source])
            )
        return self._marked[source]

    def walk(self, start: Place) -> Iterator[tuple[Record, Place]]:
        """(record, place after it) from a place on."""
        number = start.number
        for at in range(start.source, len(self.sources)):
            cursor = start.cursor if at == start.source else None
            for record in read(self.sources[at], cursor):
                if self.stop is not None and number >= self.stop:
                    return
                number += 1
                if number > self.begin:
                    yield record, Place(at, record.after, number)

    def rows(self, maker: Maker, start: Place) -> Iterator[tuple[Row | None, Place]]:
        """(row or None where it was dropped, place after it). Records seen before are not counted again."""
        ledger = maker.ledger
        chunk: list[tuple[Record, Place]] = []
        for found in self.walk(start):
            if chunk and (len(chunk) == CHUNK or (found[1].number > ledger.read) != (chunk[0][1].number > ledger.read)):
                yield from self._chunk(maker, chunk)
                chunk = []
            chunk.append(found)
        yield from self._chunk(maker, chunk)

    def _chunk(self, maker: Maker, chunk: list[tuple[Record, Place]]) -> Iterator[tuple[Row | None, Place]]:
        if not chunk:
            return
        ledger = maker.ledger
        ledger.quiet = chunk[0][1].number <= ledger.read
        made = []
        for record, place in chunk:
            shape = self.shape(place.source)
            one = example(record, shape)
            one.weight *= self.sources[place.source].weight
            if "label" in one.extra and self.marked(place.source):
                one.wanted = bool(mark(one.extra.pop("label")))
            if not ledger.quiet:
                ledger.formats[shape] += 1
                ledger.unused_columns.update(one.extra.keys())
                for column in one.extra:
                    if (right := meant(column, shape)) and right not in record.fields:
                        ledger.note(f"column {column!r} is not used: did you mean {right!r}?")
            made.append(one)
        rows = maker.rows(made)
        if not ledger.quiet:
            ledger.read = chunk[-1][1].number
        ledger.quiet = False
        yield from zip(rows, (place for _, place in chunk), strict=True)


def count(sources: list[SourceSpec]) -> int:
    """Records that the sources give, with their skip and limit."""
    total = 0
    for source in sources:
        left = max(0, open_source(source).count() - source.skip)
        total += left if source.limit is None else min(left, source.limit)
    return total


@dataclass(frozen=True)
class Block:
    """A window of rows in file order, and the place after the last of them."""

    rows: list[Row]
    begin: Place
    after: Place


def next_block(rows: Iterator[tuple[Row | None, Place]], begin: Place, size: int) -> Block | None:
    """The next `size` kept rows of a running reader that stands at `begin`; None at its end."""
    kept = [(row, place) for row, place in islice(((r, p) for r, p in rows if r is not None), size)]
    return Block([row for row, _ in kept], begin, kept[-1][1]) if kept else None


class StreamBatches(Ordered):
    """Like order.Batches, over records as they are read.

    The data is cut into blocks of `window` rows (rounded up to whole rounds of batches) in file order; each block is
    shuffled, bucketed and packed by itself, by (seed, epoch, block), so the shuffle reaches as far as the window. A
    resume goes to the block's byte and makes that one block again. Every rank reads all records.
    """

    def __init__(self, records: Records, maker: Maker, batch_size: int, *, size: int, window: int = 2048, **how: Any):
        """size: records in an epoch. how: as for Ordered."""
        super().__init__(batch_size, **how)
        self.records, self.maker, self.size = records, maker, size
        round_ = batch_size * self.world
        self.window = -(-window // round_) * round_
        self.epoch, self.block, self.position = 0, 0, 0
        self._now: Block | None = None
        self._plan: list[list[list[int]]] = []
        self._rows: Iterator[tuple[Row | None, Place]] = iter(())

    @property
    def per_epoch(self) -> int | None:
        """Batches that each rank gets in an epoch, if no record is dropped; None when packing, which only reading tells."""
        if self.capacity:
            return None
        each = -(-self.size // self.batch_size)
        return -(-each // self.world)

    def steps_per_epoch(self, accumulate: int = 1) -> int | None:
        """Optimiser steps in an epoch, an upper bound where records are dropped; None when packing: state train.steps."""
        return None if self.per_epoch is None else -(-self.per_epoch // accumulate)

    def _fill(self, begin: Place) -> None:
        """Begin to read at a place."""
        self._rows = self.records.rows(self.maker, begin)
        self._now = next_block(self._rows, begin, self.window)
        if self._now is None:
            raise LuthierError(
                "no row is left of the training data: every record was dropped; see the ledger's reasons"
            )
        self._prepare(self._now)

    def _prepare(self, now: Block) -> None:
        lengths = np.array([max(len(r.ids), 0 if r.second is None else len(r.second)) for r in now.rows])
        order = self.drawn(len(lengths), self.epoch, self.block, 1)
        lines = units(order.tolist(), lengths, self.capacity, len(lengths))
        self._plan = self.cut(lines, lengths, self.epoch, self.block, 3)

    def __next__(self) -> dict[str, Any]:
        if self._now is None:
            self._fill(Place())
        assert self._now is not None, "a block was just read"
        rows, plan = self._now.rows, self._plan
        rounds = -(-len(plan) // self.world)
        number = self.position * self.world + self.rank
        chosen, silent = (plan[number], False) if number < len(plan) else (plan[0], True)
        batch = self.collate([[rows[i] for i in unit] for unit in chosen], silent=silent)
        self.position += 1
        batch["last"] = False
        if self.position == rounds:
            following = next_block(self._rows, self._now.after, self.window)
            self.position, self._now = 0, following
            if following is None:
                self.epoch, self.block, batch["last"] = self.epoch + 1, 0, True
            else:
                self.block += 1
                self._prepare(following)
        return batch

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"rows": self.size, "window": self.window}

    def state_dict(self) -> dict[str, Any]:
        """Epoch, block and batch within it, the place where the block begins, the settings and the ledger so far."""
        begin = self._now.begin if self._now else Place()
        where = {"epoch": self.epoch, "block": self.block, "position": self.position, "begin": begin.to_list()}
        return {**where, "settings": self.settings(), "ledger": self.maker.ledger.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved place: one block is made again, nothing before it is read."""
        same_settings(state["settings"], self.settings())
        self.maker.ledger.restore(state["ledger"])
        self.epoch, self.block, self.position = state["epoch"], state["block"], state["position"]
        self._now = None
        begin = Place.from_list(state["begin"])
        if begin != Place():
            self._fill(begin)
