"""Merges of 0.83 B parameters beside mergekit: seconds and peak memory of whole processes, paired in one run.

    python benchmarks/merge.py [--mergekit PYTHON] [--layers 16] [--hidden 2048] [--folder DIR] [--methods linear ties]
                               [--models DIR]

Checkpoints are made on the spot: a base and three tuned ones, Llama-shaped, bfloat16, random, in a temporary folder that
is removed afterwards; --models names a folder that keeps them for the next run (of the same shape). Neither side waits
for the disk. --mergekit names a Python in which mergekit is importable;
default this one, and without it only our own figures are printed. The floor is what reading the inputs and writing the output takes by itself. The last line
is one JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

METHODS = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.4}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.5}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.5}},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"weight": 0.5, "density": 0.9, "gamma": 0.01}},
}
TARGETS = {"linear": 2.0, "slerp": 2.0, "dare_ties": 4.0, "ties": 8.0, "breadcrumbs": 8.0}
"""How many times faster than mergekit it is to be."""
PEAK = 1.5e9
"""Most bytes of a merge."""


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    place = Path(tempfile.mkdtemp(prefix="merge-benchmark-", dir=args.folder))
    try:
        report = measure(args, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(report))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mergekit", default=sys.executable, help="a Python in which mergekit is importable")
    parser.add_argument("--folder", default=None, help="where the temporary folder is made")
    parser.add_argument("--models", default=None, help="a folder in which the checkpoints stay, to be used again")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    home = place if args.models is None else Path(args.models)
    models = [home / name for name in ("base", "one", "two", "three")]
    # In a process of its own: the peak of a started process begins at that of the one that starts it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        numbers = pool.submit(make, models, args).result()
    peer = importable(args.mergekit)
    read, write = floors(models, place)
    load = os.getloadavg()[0]
    print(
        f"{numbers / 1e9:.2f} B numbers in bfloat16; reading three models {read:.1f} s, writing one {write:.1f} s; load {load:.1f}"
    )
    print(f"mergekit {peer or 'not importable: only our own figures'}")
    print(f"{'method':12s} {'ours s':>8s} {'GB':>6s} {'mergekit s':>11s} {'GB':>6s} {'times':>6s}  largest difference")
    rows = {}
    for name in args.methods:
        config = place / f"{name}.yml"
        config.write_text(yaml.safe_dump(plan(name, models)), encoding="utf-8")
        rows[name] = pair(name, config, place, args, peer)
    return {
        "numbers": numbers,
        "read_s": round(read, 2),
        "write_s": round(write, 2),
        "load": round(load, 2),
        "mergekit": peer,
        "methods": rows,
        "threads": torch.get_num_threads(),
    }


def plan(name: str, models: Sequence[Path]) -> dict[str, Any]:
    base, *tuned = map(str, models)
    config = dict(METHODS[name]) | {"dtype": "bfloat16"}
    if name == "slerp":
        return config | {"base_model": base, "models": [{"model": base}, {"model": tuned[0]}]}
    return config | {"models": [{"model": m} for m in tuned]} | ({} if name == "linear" else {"base_model": base})


def pair(name: str, config: Path, place: Path, args: argparse.Namespace, peer: str | None) -> dict[str, Any]:
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for _ in range(args.repeat):
        ours = best(
            ours, run([sys.executable, "-m", "luthier", "merge", str(config), "--quiet"], ["--out"], place / "ours")
        )
        if peer:
            theirs = best(
                theirs, run([args.mergekit, "-m", "mergekit.scripts.run_yaml", str(config)], [], place / "theirs")
            )
    row: dict[str, Any] = {k: round(ours[k], 2) for k in ("seconds", "cpu")} | {"peak_gb": round(ours["peak"] / 1e9, 2)}
    row["peak_ok"] = ours["peak"] <= PEAK
    said = ""
    if peer:
        row |= {"mergekit_seconds": round(theirs["seconds"], 2), "mergekit_cpu": round(theirs["cpu"], 2)}
        row["mergekit_peak_gb"] = round(theirs["peak"] / 1e9, 2)
        row["times"] = round(theirs["seconds"] / ours["seconds"], 2)
        row["times_ok"] = row["times"] >= TARGETS[name]
        row["difference"] = None if name == "dare_ties" else apart(place / "ours", place / "theirs")
        said = "draws" if row["difference"] is None else f"{row['difference']:.1e}"
    times = (
        (f"{row.get('mergekit_seconds', 0):11.1f} {row.get('mergekit_peak_gb', 0):6.2f} {row.get('times', 0):6.1f}")
        if peer
        else ""
    )
    print(f"{name:12s} {row['seconds']:8.1f} {row['peak_gb']:6.2f} {times}  {said}", flush=True)
    for folder in ("ours", "theirs"):
        shutil.rmtree(place / folder, ignore_errors=True)
    return row


def best(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return b if not a or b["seconds"] < a["seconds"] else a


def run(command: list[str], flag: list[str], out: Path) -> dict[str, float]:
    """Seconds by the clock and of the processors, and peak resident bytes, of a whole process."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen([*command, *flag, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {said.decode()[-800:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": peak}


def make(models: Sequence[Path], args: argparse.Namespace) -> int:
    """Writes the checkpoints, where they are not there; gives how many numbers one holds."""
    h, inner, words = args.hidden, args.inner, args.vocabulary
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, h),
        "lm_head.weight": (words, h),
        "model.norm.weight": (h,),
    }
    for i in range(args.layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (inner, h) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (h, inner)}
        shapes |= {f"{at}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": inner,
        "num_hidden_layers": args.layers, "num_attention_heads": h // 128 or 1, "num_key_value_heads": h // 128 or 1,
        "vocab_size": words, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    if all((folder / "model.safetensors").exists() for folder in models):
        return sum(math.prod(shape) for shape in shapes.values())
    g = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=g) * 0.02).bfloat16() for name, shape in shapes.items()}
    for k, folder in enumerate(models):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        g = torch.Generator().manual_seed(k)
        tensors = base
        if k:
            tensors = {n: (t.float() + torch.randn(t.shape, generator=g) * 0.002).bfloat16() for n, t in base.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(t.numel() for t in base.values())


def floors(models: Sequence[Path], place: Path) -> tuple[float, float]:
    """Seconds for reading three models, and for writing one to the disk."""
    block = bytearray(1 << 24)
    began = time.perf_counter()
    for folder in models[1:]:
        with (folder / "model.safetensors").open("rb", buffering=0) as f:
            while f.readinto(block):
                pass
    read = time.perf_counter() - began
    size = (models[0] / "model.safetensors").stat().st_size
    os.sync()
    began = time.perf_counter()
    with (place / "floor").open("wb", buffering=0) as f:
        for _ in range(size // len(block)):
            f.write(block)
        os.fsync(f.fileno())
    write = time.perf_counter() - began
    (place / "floor").unlink()
    return read, write


def importable(python: str) -> str | None:
    """mergekit's version there."""
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    try:
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as e:
        raise SystemExit(f"--mergekit {python}: {e.strerror}") from e
    return said.stdout.strip() or None


def apart(a: Path, b: Path) -> float:
    """Largest difference of two checkpoints, tensor by tensor."""
    most = 0.0
    places = [{n: f for f in sorted(folder.glob("*.safetensors")) for n in names(f)} for folder in (a, b)]
    assert set(places[0]) == set(places[1]), "other tensors"
    for name, file in places[0].items():
        with safe_open(file, "pt") as x, safe_open(places[1][name], "pt") as y:
            most = max(most, float((x.get_tensor(name).float() - y.get_tensor(name).float()).abs().max()))
    return most


def names(file: Path) -> list[str]:
    with safe_open(file, "pt") as f:
        return list(f.keys())


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
