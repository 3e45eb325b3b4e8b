"""Runs a merge tensor by tensor: one thread reads ahead, one for each core merges, one writes, in bounded memory."""

from __future__ import annotations

import hashlib
import math
import queue
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.algebra.layout import Item
from luthier.algebra.sources import Source
from luthier.delta import Merge, Stack
from luthier.errors import LuthierError

PIECE = 1 << 20
"""Entries of a flat piece of a tensor, where a merge takes pieces: small enough for the cache of a core."""
MOST_AHEAD, LEAST_AHEAD = 200 << 20, 8 << 20
"""Bytes read and not yet merged; one tensor of every model at least."""
MOST_WORKERS = 4
"""Threads that merge; each holds a tensor of every model."""
SHARE = 6
"""The part of what the process may still have that reading ahead takes is one in this many."""


class Tokens(Protocol):
    """Rows of tokens made one vocabulary."""

    def align(self, name: str, tensors: Sequence[Tensor], models: Sequence[int]) -> list[Tensor]:
        """A table of several models (by their place in the plan), each with one row for every token of the result."""
        ...


@dataclass
class Job:
    """One tensor and how it is merged."""

    item: Item
    merge: Merge | None
    """None copies what all models agree on: integers."""
    arithmetic: torch.dtype
    written: torch.dtype
    shape: tuple[int, ...]
    """Of the result."""
    each: Mapping[str, list[float]]
    base: int | None = None
    """Place of the base among the inputs, where the merge wants it apart."""
    tokens: Tokens | None = None

    @property
    def size(self) -> int:
        """Entries of the result."""
        return math.prod(self.shape)


@dataclass
class _Load:
    """A job's inputs, whole or one flat piece of each."""

    job: Job
    tensors: list[Tensor]
    buffers: list[Tensor]
    """Where the tensors lie, to be used again."""
    nbytes: int
    first: bool
    """Whether it is the job's first piece."""
    number: int = 0
    """Its place in the order of reading."""


class _Budget:
    """Bytes alive at once; whoever wants more waits, but one holder is always let in."""

    def __init__(self, most: int) -> None:
        self.most, self._now, self._stopped, self._changed = most, 0, False, threading.Condition()

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._now == 0 or self._now + nbytes <= self.most)
            self._now += nbytes

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._now -= nbytes
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class _Pool:
    """Buffers used again: the system takes as long to hand out fresh memory as the copy into it takes."""

    def __init__(self, most: int) -> None:
        self.most, self._size, self._lock = most, 0, threading.Lock()
        self._free: dict[int, list[Tensor]] = {}

    def get(self, nbytes: int) -> Tensor:
        with self._lock:
            kept = self._free.get(nbytes)
            if kept:
                self._size -= nbytes
                return kept.pop()
        return torch.empty(nbytes, dtype=torch.uint8)

    def put(self, buffers: Sequence[Tensor]) -> None:
        with self._lock:
            for buffer in buffers:
                if self._size + buffer.numel() > self.most:
                    self._free.clear()
                    self._size = 0
                if buffer.numel() <= self.most:
                    self._free.setdefault(buffer.numel(), []).append(buffer)
                    self._size += buffer.numel()


class _Reader(threading.Thread):
    """Reads the jobs' inputs in order, checks and converts them."""

    def __init__(self, jobs: Sequence[Job], sources: Sequence[Source], ahead: int) -> None:
        super().__init__(daemon=True)
        self.jobs, self.sources, self.budget, self.pool = jobs, sources, _Budget(ahead), _Pool(ahead // 2)
        self.queue: queue.Queue[_Load | None] = queue.Queue()
        self.failed: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        torch.set_num_threads(1)  # a team of threads that waits between two looks would take the others' cores
        count = 0
        try:
            for job in self.jobs:
                for load in self._pieces(job) if _in_pieces(job) else self._whole(job):
                    if self.stopped:
                        return
                    load.number, count = count, count + 1
                    self.queue.put(load)
        except BaseException as e:  # noqa: BLE001 - raised again by the thread that merges
            self.failed = e
        finally:
            self.queue.put(None)

    def stop(self) -> None:
        self.stopped = True
        self.budget.stop()

    def loads(self) -> Iterator[_Load]:
        """What was read, in order. An error of the reading thread is raised here."""
        while (load := self.queue.get()) is not None:
            yield load
        self.queue.put(None)  # for whoever else reads here
        if self.failed is not None:
            raise self.failed

    def done(self, load: _Load, keep: Sequence[Tensor] = ()) -> None:
        """The load is merged; buffers in `keep` are still needed."""
        self.pool.put([b for b in load.buffers if all(b is not k for k in keep)])
        self.budget.give(load.nbytes)

    def _whole(self, job: Job) -> Iterator[_Load]:
        shapes = [self.sources[k].shape(n) for k, n in zip(job.item.sources, job.item.inputs, strict=True)]
        nbytes = sum(math.prod(s) for s in shapes) * job.arithmetic.itemsize
        self.budget.take(nbytes)
        buffers, tensors = [], []
        for i, shape in enumerate(shapes):
            tensor, buffer = self._read(job, i, shape, 0)
            tensors.append(tensor)
            buffers += [buffer] if buffer is not None else []
        if job.tokens is not None:
            tensors = job.tokens.align(job.item.name, tensors, job.item.sources)
            tensors = [t.to(job.arithmetic).contiguous() for t in tensors]
        yield _Load(job, tensors, buffers, nbytes, True)

    def _pieces(self, job: Job) -> Iterator[_Load]:
        for first in range(0, job.size, PIECE):
            count = min(PIECE, job.size - first)
            nbytes = count * len(job.item.sources) * job.arithmetic.itemsize
            self.budget.take(nbytes)
            if self.stopped:
                return
            rows = [self._read(job, i, (count,), first) for i in range(len(job.item.sources))]
            yield _Load(job, [t for t, _ in rows], [b for _, b in rows if b is not None], nbytes, first == 0)

    def _read(self, job: Job, i: int, shape: tuple[int, ...], first: int) -> tuple[Tensor, Tensor | None]:
        """Input i, finite and in the arithmetic's type, and the buffer it lies in where it lies in one."""
        source, name = self.sources[job.item.sources[i]], job.item.inputs[i]
        dtype = source.dtype(name)
        buffer = self.pool.get(math.prod(shape) * dtype.itemsize)
        tensor = source.read(name, buffer.view(dtype).view(shape), first)
        if not _finite(tensor):
            raise LuthierError(f"{source.name}: {name} holds NaN or infinity: copy the model again, or leave it out")
        if job.merge is None or dtype == job.arithmetic:
            return tensor, buffer
        converted = tensor.to(job.arithmetic)
        self.pool.put([buffer])
        return converted, None


class _Writer(threading.Thread):
    """Calls `write` in order, and gives the buffers back."""

    def __init__(self, write: Callable[[str, Tensor], None], pool: _Pool, ahead: int) -> None:
        super().__init__(daemon=True)
        self.write, self.pool, self.budget = write, pool, _Budget(ahead)
        self.queue: queue.Queue[tuple[str, Tensor, list[Tensor]] | None] = queue.Queue()
        self.failed: BaseException | None = None

    def put(self, name: str, tensor: Tensor, buffers: list[Tensor]) -> None:
        """Queues a tensor; waits while too much is queued."""
        self.budget.take(_bytes(tensor))
        self.queue.put((name, tensor, buffers))

    def run(self) -> None:
        torch.set_num_threads(1)
        while (row := self.queue.get()) is not None:
            name, tensor, buffers = row
            if self.failed is None:
                try:
                    if not _finite(tensor):
                        raise LuthierError(
                            f"{name}: the merge is not finite in {str(tensor.dtype)[6:]}: state a wider out_dtype, or other weights"
                        )
                    self.write(name, tensor)
                except BaseException as e:  # noqa: BLE001 - raised again by the thread that merges
                    self.failed = e
                    self.budget.stop()
            self.budget.give(_bytes(tensor))
            self.pool.put(buffers)
            del row, tensor, buffers


def run(
    jobs: Sequence[Job],
    sources: Sequence[Source],
    write: Callable[[str, Tensor], None],
    *,
    seed: int = 0,
    measured: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    ahead: int | None = None,
    notes: list[dict[str, float]] | None = None,
) -> None:
    """Merges the jobs in order; `write(name, tensor)` is called in the same order, from another thread, for whole tensors
    or for consecutive flat pieces of one.

    measured: what the jobs' `measure` said. notes: what the merges say of each tensor is added there. ahead: most bytes
    read ahead; default by what the process may still have. Errors of any thread are raised here, and no further tensor
    is written.
    """
    ahead = room() if ahead is None else ahead
    reader = _Reader(jobs, sources, ahead)
    writer = _Writer(write, reader.pool, ahead // 2)
    threads = torch.get_num_threads()
    team = _Team(reader, writer, seed, measured or {}, progress, notes if notes is not None else [], threads, ahead)
    workers = [threading.Thread(target=team.work, daemon=True) for _ in range(max(1, min(threads, MOST_WORKERS)))]
    reader.start()
    writer.start()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as e:  # an interrupt
        team.fail(e)
        raise
    finally:
        reader.stop()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        writer.queue.put(None)
        reader.join()
        writer.join()
        torch.set_num_threads(threads)
    if team.failed is not None:
        raise team.failed
    if writer.failed is not None:
        raise writer.failed


class _Team:
    """Threads that merge different tensors at once, each on one core: that keeps the cores busier than one tensor on all of
    them does. What they make is handed to the writer in the order in which it was read."""

    def __init__(
        self,
        reader: _Reader,
        writer: _Writer,
        seed: int,
        measured: Mapping[str, Any],
        progress: Callable[[int, int], None],
        notes: list[dict[str, float]],
        threads: int,
        ahead: int,
    ) -> None:
        self.reader, self.writer, self.seed, self.measured = reader, writer, seed, measured
        self.progress, self.notes, self.threads, self.ahead = progress, notes, threads, ahead
        self.failed: BaseException | None = None
        self._next, self._done, self._turn = 0, 0, threading.Condition()

    def fail(self, error: BaseException) -> None:
        """Stops all; the first error counts."""
        with self._turn:
            self.failed = self.failed or error
            self._turn.notify_all()
        self.reader.stop()

    def work(self) -> None:
        try:
            with torch.inference_mode():
                for load in self.reader.loads():
                    if self.writer.failed is not None:
                        self.fail(self.writer.failed)  # whoever waits for its turn must hear of it
                    if self.failed is not None:
                        break
                    self._merge(load)
                    del load
        except BaseException as e:  # noqa: BLE001 - raised again by the thread that waits for this one
            self.fail(e)

    def _merge(self, load: _Load) -> None:
        torch.set_num_threads(self.threads if load.nbytes > self.ahead else 1)  # one too large to have company
        said: dict[str, float] = {}
        out = _merged(load, self.seed, self.measured, said)
        held = out.untyped_storage().data_ptr()
        keep = [b for b in load.buffers if b.untyped_storage().data_ptr() == held]
        load.tensors.clear()
        self.reader.done(load, keep)
        with self._turn:
            self._turn.wait_for(lambda: self.failed is not None or self._next == load.number)
            if self.failed is not None:
                return
            self.writer.put(load.job.item.name, out, keep)
            if load.first:
                self._done += 1
                self.notes += [said] if said else []
                self.progress(self._done, len(self.reader.jobs))
            self._next += 1
            self._turn.notify_all()


def measure(jobs: Sequence[Job], sources: Sequence[Source], *, ahead: int | None = None) -> dict[str, Any]:
    """What each job's merge notes of its tensor in a first pass, by name; {} where no merge looks before it merges."""
    looking = [j for j in jobs if j.merge is not None and j.merge.looks]
    if not looking:
        return {}
    threads = torch.get_num_threads()
    reader = _Reader(looking, sources, room() if ahead is None else ahead)
    reader.start()
    noted = {}
    try:
        with torch.inference_mode():
            for load in reader.loads():
                assert load.job.merge is not None
                noted[load.job.item.name] = load.job.merge.measure(_stack(load, 0, {}))
                load.tensors.clear()
                reader.done(load)
    finally:
        reader.stop()
        reader.join()
        torch.set_num_threads(threads)
    return noted


def told(noted: Sequence[Mapping[str, float]]) -> list[str]:
    """What merges said of tensors, as lines: '12 of 27 tensors' for what is so or not so, mean and range for numbers."""
    table: dict[str, list[float]] = {}
    for row in noted:
        for key, value in row.items():
            table.setdefault(key, []).append(value)
    lines = []
    for key, values in table.items():
        if set(values) <= {0.0, 1.0}:
            lines.append(f"{key}: {int(sum(values))} of {len(values)} tensors")
        else:
            lines.append(f"{key}: mean {sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})")
    return lines


def _in_pieces(job: Job) -> bool:
    merge = job.merge
    return merge is not None and type(merge).pointwise and job.tokens is None and not merge.looks and job.size > PIECE


def _merged(load: _Load, seed: int, measured: Mapping[str, Any], said: dict[str, float]) -> Tensor:
    job = load.job
    if job.merge is None:
        if any(not torch.equal(load.tensors[0], t) for t in load.tensors[1:]):
            raise LuthierError(
                f"{job.item.name} holds whole numbers that differ between the models: leave one model out"
            )
        return load.tensors[0]
    stack = _stack(load, seed, measured)
    stack.notes = said
    out = job.merge.merge(stack)
    if out.numel() != load.tensors[0].numel():
        raise LuthierError(f"{job.item.name}: the merge gave {tuple(out.shape)} for {tuple(load.tensors[0].shape)}")
    if not type(job.merge).widens:
        out = out.to(job.arithmetic)
    return out.to(job.written).contiguous()


def _stack(load: _Load, seed: int, measured: Mapping[str, Any]) -> Stack:
    job, item = load.job, load.job.item
    draws = job.merge is not None and type(job.merge).draws
    return Stack(
        item.name,
        [t for i, t in enumerate(load.tensors) if i != job.base],
        None if job.base is None else load.tensors[job.base],
        job.each,
        item.role,
        item.layer,
        item.layers,
        _generator(seed, item.name) if draws else None,
        measured,
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. A sum is the fastest look; only where it is not finite is every entry asked."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def room() -> int:
    """Bytes to read ahead: a share of what memory, limits of the process and its control group leave, within bounds."""
    left = [_available()]
    used = _status()
    for limit, now in ((resource.RLIMIT_AS, used.get("VmSize", 0)), (resource.RLIMIT_DATA, used.get("VmData", 0))):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            left.append(soft - now)
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            stated = Path("/sys/fs/cgroup", most).read_text().strip()
            if stated.isdigit():
                left.append(int(stated) - int(Path("/sys/fs/cgroup", now).read_text()))
        except (OSError, ValueError):
            continue
    return max(LEAST_AHEAD, min(MOST_AHEAD, min(left) // SHARE))


def _available() -> int:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return MOST_AHEAD * SHARE


def _status() -> dict[str, int]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {k: int(v.split()[0]) * 1024 for k, _, v in (x.partition(":") for x in lines) if k.startswith("Vm")}
