"""Runs a merge tensor by tensor: one thread reads ahead, one for each core merges, one writes, in bounded memory."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from luthier.algebra.loads import Budget, Job, Load, Pool, finite, nbytes_of
from luthier.algebra.reader import Reader
from luthier.algebra.room import room
from luthier.algebra.sources import Source
from luthier.delta import Stack
from luthier.errors import LuthierError
from luthier.parts.spread import SPAN, alone, spans

__all__ = ["Job", "by_layer", "measure", "run", "told"]

MOST_WORKERS = 4
"""Threads that merge; each holds a tensor of every model."""
SHARES = 8
"""A tensor too large to have company is cut into at least so many shares for each core, so that all end together."""

T = TypeVar("T")


class Crew:
    """The cores, for one tensor that has them all."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def over(self, n: int, work: Callable[[int, int], T], size: int = SPAN) -> list[T]:
        """`parts.spread.Over`, on all cores at once."""
        if self.threads == 1:
            return alone(n, work, size)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        share = size * max(1, n // (size * self.threads * SHARES))

        def some(a: int, b: int) -> list[T]:
            with torch.inference_mode():
                return [work(i, min(i + size, b)) for i in range(a, b, size)]

        return [made for row in self._pool.map(lambda ends: some(*ends), spans(n, share)) for made in row]

    def close(self) -> None:
        """Ends its threads."""
        if self._pool is not None:
            self._pool.shutdown()


class _Writer(threading.Thread):
    """Calls `write` in order, and gives the buffers back."""

    def __init__(self, write: Callable[[str, Tensor], None], pool: Pool, ahead: int) -> None:
        super().__init__(daemon=True)
        self.write, self.pool, self.budget = write, pool, Budget(ahead)
        self.queue: queue.Queue[tuple[str, Tensor, list[Tensor]] | None] = queue.Queue()
        self.failed: BaseException | None = None

    def put(self, name: str, tensor: Tensor, buffers: list[Tensor]) -> None:
        """Queues a tensor; waits while too much is queued."""
        self.budget.take(nbytes_of(tensor))
        self.queue.put((name, tensor, buffers))

    def run(self) -> None:
        torch.set_num_threads(1)
        while (row := self.queue.get()) is not None:
            name, tensor, buffers = row
            if self.failed is None:
                try:
                    with torch.inference_mode():
                        if not finite(tensor):
                            raise LuthierError(
                                f"{name}: the merge is not finite in {str(tensor.dtype)[6:]}: state a wider out_dtype, or other weights"
                            )
                        self.write(name, tensor)
                except BaseException as e:  # noqa: BLE001 - raised again by the thread that merges
                    self.failed = e
                    self.budget.stop()
            self.budget.give(nbytes_of(tensor))
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
    notes: dict[str, dict[str, float]] | None = None,
) -> None:
    """Merges the jobs in order; `write(name, tensor)` is called in the same order, from another thread, for whole tensors
    or for consecutive flat pieces of one. The tensor is `write`'s until it returns; its memory is used again.

    measured: what the jobs' `measure` said. notes: what the merges say of each tensor is put there by its name. ahead: most bytes
    read ahead; default by what the process may still have. A tensor whose inputs are more than that is merged by all
    cores together. Errors of any thread are raised here, and no further tensor is written.
    """
    ahead = room() if ahead is None else ahead
    threads = torch.get_num_threads()
    crew = Crew(min(threads, MOST_WORKERS))
    reader = Reader(jobs, sources, ahead, crew.over)
    writer = _Writer(write, reader.pool, ahead // 2)
    team = _Team(reader, writer, crew, seed, measured or {}, progress, {} if notes is None else notes)
    ended = threading.Semaphore(0)
    workers = [threading.Thread(target=team.work, args=(ended,), daemon=True) for _ in range(crew.threads)]
    reader.start()
    writer.start()
    try:
        for worker in workers:
            worker.start()
        for _ in workers:
            ended.acquire()  # no join: Python 3.11 takes a thread for ended whose join is interrupted
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
        crew.close()
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
        reader: Reader,
        writer: _Writer,
        crew: Crew,
        seed: int,
        measured: Mapping[str, Any],
        progress: Callable[[int, int], None],
        notes: dict[str, dict[str, float]],
    ) -> None:
        self.reader, self.writer, self.crew, self.seed, self.measured = reader, writer, crew, seed, measured
        self.progress, self.notes = progress, notes
        self.failed: BaseException | None = None
        self._next, self._done, self._turn = 0, 0, threading.Condition()

    def fail(self, error: BaseException) -> None:
        """Stops all; the first error counts."""
        with self._turn:
            self.failed = self.failed or error
            self._turn.notify_all()
        self.reader.stop()

    def work(self, ended: threading.Semaphore) -> None:
        """Merges until nothing is left; tells `ended`."""
        torch.set_num_threads(1)
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
        finally:
            ended.release()

    def _merge(self, load: Load) -> None:
        stack = _stack(load, self.seed, self.measured)
        if load.nbytes > self.reader.budget.most:  # one too large to have company
            stack.over = self.crew.over

        def blank(like: Tensor) -> Tensor:
            tensor, buffer = self.reader.pool.like(like)
            load.buffers.append(buffer)
            return tensor

        stack.room = blank
        out = _merged(load, stack)
        said = stack.notes
        held = out.untyped_storage().data_ptr()
        keep = [b for b in load.buffers if b.untyped_storage().data_ptr() == held]
        del stack
        load.tensors.clear()
        self.reader.done(load, keep)
        with self._turn:
            self._turn.wait_for(lambda: self.failed is not None or self._next == load.number)
            if self.failed is not None:
                return
            self.writer.put(load.job.item.name, out, keep)
            if load.first:
                self._done += 1
                self.notes |= {load.job.item.name: said} if said else {}
                self.progress(self._done, len(self.reader.jobs))
            self._next += 1
            self._turn.notify_all()


def measure(
    jobs: Sequence[Job], sources: Sequence[Source], *, seed: int = 0, ahead: int | None = None
) -> dict[str, Any]:
    """What each job's merge notes of its tensor in a first pass, by name; {} where no merge looks before it merges.

    seed: that of `run`, so that both passes draw alike.
    """
    looking = [j for j in jobs if j.merge is not None and j.merge.looks]
    if not looking:
        return {}
    threads = torch.get_num_threads()
    reader = Reader(looking, sources, room() if ahead is None else ahead)
    reader.start()
    noted = {}
    try:
        with torch.inference_mode():
            for load in reader.loads():
                assert load.job.merge is not None
                noted[load.job.item.name] = load.job.merge.measure(_stack(load, seed, {}))
                load.tensors.clear()
                reader.done(load)
    finally:
        reader.stop()
        reader.join()
        torch.set_num_threads(threads)
    return noted


def by_layer(noted: Mapping[str, Mapping[str, float]], jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """What merges said of tensors: its name -> layer's number, or role outside the layers -> the mean over its tensors."""
    table: dict[str, dict[str, list[float]]] = {}
    for item in (j.item for j in jobs if j.item.name in noted):
        layer = item.role or item.name if item.layer is None else str(item.layer)
        for key, value in noted[item.name].items():
            table.setdefault(key, {}).setdefault(layer, []).append(value)
    return {key: {layer: sum(v) / len(v) for layer, v in rows.items()} for key, rows in table.items()}


def told(noted: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What merges said of tensors, as lines: '12 of 27 tensors' for what is so or not so, mean and range for numbers."""
    table: dict[str, list[float]] = {}
    for row in noted.values():
        for key, value in row.items():
            table.setdefault(key, []).append(value)
    lines = []
    for key, values in table.items():
        if set(values) <= {0.0, 1.0}:
            lines.append(f"{key}: {int(sum(values))} of {len(values)} tensors")
        else:
            lines.append(f"{key}: mean {sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})")
    return lines


def _merged(load: Load, stack: Stack) -> Tensor:
    job = load.job
    if job.merge is None:
        if any(not torch.equal(load.tensors[0], t) for t in load.tensors[1:]):
            raise LuthierError(
                f"{job.item.name} holds whole numbers that differ between the models: leave one model out"
            )
        return load.tensors[0]
    out = job.merge.merge(stack)
    if out.numel() != load.tensors[0].numel():
        raise LuthierError(f"{job.item.name}: the merge gave {tuple(out.shape)} for {tuple(load.tensors[0].shape)}")
    if not type(job.merge).widens:
        out = out.to(job.arithmetic)
    return out.to(job.written).contiguous()


def _stack(load: Load, seed: int, measured: Mapping[str, Any]) -> Stack:
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
