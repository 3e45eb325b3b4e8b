"""What structured compression leaves of the practice base, beside LoRA and full tuning: size, operations, logits, answers.

    python benchmarks/smaller.py [--only LABEL …] [--set KEY=VALUE …] [--skip N] [--folder DIR] [--out smaller.json]

A row is trained by its recipe, folded, made physically smaller by `luthier.bases.recast`, held against the model that it
comes from, rounded to 16 bits and measured. --set overrides the recipe of every row (rates, by a chain's stage names
where it is one), --skip leaves out the first N records of every test split, as for choosing rates on others than those
reported, and --folder keeps what was trained and takes what is there. One thread unless OMP_NUM_THREADS says otherwise.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from luthier.algebra.calibrate import Text, apart, logits, loss, read_text
from luthier.attach import attached
from luthier.bases.load import Base, load_base
from luthier.bases.recast import drop_channels, factor, live_channels, shrink
from luthier.bridge.target import logits_of
from luthier.delta.artefact import Delta
from luthier.measuring.audit import respond
from luthier.measuring.checks import compare
from luthier.measuring.sources import prepare_checks
from luthier.parts.structure import Compact
from luthier.plan.schema import AuditSpec, BaseSpec, SourceSpec
from luthier.plan.stages import is_chain, load_stages
from luthier.training.certificate import versions
from luthier.verbs.load import load
from luthier.verbs.stages import run_stages
from luthier.verbs.tune import tune

RECIPES = Path(__file__).parents[1] / "luthier" / "recipes"
TASK, GUARDS = "practice:translate", ("practice:facts", "practice:lists")
BASE = BaseSpec.model_validate({"name": "practice", "dtype": "float32"})


@dataclass(frozen=True)
class Row:
    """One model: the recipe that trains it, with changes, and how it is made smaller."""

    label: str
    recipe: str
    how: str = "whole"
    """whole: as it is; gates: `shrink`; channels: `drop_channels`; factors: `factor`."""
    changes: tuple[str, ...] = ()
    beside: str = ""
    """Label of the tune of the whole base from whose logits its own are measured."""
    between: bool = True
    """Of a chain: its first stage; without it the second starts from what the form draws."""


FULL, LORA = "full tuning", "LoRA, rank 20"
STEPS = "train.steps=600"
BOTH = "delta=[{{form: gates, target: {}, lr: 1.0e-2}}, {{form: lora, rank: 4, lr: 4.0e-3}}]"


def _rows() -> list[Row]:
    rows = [
        Row(FULL, "pat.yaml", changes=("delta=[{choice: full}]", "train.lr=7.0e-4")),
        Row(LORA, "pat.yaml", changes=("delta=[{form: lora, rank: 20, alpha: 4, lr: 8.0e-3}]",)),
    ]
    for k in (0.9, 0.75):
        rows.append(Row(f"PAT, keep {k}", "pat.yaml", "channels", (f"delta.0.keep={k}",), LORA))
    for t in (0.1, 0.2, 0.3):
        rows.append(Row(f"FineGates and LoRA, {t}", "finegates.yaml", "gates", (BOTH.format(t), STEPS), LORA))
        told = (f"delta.0.target={t}", 'data.train.0.path="practice:lists"', STEPS)
        rows.append(Row(f"FineGates, {t}, told lists", "finegates.yaml", "gates", told))
    for f in (1.5, 2.0):
        changes = (f"thin.factor={f}", f"tuned.delta.factor={f}", f"tuned.{STEPS}")
        rows.append(Row(f"PELA, {f}", "pela.yaml", "factors", changes, FULL))
        rows.append(Row(f"SVD alone, {f}", "pela.yaml", "factors", changes, FULL, between=False))
    return rows


def train(row: Row, more: Sequence[str], place: Path) -> Path:
    """The row's delta, trained into a folder, or found there."""
    recipe, changes = RECIPES / row.recipe, [*row.changes, *more]
    chain = is_chain(recipe)
    done = place / "tuned" if chain and row.between else place
    if (done / "delta.safetensors").exists():
        return done
    if not chain:
        tune(recipe, overrides=[*changes, "audit.enabled=false"], out=place, progress=False)
    elif row.between:
        run_stages(recipe, overrides=[*changes, "tuned.audit.enabled=false"], out=place, progress=False)
    else:
        plan = next(s for s in load_stages(recipe, [*changes, "tuned.audit.enabled=false"]) if s.name == "tuned")
        plan.settings["delta"][0].pop("start_from")
        tune(plan.settings, out=place, progress=False)
    return done


def recast(row: Row, folder: Path, ids: torch.Tensor) -> tuple[Base, torch.Tensor]:
    """The smaller base in float32, and the logits of the model with the delta attached."""
    delta, small = Delta.load(folder), load_base(BASE)
    model = load(BASE, delta, check=False)
    masked = logits(logits_of(model), ids)
    attached(model).fold()
    small.model.load_state_dict({n: p for n, p in model.named_parameters() if ".luthier." not in n}, strict=False)
    if row.how == "channels":
        drop_channels(small.model, small.roles, live_channels(small.model, small.roles))
    elif row.how == "gates":
        shrink(small.model, small.roles)
    elif row.how == "factors":
        factors = {k: (t["A"], t["B"]) for p in delta.pieces for k, t in p.p.items() if "A" in t}
        factor(small.model, factors)
    return small, masked


@torch.no_grad()
def rounded(model: Any) -> None:
    """Every number as a 16-bit file holds it."""
    for p in model.parameters():
        p.copy_(p.to(torch.bfloat16).float())


def size(base: Base, ids: torch.Tensor) -> dict[str, float]:
    """Parameters of the layers' matrices and of all, bytes of a 16-bit file (with the places of what `shrink` kept),
    operations of a pass over a row of text, and its time."""
    model = base.model
    names = [p.module for p in base.roles.parts if p.layer is not None and p.kind == "linear"]
    places = sum(len(m.inputs) + len(m.outputs) for m in model.modules() if isinstance(m, Compact))  # pyright: ignore
    every, run = sum(p.numel() for p in model.parameters()), logits_of(model)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        run(ids[:1])
    times = []
    for _ in range(7):
        began = time.perf_counter()
        run(ids)
        times.append(time.perf_counter() - began)
    return {
        "matrices": sum(p.numel() for n in names for p in model.get_submodule(n).parameters()), "parameters": every,
        "bytes": 2 * (every + places), "operations": counted.get_total_flops(), "ms": 1e3 * min(times),
    }  # fmt: skip


class Examination:
    """The same items and text for every model, with the base's own answers."""

    def __init__(self, skip: int, items: int) -> None:
        base = load_base(BASE)
        sources = [{"source": {"path": p, "split": "test", "skip": skip}} for p in (TASK, *GUARDS)]
        spec = AuditSpec.model_validate({"target": sources[:1], "guards": sources[1:], "items": items})
        source = SourceSpec.model_validate({"path": TASK, "split": "test", "limit": 100, "skip": skip})
        self.text: Text = read_text([source], base.tokenizer, "causal", 2048, 128)
        self.checks = prepare_checks(base, spec)
        self.size = size(base, self.text.ids)
        self.logits: dict[str, torch.Tensor] = {"base": logits(logits_of(base.model), self.text.ids)}
        self.before = [respond(base, check, 32) for check in self.checks]
        self.loss = loss(logits_of(base.model), self.text)

    def of(self, row: Row, small: Base, masked: torch.Tensor) -> dict[str, Any]:
        """Everything that is told of a model; it is rounded to 16 bits on the way."""
        run, ids = logits_of(small.model), self.text.ids
        found: dict[str, Any] = {"gap": float((logits(run, ids) - masked).abs().max())}
        rounded(small.model)
        found |= size(small, ids)
        found["shares"] = {k: found[k] / self.size[k] for k in self.size}
        self.logits[row.label] = logits(run, ids)
        others = {k: self.logits[k] for k in ("base", row.beside) if k in self.logits}
        found["logits"] = {k: apart(run, ids, wanted) for k, wanted in others.items()}
        found["loss"] = loss(run, self.text)
        found["answers"] = {}
        for check, was in zip(self.checks, self.before, strict=True):
            now = respond(small, check, 32)
            result = compare(check.name, check.kind, check.metric, check.items, was, now, samples=0)
            found["answers"][check.name] = {k: getattr(result, k).to_dict() for k in ("before", "after")}
        return found


def told(label: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    s, answers = row["shares"], row["answers"]
    after = "  ".join(f"{k} {a['after']['value']:.0%} ({a['before']['value']:.0%})" for k, a in answers.items())
    apart_ = "  ".join(f"{v:.3f} from {k}" for k, v in row["logits"].items())
    return (
        f"{label:26s} matrices {s['matrices']:.3f}  all {s['parameters']:.3f}  bytes {s['bytes']:.3f}  "
        f"operations {s['operations']:.3f}  ms {s['ms']:.2f}  gap {row['gap']:.1e}  logits {apart_}  "
        f"loss {row['loss']:.3f}  {after}  [{row['seconds']:.0f} s]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = _rows()
    parser.add_argument("--only", nargs="*", default=[r.label for r in rows], help="labels, or their beginnings")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every row's recipe, as train.lr=1e-3")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    exam = Examination(args.skip, args.items)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="smaller-") as scratch:
        for row in [r for r in rows if r.label.startswith(tuple(args.only))]:
            began = time.perf_counter()
            place = (args.folder or Path(scratch)) / row.label.replace(" ", "-").replace(",", "")
            folder = train(row, args.set, place)
            seconds = time.perf_counter() - began
            found = exam.of(row, *recast(row, folder, exam.text.ids)) | {"seconds": seconds, "changes": row.changes}
            table[row.label] = found
            print(told(row.label, found), flush=True)
    result = {
        "command": "python benchmarks/smaller.py", "date": time.strftime("%Y-%m-%d"), "versions": versions(),
        "base": {**exam.size, "loss": exam.loss}, "set": args.set, "rows": table,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
