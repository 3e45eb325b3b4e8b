"""The thread that reads ahead: inputs of one job after the other, checked and converted, in bounded memory."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from luthier.algebra import loads
from luthier.algebra.loads import Budget, Job, Load, Pool, finite
from luthier.algebra.sources import Source
from luthier.errors import LuthierError
from luthier.parts.spread import Over, alone, spans


class Reader(threading.Thread):
    """Reads the jobs' inputs in order, checks and converts them."""

    def __init__(self, jobs: Sequence[Job], sources: Sequence[Source], ahead: int, over: Over = alone) -> None:
        """ahead: most bytes read and not yet merged. over: reads the inputs of a tensor that is larger than that."""
        super().__init__(daemon=True)
        self.jobs, self.sources, self.over = jobs, sources, over
        self.budget, self.pool = Budget(ahead), Pool(ahead)
        self.queue: queue.Queue[Load | None] = queue.Queue()
        self.failed: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        torch.set_num_threads(1)  # a team of threads that waits between two looks would take the others' cores
        count = 0
        try:
            with torch.inference_mode():
                for job in self.jobs:
                    for load in self._pieces(job) if job.in_pieces else self._whole(job):
                        if self.stopped:
                            return
                        load.number, count = count, count + 1
                        self.queue.put(load)
        except BaseException as e:  # noqa: BLE001 - raised again by the thread that merges
            self.failed = e
        finally:
            self.queue.put(None)

    def stop(self) -> None:
        """Ends it at the next tensor."""
        self.stopped = True
        self.budget.stop()

    def loads(self) -> Iterator[Load]:
        """What was read, in order. An error of the reading thread is raised here."""
        while (load := self.queue.get()) is not None:
            yield load
        self.queue.put(None)  # for whoever else reads here
        if self.failed is not None:
            raise self.failed

    def done(self, load: Load, keep: Sequence[Tensor] = ()) -> None:
        """The load is merged; buffers in `keep` are still needed."""
        self.pool.put([b for b in load.buffers if all(b is not k for k in keep)])
        self.budget.give(load.nbytes)

    def _whole(self, job: Job) -> Iterator[Load]:
        shapes = [self.sources[k].shape(n) for k, n in zip(job.item.sources, job.item.inputs, strict=True)]
        nbytes = sum(math.prod(s) for s in shapes) * job.arithmetic.itemsize
        self.budget.take(nbytes)
        over = alone
        if nbytes > self.budget.most:  # now it has all cores to itself, and all of the memory
            self.pool.clear()
            over = self.over
        rows = over(len(shapes), lambda i, _: self._read(job, i, shapes[i], 0), 1)
        tensors, buffers = [t for t, _ in rows], [b for _, b in rows if b is not None]
        if job.tokens is not None:
            tensors = job.tokens.align(job.item.name, tensors, job.item.sources)
            tensors = [t.to(job.arithmetic).contiguous() for t in tensors]
        yield Load(job, tensors, buffers, nbytes, True)

    def _pieces(self, job: Job) -> Iterator[Load]:
        for a, b in spans(job.size, loads.PIECE):
            nbytes = (b - a) * len(job.item.sources) * job.arithmetic.itemsize
            self.budget.take(nbytes)
            if self.stopped:
                return
            rows = [self._read(job, i, (b - a,), a) for i in range(len(job.item.sources))]
            yield Load(job, [t for t, _ in rows], [b for _, b in rows if b is not None], nbytes, a == 0)

    def _read(self, job: Job, i: int, shape: tuple[int, ...], first: int) -> tuple[Tensor, Tensor | None]:
        """Input i, finite and in the arithmetic's type, and the buffer it lies in where it lies in one."""
        source, name = self.sources[job.item.sources[i]], job.item.inputs[i]
        dtype = source.dtype(name)
        buffer = self.pool.get(math.prod(shape) * dtype.itemsize)
        flat = buffer.view(dtype)
        for a, b in spans(len(flat), loads.PIECE):  # looked at while it is still in cache
            source.read(name, flat[a:b], first + a)
            if not finite(flat[a:b]):
                raise LuthierError(
                    f"{source.name}: {name} holds NaN or infinity: copy the model again, or leave it out"
                )
        tensor = flat.view(shape)
        if job.merge is None or dtype == job.arithmetic:
            return tensor, buffer
        converted = tensor.to(job.arithmetic)
        self.pool.put([buffer])
        return converted, None
