"""A loop that anyone could write: lengths sorted, logits at supervised tokens only, a low-rank addition in one product.

An arm of benchmarks/train.py. It has no report, no checks, no checkpoint and no resuming: what these cores give to the
arithmetic alone, through transformers' own model.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch


class LowRank(torch.nn.Module):
    """y = W x + (alpha / r) B A x, the addition fused into its second product; alpha = r."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.A = torch.nn.Parameter(torch.randn(rank, linear.in_features, device=device) / linear.in_features**0.5)
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, flat = self.linear(x), x.flatten(0, -2)
        inner = flat @ self.A.T.to(x.dtype)
        return torch.addmm(y.flatten(0, -2), inner, self.B.T.to(x.dtype)).view_as(y)


def plain_arm(
    folder: Path, what: str, kind: str, length: int, sites: list[str], rank: int, gpu: bool
) -> dict[str, Any]:
    """Seconds, tokens, peak bytes and losses of one pass, batch 8, AdamW at 2e-4, gradients clipped to 1."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.bases.hardware import peak_memory, reset_peak, resident_memory, set_malloc, synchronise

    set_malloc()
    device = torch.device("cuda" if gpu else "cpu")
    imported = resident_memory()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    low = what == "lora"
    held = torch.bfloat16 if kind == "bf16" and low else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=held).to(device).train()
    if low:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if name.rsplit(".", 1)[-1] in sites:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, LowRank(module, rank))
    rows = []
    for line in (folder / "records.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        prompt, answer = (tokenizer(record[k])["input_ids"] for k in ("prompt", "completion"))
        rows.append(((prompt + answer + [tokenizer.eos_token_id])[:length], len(prompt)))
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    random.Random(0).shuffle(batches)
    moved = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moved, lr=2e-4, weight_decay=0.0)
    losses: list[float] = []
    synchronise(device)
    reset_peak(device)
    started = time.perf_counter()
    for batch in batches:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch], device=device)
        told = torch.tensor([[start <= t < len(row) for t in range(width)] for row, start in batch], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16" and not low):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][told[:, 1:]]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][told[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    synchronise(device)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(len(ids) for ids, _ in rows),
        "peak": peak_memory(device) - (0 if gpu else imported),
        "losses": losses,
    }
