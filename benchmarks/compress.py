"""What compressions take and lose, and what packed products cost. Prints tables and writes JSON.

    python benchmarks/compress.py delta DELTA --calibration practice:translate --out /tmp/practice.json
    python benchmarks/compress.py pair --out /tmp/pair.json         a random base and tuned model of 109 M parameters
    python benchmarks/compress.py shape 7b --out /tmp/shape.json    file sizes of a 7 B model, a tensor at a time
    python benchmarks/compress.py products --out /tmp/products.json

`shape` compresses a random matrix of each shape for real and counts bytes for all of that shape: sizes follow from
shapes alone, but for Golomb codes, whose length varies by less than 0.1 % between draws. Of DeltaZip only the square
shape is run, of Delta-CoMe none (minutes each): the other sizes are the form's own. `ran` lists what was run. With --audit,
`delta` also measures what each method gives, by the audit section of the delta's own plan. One thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from luthier.delta import COMPRESSIONS, FORMS, Change, Site, State

ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("BitDelta, scales tuned", "bitdelta", {}, "> 10x of the file, 16x of the matrices"),
    ("ComPEFT, 5 %", "compeft", {"density": 0.05}, "8x to 50x"),
    ("ComPEFT, 20 %", "compeft", {"density": 0.2}, "8x to 50x"),
    ("DeltaZip, 2 bits", "deltazip", {"bits": 2}, "6x to 8x of the file"),
    ("DeltaZip, 4 bits", "deltazip", {"bits": 4}, "6x to 8x of the file"),
    ("Delta-CoMe, 1 bit", "delta-come", {}, "16x of the matrices"),
    ("SVD, rank 16", "svd", {"rank": 16}, ""),
]
"""Label, method, settings, what the paper reports."""
COUNTED = {"deltazip": "two-four", "delta-come": "mixed-bits"}
"""Methods of which `shape` runs the square matrix at most, and counts the other shapes from the form."""
SHAPES = {
    "7b": (4096, 11008, 32, 4096, 32000),
    "13b": (5120, 13824, 40, 5120, 32000),
    "100m": (768, 2048, 12, 768, 16000),
}
"""hidden, ffn, layers, width of keys and values, vocabulary; head apart from the embedding, as in Llama 2."""


def shape(name: str) -> Iterator[dict[str, Any]]:
    """Bytes of the delta file of every method for a model of this shape."""
    hidden, ffn, layers, kv, vocabulary = SHAPES[name]
    matrices = {
        "self_attn.q_proj": ("attn.q", hidden, hidden),
        "self_attn.k_proj": ("attn.k", kv, hidden),
        "self_attn.v_proj": ("attn.v", kv, hidden),
        "self_attn.o_proj": ("attn.o", hidden, hidden),
        "mlp.gate_proj": ("ffn.gate", ffn, hidden),
        "mlp.up_proj": ("ffn.up", ffn, hidden),
        "mlp.down_proj": ("ffn.down", hidden, ffn),
    }
    exact = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    exact |= {
        f"model.layers.{n}.{k}.weight": (hidden,)
        for n in range(layers)
        for k in ("input_layernorm", "post_attention_layernorm")
    }
    exact |= {"model.norm.weight": (hidden,)}
    inside = sum(o * i for _, o, i in matrices.values()) * layers
    parameters = inside + sum(_size(s) for s in exact.values())
    for label, method, settings, paper in ROWS:
        began, header, packed = time.perf_counter(), {}, 0
        made: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        ran: list[list[int]] = []
        for _, o, i in matrices.values():
            if (o, i) not in made:
                real = method not in COUNTED or (o == i and method != "delta-come")
                made[(o, i)] = _stored(method, settings, o, i) if real else _built(method, settings, o, i)
                ran += [[o, i]] if real else []
                if real and method in COUNTED:
                    assert _sizes(made[(o, i)]) == _sizes(_built(method, settings, o, i))
        for n in range(layers):
            for place, (_, o, i) in matrices.items():
                for key, t in made[(o, i)].items():
                    header[f"{method}/model.layers.{n}.{place}/{key}"] = _entry(t.dtype, t.shape, packed)
                    packed += t.numel() * t.element_size()
        at = packed
        for key, size in exact.items():
            header[f"kept-bfloat16/{key}/p/bits"] = _entry(torch.int16, size, at)
            at += 2 * _size(size)
        text = len(json.dumps(header | {"__metadata__": {"format": "luthier"}}, separators=(",", ":")))
        file = at + 8 + -(-text // 8) * 8
        row = {
            "label": label, "settings": settings, "paper": paper, "parameters": parameters,
            "matrices_bits": 8 * packed / inside, "matrices_ratio": 16 * inside / (8 * packed),
            "file_bytes": file, "file_bits": 8 * file / parameters, "file_ratio_16": 2 * parameters / file,
            "ran": ran, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        _say(f"{label}: {row['matrices_bits']:.3f} bits, file {row['file_ratio_16']:.2f}x")
        yield row


def _stored(method: str, settings: dict[str, Any], d_out: int, d_in: int) -> dict[str, torch.Tensor]:
    """One random matrix of a shape, compressed; its tensors as they lie on disk."""
    g = torch.Generator().manual_seed(d_out + d_in)
    base = torch.randn(d_out, d_in, generator=g) * 0.02
    change = torch.randn(d_out, d_in, generator=g) * 1e-3
    site = Site("w", "ffn.up", 0, "linear", d_in, d_out)
    small = COMPRESSIONS.make(method, settings).compress(Change(site, base, change, None, g))
    p, fixed = small.form.stored(site, small.p, small.fixed)
    return {f"p/{k}": v for k, v in p.items()} | {f"fixed/{k}": v for k, v in fixed.items()}


def _sizes(made: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {k: (t.dtype, t.shape) for k, t in made.items()}


def _built(method: str, settings: dict[str, Any], d_out: int, d_in: int) -> dict[str, torch.Tensor]:
    """The same as the form alone says, for methods whose sizes follow from the shape."""
    site = Site("w", "ffn.up", 0, "linear", d_in, d_out)
    p, fixed = FORMS.make(COUNTED[method], settings).build(site, torch.Generator().manual_seed(0))
    return {f"p/{k}": v for k, v in p.items()} | {f"fixed/{k}": v for k, v in fixed.items()}


def _entry(dtype: torch.dtype, size: Any, at: int) -> dict[str, Any]:
    from luthier.delta.stream import NAMES

    n = _size(size) * torch.empty(0, dtype=dtype).element_size()
    return {"dtype": NAMES[dtype], "shape": list(size), "data_offsets": [at, at + n]}


def _size(size: Any) -> int:
    n = 1
    for k in size:
        n *= k
    return n


def of_delta(source: list[str], text: str, more: list[str], audits: list[str] | None) -> Iterator[dict[str, Any]]:
    """Every method on one delta or pair: sizes, errors, logits and the audit."""
    from luthier.verbs.audit import audit
    from luthier.verbs.compress import compress

    for label, method, settings, paper in ROWS:
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            overrides = [*(f"{k}={v}" for k, v in settings.items()), *more]
            found = compress(*source, method=method, overrides=overrides, calibration=text, out=Path(place) / "d")
            row = {"label": label, "settings": settings, "paper": paper, "seconds": time.perf_counter() - began}
            row |= {k: found.report[k] for k in ("total", "logits", "roles", "tries", "parameters")}
            if audits is not None:
                measured = audit(Path(place) / "d", overrides=audits, out=Path(place) / "a").report["audit"]
                row["audit"] = {
                    "checks": [{k: c.get(k) for k in ("name", "group", "before", "after")} for c in _checks(measured)],
                    "verdict": measured["verdict"]["line"],
                }
            total = row["total"]
            _say(f"{label}: {total['matrices_bits']:.3f} bits, file {total['file_bits']:.2f}, logits {row['logits']}")
            if audits is not None:
                _say(f"    {row['audit']['verdict']}")
            yield row


def _checks(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return [c | {"group": g} for g in ("target", "guards", "shifted") for c in measured.get(g, [])]


def pair(place: Path) -> list[str]:
    """A random base and a tuned model of 109 M parameters in bfloat16, with the practice base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.bases.locate import locate
    from luthier.bases.tokens import load_tokenizer
    from luthier.plan.schema import BaseSpec

    hidden, ffn, layers, _, vocabulary = SHAPES["100m"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=12,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    words = load_tokenizer(locate(BaseSpec.model_validate({"name": "practice"})), False)
    for name in ("base", "tuned"):
        if name == "tuned":
            with torch.no_grad():
                for p in model.parameters():
                    change = torch.randn(p.shape) * 1e-3
                    if p.dim() == 2:  # a falling spectrum over noise, as full tunes have
                        left = torch.randn(len(p), 32) * torch.logspace(0, -1, 32)
                        change += left @ torch.randn(32, p.shape[1]) * 1e-3
                    p.add_(change.to(p.dtype))
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    return [str(place / "base"), str(place / "tuned")]


def products() -> Iterator[dict[str, Any]]:
    """Milliseconds of x Mᵀ: dense float32 and bfloat16, and each packed form; best of 7."""
    for size in (1024, 4096):
        site = Site("w", "ffn.up", 0, "linear", size, size)
        g = torch.Generator().manual_seed(0)
        dense = torch.randn(size, size, generator=g)
        for name in ("signs", "ternary", "two-four", "mixed-bits", "lora"):
            form = FORMS.make(name, {})
            p, fixed = form.build(site, g)
            state = State(site, p, fixed, lambda w=dense: w)
            taken = sum(t.numel() * t.element_size() for t in [*p.values(), *fixed.values()])
            for n in (1, 8, 64, 512):
                x = torch.randn(n, size, generator=g)
                row = {"form": name, "size": size, "positions": n, "memory_bits": 8 * taken / size**2}
                row |= {"ms": _best(form.change, x, x, state), "dense_ms": _best(torch.matmul, x, dense.t())}
                _say(str(row))
                yield row


@torch.no_grad()
def _best(run: Any, *given: Any) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        run(*given)
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=["delta", "pair", "shape", "products"])
    parser.add_argument("of", nargs="?", default="7b", help="a delta folder, or a shape: " + ", ".join(SHAPES))
    parser.add_argument("--calibration", default="practice:translate")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the plan for every method, as tokens=1024")
    parser.add_argument("--only", nargs="*", default=[], help="methods by name; default all")
    parser.add_argument("--audit", nargs="*", help="audit each delta; overrides of its plan, as audit.items=30")
    args = parser.parse_args()
    ROWS[:] = [row for row in ROWS if not args.only or row[1] in args.only]
    with tempfile.TemporaryDirectory(prefix="pair-") as place:
        if args.what == "shape":
            rows = shape(args.of)
        elif args.what == "products":
            rows = products()
        elif args.what == "delta":
            rows = of_delta([args.of], args.calibration, args.set, args.audit)
        else:
            rows = of_delta(pair(Path(place)), args.calibration, args.set, None)
        done: list[dict[str, Any]] = []
        for row in rows:  # what is done is written, should the rest be cut short
            done.append(row)
            _write(args.out, done)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    told = {
        "command": " ".join(["python", "benchmarks/compress.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "rows": rows,
    }  # fmt: skip
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
