"""Merges of small tensors with settings of every kind, for mergekit and for luthier alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One merge of drawn tensors."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shape: tuple[int, ...] = (20, 28)
    dtype: torch.dtype = torch.float32
    models: int = 3
    baseless: bool = False
    stored: torch.dtype = torch.float32
    """Type that the inputs were rounded to before."""
    spread: float = 0.003
    """Deviation of the changes; that of the weights is 0.02."""


def inputs(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Base and models, seeded by the shape; a third of the entries of each change are 0."""
    seed = hashlib.sha256(repr((case.shape, case.models, case.spread)).encode()).digest()
    g = torch.Generator().manual_seed(int.from_bytes(seed[:4], "big"))
    base = torch.randn(case.shape, generator=g) * 0.02
    moved = [torch.randn(case.shape, generator=g) * case.spread for _ in range(case.models)]
    models = [base + d * (torch.rand(case.shape, generator=g) > 0.3) for d in moved]
    return base.to(case.stored).to(case.dtype), [x.to(case.stored).to(case.dtype) for x in models]


def tied() -> Tensor:
    """Numbers of which many are equal: which of them a sort puts first depends on the processor's instructions."""
    return torch.randint(0, 20, (560,), generator=torch.Generator().manual_seed(0)).float()


W, D = {"weight": [0.3, 0.5, 0.9]}, {"density": [0.3, 0.5, 0.8]}
THIN: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [
    ({}, {**W, **D}),
    ({"normalize": True, "lambda_": 0.7, "int8_mask": True}, {"weight": [1.0, -0.4, 0.3], **D}),
    ({"normalize": False, "rescale": True}, {"weight": [0.4] * 3, "density": [0.2] * 3}),
    ({"rescale": False, "normalize": True}, {"weight": [0.4] * 3, "density": [1.0] * 3}),
]
ROWS: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "task_arithmetic": [({}, W), ({"normalize": True, "lambda_": 0.6}, W)],
    "ties": THIN,
    "breadcrumbs": [*THIN, ({}, {**W, "density": [0.9] * 3, "gamma": [0.2, 0.05, 0.0]})],
    "breadcrumbs_ties": THIN,
    "dare_linear": THIN,
    "dare_ties": THIN,
    "della": [*THIN[:2], ({}, {**W, "density": [0.5] * 3, "epsilon": [0.3, 0.1, 0.05]})],
    "della_linear": THIN[:2],
    "linear": [({}, W), ({"normalize": False}, {"weight": [0.3, 0.5, -0.1]})],
    "slerp": [({"t": t}, {}) for t in (0.0, 0.3, 1.0)],
    "nuslerp": [
        ({}, {"weight": [0.3, 0.6]}),
        ({"nuslerp_flatten": False}, {"weight": [1.0, 0.6]}),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": [1.0, 0.6]}),
    ],
    "multislerp": [({}, W), ({"normalize_weights": False}, {"weight": [0.3, 0.3, 0.4]})],
    "karcher": [({}, {}), ({"max_iter": 3, "tol": 1e-3}, {})],
    "sce": [({}, {}), ({"select_topk": 0.3, "int8_mask": True}, {})],
    "model_stock": [({}, {}), ({"filter_wise": True}, {})],
    "nearswap": [({"t": 0.001}, {})],
    "arcee_fusion": [({}, {})],
    "passthrough": [({}, {"scale": [0.3]})],
    "ram": [({}, {}), ({"epsilon": 0.001}, {})],
    "ramplus_tl": [({}, {}), ({"epsilon": 0.002, "r": 0.3}, {})],
}
COUNT = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1, "nuslerp": 2}
BASELESS = {"linear", "karcher", "passthrough"}


def _cases() -> dict[str, Case]:
    out = {}
    for method, rows in ROWS.items():
        for k, (settings, each) in enumerate(rows):
            known = {"breadcrumbs": ("gamma",), "breadcrumbs_ties": ("gamma",)}.get(method, ())
            own = {**each, **({"gamma": [0.1, 0.05, 0.01]} if known and "gamma" not in each else {})}
            case = {"models": COUNT.get(method, 3), "baseless": method in BASELESS}
            for kind, dtype in DTYPES.items():
                out[f"{method}-{k}-{kind}"] = Case(method, settings, own, dtype=dtype, **case)
            stored = torch.bfloat16
            out[f"{method}-{k}-mixed"] = Case(method, settings, own, stored=stored, shape=(37,), spread=0.02, **case)
        if method in ("nuslerp", "multislerp"):
            out[f"{method}-baseless"] = Case(method, {}, rows[0][1], models=COUNT.get(method, 3), baseless=True)
    return out


CASES = _cases()
