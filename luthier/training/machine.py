"""The machine a run is on: device, processes, wrapper, precision. All of accelerate that the loop sees."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from luthier.attach.attached import HANDLE, Attached
from luthier.attach.edits import Edit
from luthier.errors import LuthierError, nearest
from luthier.training.precision import Precision
from luthier.training.view import Batch


def reshard(model: nn.Module) -> None:
    """Sharded parameters as they rest. A forward pass without a backward leaves some of them whole, and what is then
    written into them, or switched on and off, would be lost at the next gathering."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass
class Machine:
    """Processes and types of one run. `model` is the wrapped model (or the plain one on a single process)."""

    accelerator: Accelerator
    precision: Precision
    model: nn.Module
    sharded: bool = False
    plain: nn.Module = field(init=False)
    entries: dict[str, Edit] = field(init=False, default_factory=dict)
    """Entries of base parameters that train; on several processes their gradients are averaged here."""

    def __post_init__(self) -> None:
        self.plain = self.model

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def compute(self) -> torch.dtype:
        """Type of the activations."""
        return self.precision.compute

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def first(self) -> bool:
        """True on the process that writes files."""
        return self.accelerator.is_main_process

    def wrap(self) -> None:
        """Puts DDP or FSDP2 around the model; again after what trains has changed. Proves that it did."""
        if self.world == 1:
            return
        handle: Attached | None = self.plain.__dict__.get(HANDLE)
        edits = {k: e for t in handle.edits.values() for k, e in t.items()} if handle else {}
        self.entries = {k: e for k, e in edits.items() if e.values is not None and e.values.requires_grad}
        if self.sharded:
            self._shard()
        else:
            self._replicate()

    def _shard(self) -> None:
        if self.entries:
            key, edit = next(iter(self.entries.items()))
            raise LuthierError(
                f"single entries of {key} would train (piece '{edit.piece}'), which FSDP2 cannot "
                "do on sharded parameters: set train.fsdp: false, or choose whole tensors"
            )
        handle: Attached | None = self.plain.__dict__.get(HANDLE)
        if handle and (one := next((p for p in handle.pieces.values() if p.form.shared), None)):
            raise LuthierError(
                f"piece '{one.name}' has numbers that its sites share ({', '.join(one.form.shared)}), which FSDP2 cannot "
                "shard: set train.fsdp: false"
            )
        if self.model is self.plain and not isinstance(self.model, FSDPModule):
            self.model = fsdp2_prepare_model(self.accelerator, self.plain)
        kinds = {type(p).__name__ for p in self.model.parameters()}
        if kinds != {"DTensor"} or not isinstance(self.model, FSDPModule):
            raise LuthierError(f"FSDP2 was asked for, but parameters are {sorted(kinds)}: see docs/multi-process.md")

    def _replicate(self) -> None:
        # DDP's reduction would fill gradients anew after an entry's hook has freed them: it leaves those alone, and
        # `accumulating` averages the k entries themselves.
        apart = {id(p) for e in self.entries.values() for p in (e.parameter, e.values)}
        names = [n for n, p in self.plain.named_parameters() if id(p) in apart]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.plain, names)
        self.model = self.plain  # frees the wrapper before, and its hooks, first
        gc.collect()
        if any(p.requires_grad and id(p) not in apart for p in self.plain.parameters()):
            self.model = DistributedDataParallel(
                self.plain,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=True,
            )

    def close(self) -> None:
        """Leaves the group of processes: the last thing a run does, since reading sharded numbers takes all of them."""
        self.accelerator.state.destroy_process_group()

    @contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Within: gradients stay on the process while more micro-batches of the step follow; after the last one they
        are averages over the processes."""
        if self.world == 1:
            yield
            return
        with self.accelerator.no_sync(self.model) if more else nullcontext():
            yield
        for values in [e.values for e in self.entries.values() if e.values is not None and not more]:
            mine = torch.zeros_like(values) if values.grad is None else values.grad
            values.grad = cast(Tensor, self.accelerator.reduce(mine, "mean"))

    def reshard(self) -> None:
        """Sharded parameters as they rest."""
        reshard(self.model)

    def unshard(self) -> None:
        """Whole parameters on every process from now on: what follows training (probes, seals, the report) is then
        done without the others."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
                module.unshard()

    def to_device(self, batch: Batch | None) -> Batch:
        if batch is None:
            raise LuthierError(
                "a process has no batch where the others have one: the data order is not the same on all"
            )
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return values
        whole: Any = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return tuple(whole.tolist())

    def count(self, n: int) -> int:
        return int(self.sum(float(n))[0])

    def any(self, flag: bool) -> bool:
        """True on all processes if it is on one."""
        return self.sum(float(flag))[0] > 0

    def clip(self, parameters: list[nn.Parameter], largest: float | None) -> float:
        """Norm of the whole gradient before clipping it to `largest`."""
        have, joint = [p for p in parameters if p.grad is not None], self.device.type != "mps"
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in have], foreach=joint)  # pyright: ignore
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if largest is not None and bool(norm > largest):
            torch.nn.utils.clip_grads_with_norm_(have, largest, norm, foreach=joint)
        return float(norm)


def launched() -> int:
    """Processes that a launcher (accelerate launch, torchrun) says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Settings in tables and lists of tables, by path: 'train.lr', 'delta.0.rank'."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}.{i}").items()}
    return {path: value}


def make_accelerator(
    fsdp: bool, device: torch.device, report_to: list[str], out: Path, config: dict[str, Any] | None = None
) -> Accelerator:
    """The accelerator of this process, with its trackers; the world size is checked against the launcher's.

    config: what the trackers are told of the run (its plan); tables are flattened to 'train.lr' and 'delta.0.rank', other
    lists to text.
    accelerate has no FSDP for CPUs and silently takes DDP instead, so the distributed type is set after construction.
    """
    world = launched()
    cpu = device.type == "cpu"
    trackers = ("tensorboard", "wandb", "mlflow", "trackio")
    for tracker in report_to:
        if tracker not in trackers:
            raise LuthierError(
                f"train.report_to: no tracker is called '{tracker}': {nearest(tracker, trackers, 'tracker')}"
            )
        if find_spec(tracker) is None:
            raise LuthierError(f"train.report_to: {tracker} is not installed: pip install 'luthier[{tracker}]'")
    accelerator = Accelerator(
        cpu=cpu, log_with=list(report_to) or None, project_dir=str(out / "logs") if report_to else None
    )
    if report_to:
        told = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat(config or {}).items()}
        accelerator.init_trackers("luthier", config=told or None)
    if accelerator.num_processes != world:
        raise LuthierError(
            f"the launcher started {world} processes, accelerate sees {accelerator.num_processes}: "
            "start with 'accelerate launch --num_processes N', on CPUs with 'torchrun --standalone --nproc_per_node N'"
        )
    if fsdp and world > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator
