"""Trains a base from the generators alone; ``python -m luthier.practice.bases`` is the command.

The stable part of the schedule does not depend on the length of the run, so until it decays a run can be made shorter or longer from
its checkpoint, and gives what a run of that length from the start would have given.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.errors import LuthierError
from luthier.practice.muon import Muon
from luthier.practice.shapes import M, Size, loss_of, new_model
from luthier.practice.stream import SEED, Ahead, Stream
from luthier.practice.tokenizer import MASK
from luthier.training.fast import slow_down, speed_up


@dataclass(frozen=True)
class Run:
    """How it is trained.

    ``tokens`` are slots of packed rows, padding included; ``lr`` is shared by Muon (matrices inside the layers; its
    step is scaled to AdamW's root mean square) and AdamW (all else); warm-up in steps, then constant, then linear to
    ``floor`` x lr over the last ``decay`` of the steps. ``stream_seed``, ``mixture`` and ``stretch`` are the text's: see
    ``Stream``. ``marks`` checkpoints along the way are kept as bases, each after twice the steps of the one before, the last
    one being the end. ``bf16`` computes in it; on a GPU that is always done.
    """

    tokens: int = 7_000_000
    rows: int = 32
    length: int = 128
    lr: float = 3e-3
    warmup: int = 40
    decay: float = 0.35
    floor: float = 0.02
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    stream_seed: int = SEED
    mixture: Mapping[str, int] = field(default_factory=dict)
    stretch: float = 1.0
    marks: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, self.tokens // (self.rows * self.length))

    def marked(self) -> dict[int, int]:
        """Step at which each checkpoint on the way is kept -> its number, from 1."""
        return {max(1, round(self.steps / 2 ** (self.marks - k))): k for k in range(1, self.marks)}

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0."""
        fall = max(1, round(self.steps * self.decay))
        tail = min(1.0, (self.steps - step) / fall)
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.floor + (1 - self.floor) * tail)


def optimisers(model: nn.Module, run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head, norms and routers."""
    inside = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and (".layers." in n or ".layer." in n) and not n.endswith("mlp.gate.weight")
    ]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        Muon(inside, lr=run.lr, weight_decay=run.weight_decay),
        torch.optim.AdamW(rest, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def save_state(
    folder: Path, model: nn.Module, opts: Sequence[torch.optim.Optimizer], step: int, stream: Stream | Ahead
) -> None:
    """Write model, moments, step and data position as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for k, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{k}.{index}.{name}": value.contiguous() for name, value in state.items()}
    part = folder / "state.safetensors.part"
    save_file(tensors, part, {"step": str(step), "drawn": str(stream.drawn), "tokens": str(stream.tokens)})
    os.replace(part, folder / "state.safetensors")


def load_state(folder: Path, model: nn.Module, opts: Sequence[torch.optim.Optimizer]) -> tuple[int, int, int]:
    """Read what save_state wrote; returns the step, the records drawn and their tokens."""
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", "pt") as file:
        meta = file.metadata()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(file.get_tensor(f"model.{name}"))
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in opts]
        for key in file.keys():
            if key.startswith("opt."):
                _, k, index, name = key.split(".", 3)
                states[int(k)].setdefault(int(index), {})[name] = file.get_tensor(key)
    for opt, state in zip(opts, states, strict=True):
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    return int(meta["step"]), int(meta["drawn"]), int(meta["tokens"])


def train(
    out: Path,
    run: Run = Run(),
    size: Size = M,
    minutes: float | None = None,
    stop_at: int | None = None,
    every: int = 50,
    tokenizer: Any = None,
    start: Callable[[], Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> list[float]:
    """Train into the folder ``out``, going on from its checkpoint if there is one; returns this call's losses.

    Ends when the run is done (and ``out/base`` holds the base), after ``minutes``, or at step ``stop_at``; in the last
    two cases a further call goes on. ``every`` is the number of steps between checkpoints. ``start`` makes the model to begin
    with, fp32; by default a freshly drawn one. ``told`` is written into the base's training.json, and may not differ between
    calls. Raises LuthierError if the folder holds a run of other settings, or on a loss that is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_run(out, run, size, told or {})
    if tokenizer is None:
        from luthier.practice import tokenizer as own

        tokenizer = own.train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (start() if start else new_model(size, tokenizer, run.seed)).to(device).train()
    speed_up(model)
    opts = optimisers(model, run)
    held = (out / "state.safetensors").is_file()
    step, drawn, tokens = load_state(out, model, opts) if held else (0, 0, 0)
    stream = Stream(tokenizer, run.rows, run.length, drawn, tokens, run.stream_seed, run.mixture or None, run.stretch)
    batches = Ahead(stream) if device.type == "cuda" else stream
    mask = tokenizer.convert_tokens_to_ids(MASK)
    began, losses, first, marked = time.monotonic(), [], step, run.marked()
    last = min(run.steps, stop_at if stop_at is not None else run.steps)
    while step < last and (minutes is None or time.monotonic() - began < 60 * minutes):
        loss = loss_of(model, next(batches), device, run.bf16 or device.type == "cuda", step, mask)
        if not torch.isfinite(loss):
            raise LuthierError(f"practice base: the loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = run.lr * run.rate(step)
            opt.step()
            opt.zero_grad()
        step += 1
        losses.append(loss.item())
        if step in marked:
            _keep_mark(out / str(marked[step]), model, tokenizer)
        if step % every == 0 or step == last:
            save_state(out, model, opts, step, batches)
            _log(out, run, step, losses[-every:], (step - first) / (time.monotonic() - began))
    save_state(out, model, opts, step, batches)
    slow_down(model)
    if step >= run.steps:
        save_base(out / "base", model, tokenizer)
        story = {
            "tokens": batches.tokens,
            "records": batches.drawn,
            "steps": step,
            "tokens_asked": run.tokens,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "torch": torch.__version__,
            "run": asdict(run),
            "size": asdict(size),
            "families": list(stream.names),
            **(told or {}),
        }
        (out / "base" / "training.json").write_text(json.dumps(story, indent=1) + "\n")
    return losses


def _keep_mark(folder: Path, model: Any, tokenizer: Any) -> None:
    """A base of the model as it is now, whole or not at all; the model stays as it is."""
    part = folder.with_name(folder.name + ".part")
    save_base(part, copy.deepcopy(model), tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def save_base(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the base as a plain Hugging Face folder in bf16. The model itself becomes bf16 by it."""
    from transformers import GenerationConfig

    if model.can_generate():
        model.generation_config = GenerationConfig(
            max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _same_run(out: Path, run: Run, size: Size, told: Mapping[str, Any]) -> None:
    """The length of the run may change until it decays; all else must be as it was."""
    path = out / "run.json"
    now = {"run": asdict(run), "size": asdict(size), "told": dict(told)}
    if path.is_file():
        before = json.loads(path.read_text())
        differs = [
            f"{part}.{key}: {before[part].get(key)} before, {value} now"
            for part in now
            for key, value in now[part].items()
            if key != "tokens" and before[part].get(key) != value
        ]
        if differs:
            raise LuthierError(f"practice base: {out} holds another run ({'; '.join(differs)}); choose another --out")
    path.write_text(json.dumps(now, indent=1) + "\n")


def _log(out: Path, run: Run, step: int, losses: list[float], pace: float) -> None:
    tokens = run.rows * run.length
    line = {
        "step": step,
        "of": run.steps,
        "tokens": step * tokens,
        "loss": round(sum(losses) / len(losses), 4),
        "tokens_per_second": round(pace * tokens),
        "threads": torch.get_num_threads(),
    }
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
