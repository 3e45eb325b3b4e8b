"""doctor: what this machine has for luthier, and what to do about what it lacks. Changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

NEEDED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "pydantic")
EXTRAS = {
    "peft": "peft",
    "datasets": "data",
    "pyarrow": "data",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""Optional package -> the extra that brings it."""
LITTLE_DISK, LITTLE_MEMORY = 2 << 30, 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. bad: luthier does not run; note: it runs, but the remedy makes it better."""

    what: str
    state: Literal["ok", "note", "bad"]
    found: str
    remedy: str = ""


def doctor() -> list[Finding]:
    """Looks at everything, in the order in which a person would repair it."""
    return [finding for look in LOOKS for finding in look()]


def _versions() -> list[Finding]:
    out = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in NEEDED:
        try:
            out.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            out.append(Finding(name, "bad", "not installed", "pip install luthier"))
    missing = sorted({extra for name, extra in EXTRAS.items() if importlib.util.find_spec(name) is None})
    there = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    hint = f"where wanted: pip install 'luthier[{','.join(missing)}]'" if missing else ""
    return [*out, Finding("extras", "ok", ", ".join(there) or "none", hint)]


def _hardware() -> list[Finding]:
    import torch

    from luthier.bases.hardware import describe, peak_flops, total_memory

    machine = describe()
    out = [Finding("device", "ok", f"{machine.device}: {machine.name}")]
    if machine.device == "cpu" and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        out = [Finding("device", "note", "cpu, though there is an NVIDIA driver", "install the CUDA build of torch")]
    out.append(Finding("threads", "ok", f"{machine.threads} of {os.cpu_count()} processors"))
    if machine.bf16:
        out.append(Finding("bfloat16", "ok", "computed by the hardware; train.precision: auto takes it"))
    else:
        out.append(Finding("bfloat16", "ok", "emulated here; train.precision: auto takes fp32"))
    rates = {"fp32": peak_flops(machine.device)} | (
        {"bf16": peak_flops(machine.device, torch.bfloat16)} if machine.bf16 else {}
    )
    out.append(
        Finding(
            "speed",
            "ok",
            ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in rates.items()) + " in a bare matrix product",
        )
    )
    size = total_memory(machine.device)
    little = size < LITTLE_MEMORY
    remedy = "take a small base, train.batch_size: 1 and train.checkpointing: true" if little else ""
    out.append(Finding("memory", "note" if little else "ok", f"{size / 2**30:.1f} GiB", remedy))
    return out


def _malloc() -> list[Finding]:
    from luthier.bases.hardware import reset_peak, set_malloc

    out = []
    if set_malloc():
        out.append(Finding("malloc", "ok", "gives freed blocks back to the system (set by luthier in its own process)"))
    else:
        out.append(
            Finding(
                "malloc",
                "note",
                "not glibc: the memory reported may exceed what is used",
                "compare runs on one machine only",
            )
        )
    if not reset_peak("cpu"):
        out.append(
            Finding(
                "peak memory",
                "note",
                "cannot be reset here",
                "the figure in reports then counts from the process's start",
            )
        )
    return out


def _disk() -> list[Finding]:
    out = []
    cache = Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"cache": (cache, "LUTHIER_CACHE"), "hub cache": (hub, "HF_HOME"), "work folder": (Path.cwd(), "")}
    for what, (path, variable) in places.items():
        there = next(p for p in [path, *path.parents] if p.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as e:
            remedy = (
                f"set {variable} to a folder that can be written"
                if variable
                else "change to a folder that can be written"
            )
            out.append(Finding(what, "bad", f"{path} cannot be written ({e.strerror})", remedy))
            continue
        little = free < LITTLE_DISK
        remedy = f"free the disk{f' or point {variable} elsewhere' if variable else ''}" if little else ""
        out.append(Finding(what, "note" if little else "ok", f"{path}, {free / 2**30:.1f} GiB free", remedy))
    return out


def _network() -> list[Finding]:
    switches = [
        v
        for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        if os.environ.get(v) not in (None, "", "0")
    ]
    if switches:
        return [
            Finding(
                "hub",
                "note",
                f"offline by {', '.join(switches)}",
                "unset it to fetch bases by name; folders and cached ones work",
            )
        ]
    return [Finding("hub", "ok", "online unless a base is cached (HF_HUB_OFFLINE is not set)")]


def _processes() -> list[Finding]:
    import torch.distributed as dist

    world = os.environ.get("WORLD_SIZE")
    if not dist.is_available():
        return [
            Finding(
                "processes",
                "note",
                "torch.distributed is not in this build",
                "one process works; for more install another torch",
            )
        ]
    backends = [n for n, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    found = (
        f"one; backends {', '.join(backends)}"
        if world is None
        else f"a launcher says {world}; backends {', '.join(backends)}"
    )
    return [Finding("processes", "ok", found)]


def _practice() -> list[Finding]:
    from importlib.resources import files

    weights = files("luthier.assets").joinpath("practice", "base", "model.safetensors")
    if weights.is_file():
        return [Finding("practice base", "ok", "there")]
    return [
        Finding(
            "practice base", "bad", "its weights are missing", "install luthier again, or train it: make practice-base"
        )
    ]


LOOKS: tuple[Callable[[], list[Finding]], ...] = (_versions, _hardware, _malloc, _disk, _network, _processes, _practice)
"""What is looked at, in this order."""
