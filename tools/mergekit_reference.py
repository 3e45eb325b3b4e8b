"""Makes tests/numbers/mergekit.safetensors: what mergekit itself gives for small tensors, one case a key.

    pip install --no-deps mergekit==0.1.5   (in an environment of its own that also has torch, transformers, pydantic)
    python tools/mergekit_reference.py      (with luthier importable: the random masks are ours, the rest mergekit's)

The inputs are drawn anew by the test from the same seeds; the file holds the outputs, and each case's settings.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.numbers.merge_cases import CASES, inputs, tied  # noqa: E402


class OurDraws:
    """torch, but for its Bernoulli draws: those of luthier, so that mergekit masks what luthier masks."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def bernoulli(self, p: torch.Tensor) -> torch.Tensor:
        from luthier.parts.draws import Coin, Draw

        flat = p.reshape(-1)
        if bool((flat != flat[0]).any()):
            return (Draw(self.generator).uniform(0, len(flat)).view(p.shape) < p).to(p.dtype)
        return Coin(float(flat[0]), self.generator).apply(0, torch.ones_like(flat)).view(p.shape)


def main() -> None:
    import mergekit.sparsify
    from mergekit.merge_methods import merge_tensors

    draws = mergekit.sparsify.torch = OurDraws()
    out: dict[str, torch.Tensor] = {}
    for name, case in CASES.items():
        base, models = inputs(case)
        draws.generator.manual_seed(0)
        parameters = {k.rstrip("_"): v for k, v in {**case.settings, **case.each}.items()}
        tensors = models if case.baseless else [base, *models]
        place = {} if case.baseless else {"base_index": 0}
        out[name] = merge_tensors(tensors, case.method, parameters=parameters, dtype=case.dtype, **place).contiguous()
    out["argsort"] = torch.argsort(tied(), descending=True).to(torch.int16)
    try:
        made_by = version("mergekit")
    except PackageNotFoundError:
        made_by = "0.1.5"
    save_file(out, ROOT / "tests/numbers/mergekit.safetensors", {"mergekit": made_by, "torch": torch.__version__})
    size = sum(t.numel() * t.element_size() for t in out.values())
    sys.stdout.write(json.dumps({"cases": len(out), "bytes": size}) + "\n")


if __name__ == "__main__":
    main()
