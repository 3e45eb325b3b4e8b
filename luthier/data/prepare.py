"""From a plan's data section to batches: the one door of this room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from luthier.data import cache
from luthier.data.identity import code_version, digest, tokenizer_fingerprint
from luthier.data.ledger import Ledger
from luthier.data.order import Batches
from luthier.data.read import open_source
from luthier.data.rows import Maker, Row
from luthier.data.stream import Place, Records, StreamBatches, count, next_block
from luthier.data.template import template_text
from luthier.errors import LuthierError
from luthier.plan.schema import DataSpec, SourceSpec

STREAM_ABOVE = 100_000
"""Records above which stream: auto streams."""

MATTERS = (
    *("template_options", "max_length", "too_long", "loss_on", "role_weights", "thinking", "unsupervised"),
    *("end_of_turn", "holdout"),
)
"""Settings that decide what a row is; those left out decide only how rows are ordered and batched."""


@dataclass
class Dataset:
    """A run's data, ready.

    train: the rows in a store, or None when streaming. eval: held-out rows, or None. ledger, eval_ledger: their accounts.
    fingerprint: digest of the data's content, tokenizer, template and settings. template: the chat template that was
    used (None without one); generation must use the same. longest: tokens of the longest line a batch can have.
    """

    spec: DataSpec
    kind: str
    seed: int
    train: cache.Store | None
    eval: cache.Store | None
    ledger: Ledger
    eval_ledger: Ledger | None
    fingerprint: str
    template: str | None
    end_of_turn: str | None
    longest: int
    size: int
    pad_id: int
    records: Records = field(repr=False)
    maker: Maker = field(repr=False)
    window: list[Row] = field(repr=False, default_factory=list)

    @property
    def streaming(self) -> bool:
        """Whether rows are read during training."""
        return self.train is None

    def _collate(self, packed: bool) -> Any:
        from luthier.data.collate import Collate

        return Collate(self.pad_id, self.kind, packed)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Batches | StreamBatches:
        """The training batches of one rank: endless, resumable (state_dict, load_state_dict)."""
        spec = self.spec
        packed = spec.packing
        common: dict[str, Any] = {
            **{"collate": self._collate(packed), "seed": self.seed, "rank": rank, "world": world},
            **{"shuffle": spec.shuffle, "bucket": spec.bucket, "window": spec.window},
            "capacity": spec.max_length if packed else None,
        }
        if self.train is not None:
            return Batches(self.train, batch_size, **common)
        return StreamBatches(self.records, self.maker, batch_size, size=self.size, **common)

    def eval_batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """One pass over the held-out rows, sorted by length, never shuffled or packed."""
        if self.eval is None:
            return iter(())
        everything = -(-len(self.eval) // batch_size)
        over = Batches(
            self.eval,
            batch_size,
            collate=self._collate(False),
            rank=rank,
            world=world,
            shuffle=False,
            bucket=max(1, everything),
        )
        return over.one_epoch()

    def steps_per_epoch(self, batch_size: int, accumulate: int = 1, world: int = 1) -> int | None:
        """Optimiser steps in an epoch; None where only reading tells (streaming with packing): state train.steps."""
        return self.batches(batch_size, 0, world).steps_per_epoch(accumulate)

    def longest_batch(self, batch_size: int) -> dict[str, Any]:
        """The largest batch this run can meet, for the rehearsal: the longest rows, or, where lengths are not known yet
        or rows are packed, real rows repeated up to max_length."""
        packed = self.spec.packing
        if self.train is not None and not packed:
            order = (-self.train.lengths).argsort(kind="stable")[:batch_size]
            rows = [self.train[int(i)] for i in order]
        else:
            found = self.window or [self.train[i] for i in range(min(64, len(self.train or ())))]  # pyright: ignore[reportOptionalSubscript]
            longest = max(found, key=lambda r: r.supervised)
            rows = [stretched(longest, self.spec.max_length)] * batch_size
        return self._collate(packed)([[r] for r in rows])


def stretched(row: Row, length: int) -> Row:
    """The row repeated up to this many tokens, both sides."""
    import numpy as np

    def to_length(a: Any) -> Any:
        return None if a is None else np.resize(a, length)

    return Row(
        to_length(row.ids), to_length(row.weights), row.where, 0, row.eot, row.label, row.weight,
        to_length(row.second), to_length(row.second_weights),
    )  # fmt: skip


def check(spec: DataSpec, kind: str) -> None:
    """Refuse settings that cannot go together."""
    if not spec.train:
        raise LuthierError("data.train names no source; give a file, a hub dataset or practice:FAMILY")
    if spec.packing and kind != "causal":
        raise LuthierError(
            f"data.packing is for causal models, this run's rows are of kind {kind}; set data.packing: false"
        )
    if spec.eval and spec.holdout:
        raise LuthierError("data.holdout and data.eval both state held-out records; keep one of them")


def prepare(
    spec: DataSpec,
    tokenizer: Any,
    *,
    kind: str = "causal",
    labels: list[str] | None = None,
    seed: int = 0,
) -> Dataset:
    """Read, check, render and tokenise a plan's records (or, when streaming, the first window of them).

    `kind`: causal, seq2seq, classify, or pair for objectives that compare chosen and rejected. `labels`: class names in
    index order. `seed` decides the order of batches only. Raises LuthierError for whatever is wrong with files,
    records, template or settings, naming the file and record.
    """
    check(spec, kind)
    identities = [open_source(s).identity() for s in spec.train]
    made_by = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": digest(template_text(spec, tokenizer)),
        "settings": digest([{k: getattr(spec, k) for k in MATTERS}, kind, labels, code_version()]),
    }
    total = count(spec.train) if spec.holdout or spec.stream is not False else 0
    if spec.holdout and spec.holdout >= total:
        raise LuthierError(f"data.holdout {spec.holdout} leaves nothing to train on: there are {total} records")
    streaming = spec.stream is True or (spec.stream == "auto" and total > STREAM_ABOVE)
    size = total - spec.holdout
    stop = size if spec.holdout else None

    def built(
        sources: list[SourceSpec], held: list[dict[str, Any]], begin: int, stop: int | None
    ) -> tuple[cache.Store, Ledger]:
        key = digest([made_by, [s.model_dump() for s in sources], held, begin, stop]) if spec.cache else None
        return cache.cached(key, lambda: build(Records(sources, begin, stop), spec, tokenizer, kind, labels))

    held_out = None
    if spec.eval:
        held_out = built(spec.eval, [open_source(s).identity() for s in spec.eval], 0, None)
    elif spec.holdout:
        held_out = built(spec.train, identities, size, None)

    records = Records(spec.train, 0, stop)
    if streaming:
        ledger, store = Ledger(scope="records read so far (streaming)"), None
        maker = Maker(spec, tokenizer, kind, labels, ledger)
        first = next_block(records.rows(maker, Place()), Place(), spec.window)
        window = first.rows if first else []
        ledger.duplicates = repeats(row.ids.tobytes() for row in window)
        longest = spec.max_length
    else:
        store, ledger = built(spec.train, identities, 0, stop)
        maker, window = Maker(spec, tokenizer, kind, labels, ledger), []
        longest = spec.max_length if spec.packing else store.longest
        size = len(store)
    if not (window or store):
        raise LuthierError(
            f"no row is left of {', '.join(s.path for s in spec.train)}: dropped {dict(ledger.dropped)}; see docs/data.md"
        )
    if held_out and store is not None:
        known = set(store.digests())
        shared = sum(d in known for d in held_out[0].digests())
        if shared:
            held_out[1].notes["rows also in the training data"] = shared
    content = [{k: v for k, v in i.items() if k not in ("files",)} | {"files": contents(i)} for i in identities]
    sources = [s.model_dump(exclude={"path"}) for s in spec.train]
    ledger.fingerprints = {
        "data": digest([content, sources, stop]),
        **{k: made_by[k] for k in ("tokenizer", "template")},
    }
    return Dataset(
        spec=spec,
        kind=kind,
        seed=seed,
        train=store,
        eval=held_out[0] if held_out else None,
        ledger=ledger,
        eval_ledger=held_out[1] if held_out else None,
        fingerprint=digest(
            [content, sources, stop, made_by["tokenizer"], made_by["template"], settings_of(spec, kind, labels)]
        ),
        template=maker.chat.text,
        end_of_turn=maker.chat.end_text if maker.chat.text else tokenizer.eos_token,
        longest=longest,
        size=size,
        pad_id=pad_id(tokenizer),
        records=records,
        maker=maker,
        window=window,
    )


def settings_of(spec: DataSpec, kind: str, labels: list[str] | None) -> list[Any]:
    return [{k: getattr(spec, k) for k in MATTERS}, kind, labels]


def contents(identity: dict[str, Any]) -> list[str]:
    """What the files hold, without where they lie and when they were written."""
    return [f["content"] for f in identity.get("files", [])]


def pad_id(tokenizer: Any) -> int:
    from luthier.data.collate import pad_id_of

    return pad_id_of(tokenizer)


def repeats(digests: Any) -> int:
    """How many come again after their first time."""
    return sum(n - 1 for n in Counter(digests).values())


def build(
    records: Records, spec: DataSpec, tokenizer: Any, kind: str, labels: list[str] | None
) -> tuple[cache.Store, Ledger]:
    """All rows of the records, in a store, with their ledger."""
    ledger = Ledger()
    maker = Maker(spec, tokenizer, kind, labels, ledger)
    store = cache.gather(row for row, _ in records.rows(maker, Place()) if row is not None)
    ledger.duplicates = repeats(store.digests())
    return store, ledger
