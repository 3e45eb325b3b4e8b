"""Plans of `luthier port` and `luthier assemble`; a move's own settings stand beside the keys named here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from luthier.errors import LuthierError, nearest
from luthier.plan.load import override, read_plan
from luthier.plan.places import kind_of
from luthier.plan.problems import first_problem
from luthier.plan.schema import BaseSpec, Section, SourceSpec
from luthier.plan.yaml import expand

T = TypeVar("T", bound=BaseModel)


class ConnectivitySpec(Section):
    """Whether the loss has a barrier between two bases."""

    text: SourceSpec | None = Field(
        None, description="Records on which the loss is measured; default text that both bases write themselves."
    )
    items: int = Field(64, ge=1, description="Most records, or texts written.")
    points: int = Field(5, ge=3, description="Places on the line between the bases, both ends among them.")
    tolerance: float = Field(
        0.02, ge=0, description="Largest barrier, in nats a token, of two bases that are connected."
    )

    @field_validator("text", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value, "split": "test"} if isinstance(value, str) else value


class PortSpec(BaseModel):
    """A delta onto another base."""

    model_config = ConfigDict(extra="allow")

    delta: str = Field(..., description="Delta folder or PEFT folder.")
    onto: BaseSpec = Field(..., description="The new base by name or folder; a delta folder means the model it makes.")
    base: BaseSpec | None = Field(None, description="The old base, where it is not the one that the delta names.")
    method: str = Field("portllm", description="Move by name.")
    connectivity: bool | ConnectivitySpec | None = Field(
        None, description="Look for a barrier between the bases; default as the move says."
    )

    @field_validator("onto", "base", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def settings(self) -> dict[str, Any]:
        """The move's own settings."""
        return dict(self.__pydantic_extra__ or {})


class MemberSpec(Section):
    """One model of an assembly: a base with deltas on it."""

    base: BaseSpec | None = Field(None, description="Base by name or folder; default the one that its deltas name.")
    deltas: list[str] = Field([], description="Delta or PEFT folders on it, in this order.")

    @field_validator("base", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("deltas", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def places(self) -> list[str]:
        """Names and folders that are read."""
        return [*([self.base.name] if self.base else []), *self.deltas]


def _member(value: Any) -> Any:
    """A name or folder stands for a base, or for a delta on the base that it names."""
    if not isinstance(value, str):
        return value
    return {"deltas": [value]} if kind_of(value) in ("delta", "adapter") else {"base": value}


class PairSpec(Section):
    """A small model after its tuning, and before."""

    expert: MemberSpec = Field(..., description="The tuned one.")
    base: MemberSpec | None = Field(None, description="The same untuned; default the base of the expert's deltas.")

    @field_validator("expert", "base", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return _member(value)


class AssembleSpec(BaseModel):
    """Small models that steer a large one."""

    model_config = ConfigDict(extra="allow")

    large: MemberSpec = Field(..., description="The model that is steered.")
    pairs: list[PairSpec] = Field(..., min_length=1, description="Expert and base, one pair or several.")
    method: str = Field("proxy", description="Move by name.")

    @field_validator("large", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return _member(value)

    @field_validator("pairs", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        value = [value] if isinstance(value, (str, Mapping)) else value
        return [{"expert": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @property
    def settings(self) -> dict[str, Any]:
        """The fusion's own settings."""
        return dict(self.__pydantic_extra__ or {})


def load_moving(model: type[T], source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """The checked plan of a port or an assembly, from a YAML file or its content. Errors: one line with file and key.

    `expert:` and `base:` beside `large:` are short for one pair. The move's own settings are checked by whoever makes it.
    """
    where, raw = ("plan", dict(source)) if isinstance(source, Mapping) else read_plan(source)
    raw = expand(raw, "")
    if model is AssembleSpec and "expert" in raw and "pairs" not in raw:
        raw["pairs"] = [{k: raw.pop(k) for k in ("expert", "base") if k in raw}]
    own = {k: raw.pop(k) for k in ("delta",) if isinstance(raw.get(k), str)}  # a folder here, in a run's plan a form
    for text in overrides:
        override(raw, text)
    raw = own | raw
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        for row in e.errors():  # of a section of ours, whose keys the run's plan does not know
            if row["type"] == "extra_forbidden":
                key = str(row["loc"][-1])
                path = ".".join(str(part) for part in row["loc"] if isinstance(part, str) and part[0].islower())
                known = sorted({n for m in (ConnectivitySpec, MemberSpec, PairSpec, BaseSpec) for n in m.model_fields})
                raise LuthierError(f"{where}: {path}: unknown key: {nearest(key, known, 'key')}") from e
        raise LuthierError(f"{where}: {first_problem(e, raw)}") from e
