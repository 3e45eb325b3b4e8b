"""What this machine has: device, bfloat16, memory, speed of a bare matrix product."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.errors import LuthierError


@dataclass(frozen=True)
class Hardware:
    """The machine as a report states it. Memory in bytes."""

    device: str
    name: str
    bf16: bool
    """Whether bfloat16 arithmetic is done by the hardware, not emulated."""
    memory: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self)


def choose_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's, else the CPU; of several GPUs the one of this process's LOCAL_RANK.

    Raises LuthierError where the wanted device is not there.
    """
    if wanted is not None:
        device = torch.device(wanted)
        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
        if there is not None and not there():
            raise LuthierError(f"device {device}: not available on this machine; leave it out or state cpu")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def has_bf16(device: torch.device | str) -> bool:
    """Whether the device computes in bfloat16 itself: NVIDIA from Ampere on, AMD's GPUs, CPUs with AVX512-BF16 or AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = _cpu_flags()
        return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags
    return False


def total_memory(device: torch.device | str) -> int:
    """Bytes of memory of the device; for the CPU what this process may use (the container's limit where there is one)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(physical, int(limit)) if limit.isdigit() and physical else physical


def describe(device: torch.device | str | None = None) -> Hardware:
    """The machine this process runs on."""
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _cpu_name()
    return Hardware(str(chosen), name, has_bf16(chosen), total_memory(chosen), torch.get_num_threads())


def peak_flops(
    device: torch.device | str, dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 0.3
) -> float:
    """Floating-point operations a second of a bare square matrix product, the best of several timings.

    size: rows, default 1024 on a CPU and 8192 on a GPU. seconds: how long to measure at least.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    torch.mm(a, b, out=out)
    synchronise(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def synchronise(device: torch.device | str) -> None:
    """Wait for the device's queue."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def resident_memory() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    return _status("VmRSS")


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Start a new peak: of the device's allocator, or of this process's memory. False where that is not permitted.

    After False the peak is the one since the process began.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak since reset_peak: allocated on a GPU, resident on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if high := _status("VmHWM"):
        return high
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def set_malloc(threshold: int = 16 << 20, kept: int = 512 << 20) -> bool:
    """Have glibc give blocks of `threshold` bytes and more back to the system when they are freed, and hold on to up to
    `kept` bytes of smaller ones (mallopt, in this process).

    Without the first the resident set of a training run is 1.2 to 2 times what it uses, and varies from run to run;
    without the second the activations of every step are handed back and their pages faulted in again.
    Returns False where the C library is not glibc.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.gnu_get_libc_version  # noqa: B018  (present in glibc only)
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return all(
        library.mallopt(which, ctypes.c_int(size))
        for which, size in ((m_mmap_threshold, threshold), (m_trim_threshold, kept))
    )


def limit_kernels(kernels: int = 128) -> None:
    """Have oneDNN keep so many compiled products, not 1,024; unless the environment states a number.

    It keeps one for every shape; those of a step are about 70. It counts in a process that has computed nothing in bfloat16 yet.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernels))


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_flags() -> set[str]:
    lines = _read("/proc/cpuinfo").splitlines()
    return next((set(s.partition(":")[2].split()) for s in lines if s.startswith(("flags", "Features"))), set())


def _cpu_name() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "CPU")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
