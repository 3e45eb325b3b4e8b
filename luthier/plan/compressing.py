"""Plans of `luthier compress`; the method's own settings stand beside the keys named here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from luthier.errors import LuthierError
from luthier.plan.calibration import Calibrated
from luthier.plan.load import override, read_plan
from luthier.plan.problems import first_problem
from luthier.plan.schema import BaseSpec
from luthier.plan.yaml import expand


class CompressSpec(Calibrated):
    """A delta, or a base and a tuned checkpoint, in a smaller form."""

    model_config = ConfigDict(extra="allow")

    delta: str | None = Field(None, description="Delta or PEFT folder whose change is compressed.")
    base: BaseSpec | None = Field(None, description="The base; default the one that the delta names.")
    tuned: str | None = Field(None, description="A tuned checkpoint of the base, instead of a delta.")
    method: str = Field("bitdelta", description="Compression by name.")
    sites: list[str] = Field(["linear"], description="Roles or name patterns of the matrices to compress.")
    except_: list[str] = Field([], alias="except", description="Roles or name patterns to leave out.")
    embeddings: Literal["keep", "compress", "drop"] = Field(
        "keep", description="What becomes of the change of embedding and head: exact, compressed, or none."
    )
    rest: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of every other change (norms, biases, matrices left out): exact, or none."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type the tuned weights are rounded to first; what is kept is stored in it. auto: as they are.",
    )
    tune: bool | None = Field(None, description="Tune scales (or all numbers) on the text; default as the method says.")
    steps: int = Field(100, ge=1, description="Steps of that.")
    batch_size: int = Field(4, ge=1, description="Rows in a step.")
    lr: float = Field(0.01, gt=0, description="Its learning rate, as a share of each number's size.")
    probes: bool = Field(True, description="Load the base for probes and logits; off, tensors go through one by one.")
    seed: int = Field(0, ge=0, description="Of draws and orders.")

    @field_validator("base", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("sites", "except_", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> CompressSpec:
        if self.delta is not None and self.tuned is not None:
            raise ValueError("state either a delta, or a base and a tuned checkpoint")
        if self.delta is None and self.base is None:
            raise ValueError("state a delta, or a base and a tuned checkpoint")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.__pydantic_extra__ or {})


def load_compressing(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> CompressSpec:
    """The checked plan, from a YAML file or its content. Errors: one line with file and key."""
    where, raw = ("plan", dict(source)) if isinstance(source, Mapping) else read_plan(source)
    raw = expand(raw, "")
    for text in overrides:
        held = raw.pop("delta", None)  # a folder here, where a run's plan means forms
        override(raw, text)
        if held is not None:
            raw.setdefault("delta", held)
    try:
        return CompressSpec.model_validate(raw)
    except ValidationError as e:
        raise LuthierError(f"{where}: {first_problem(e, raw)}") from e
