"""The plan of a mixture assembled from dense models: mergekit-moe's files as they are, and a few keys of our own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from luthier.errors import LuthierError, nearest
from luthier.plan.load import read_plan
from luthier.plan.merge import Ref
from luthier.plan.schema import Section
from luthier.plan.yaml import expand

DRAWN = ("random", "uniform_random")
"""Gates that no prompt decides."""
Gate = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]


class Expert(Section):
    """A dense model whose feed-forward parts become one expert of every layer."""

    source_model: Ref = Field(..., description="Folder, hub name, delta folder, or NAME+ADAPTER.")
    positive_prompts: list[str] = Field([], description="Texts that should go to this expert.")
    negative_prompts: list[str] = Field([], description="Texts that should not.")
    noise_scale: float | None = Field(None, ge=0, description="Standard deviation of noise added to its weights.")
    residual_scale: float | None = Field(None, description="Factor on its output matrix.")

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        rows = [] if value is None else [value] if isinstance(value, str) else value
        blank = isinstance(rows, list) and not any(not isinstance(r, str) or r.strip() for r in rows)
        return [] if blank else rows  # [""] is how the field's files write that there is none, for gates that are drawn


class MoePlan(Section):
    """Everything an assembly is told."""

    base_model: Ref = Field(..., description="Gives attention, norms and embeddings, and reads the prompts.")
    experts: list[Expert] = Field(..., min_length=1, description="The experts, in their order.")
    shared_experts: list[Expert] = Field([], description="Experts that every token passes (Qwen2 MoE: exactly one).")
    gate_mode: Gate = Field(
        "hidden",
        description="From the last hidden state of the prompts (hidden), its mean (hidden_avg), their embeddings, or drawn.",
    )
    experts_per_token: int = Field(2, ge=1, description="Experts that a token goes to.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="Type; default the base's.")
    gate_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "bfloat16", description="Type the base is held in while it reads the prompts."
    )
    architecture: str | None = Field(None, description="mixtral, qwen2_moe or qwen3_moe; default by the models.")
    layout: Literal["modules", "fused"] = Field(
        "modules",
        description="Names on disk: one matrix an expert, as checkpoints are published, or all in one tensor.",
    )
    seed: int = Field(0, ge=0, description="Of drawn gates and noise.")
    shard: str = Field("5GB", description="Most bytes of one weight file.")

    @field_validator("shared_experts", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return [] if value is None else value

    def every(self) -> list[Expert]:
        """The experts, then the shared ones."""
        return [*self.experts, *self.shared_experts]


def load_moe(source: str | os.PathLike[str] | Mapping[str, Any] | MoePlan) -> MoePlan:
    """The checked plan of a YAML file or its content. Errors: LuthierError naming the file, the key and what was meant."""
    if isinstance(source, MoePlan):
        return source
    where, raw = ("moe", dict(source)) if isinstance(source, Mapping) else read_plan(source)
    raw = expand(raw, "")
    tables = [("", raw, MoePlan)]
    for group in ("experts", "shared_experts"):
        rows = raw.get(group) or []
        tables += [(f"{group}.{i}.", r, Expert) for i, r in enumerate(rows) if isinstance(r, Mapping)]
    for path, table, model in tables:
        if strange := [k for k in table if k not in model.model_fields]:
            known = nearest(str(strange[0]), model.model_fields, "key")
            raise LuthierError(f"{where}: {path}{strange[0]}: unknown key: {known}")
    try:
        plan = MoePlan.model_validate(raw)
    except ValidationError as e:
        row: Any = e.errors()[0]
        at = ".".join(map(str, row["loc"]))
        said = "is missing: state it" if row["type"] == "missing" else row["msg"].replace("Input should be", "must be")
        raise LuthierError(f"{where}: {at}: {said}") from e
    _sensible(plan, where)
    return plan


def _sensible(plan: MoePlan, where: str) -> None:
    if plan.experts_per_token > len(plan.experts):
        raise LuthierError(
            f"{where}: experts_per_token is {plan.experts_per_token} and there are {len(plan.experts)} experts: name more, or "
            "lower it"
        )
    if plan.gate_mode in DRAWN:
        return
    for i, expert in enumerate(plan.experts):
        if not expert.positive_prompts:
            raise LuthierError(f"{where}: experts.{i} has no positive_prompts: state some, or gate_mode: random")
    prompts = [(e.positive_prompts, e.negative_prompts) for e in plan.experts]
    if len(prompts) > 1 and all(p == prompts[0] for p in prompts[1:]):
        raise LuthierError(
            f"{where}: all experts have the same prompts, so nothing would tell them apart: state each one's own, or "
            "gate_mode: random"
        )
    if plan.shared_experts and any(
        bool(e.positive_prompts) != bool(plan.shared_experts[0].positive_prompts) for e in plan.shared_experts
    ):
        raise LuthierError(f"{where}: some shared_experts have positive_prompts and some have none: state all, or none")
