"""Calibration text in a plan: where it comes from and how much of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, field_validator

from luthier.plan.schema import SourceSpec


class Calibrated(BaseModel):
    """What every plan says that runs models on text."""

    calibration: list[SourceSpec] = Field([], description="Text to calibrate on: a file, or 'practice:FAMILY'.")
    tokens: int = Field(8192, ge=16, description="Most tokens of it.")
    length: int = Field(128, ge=8, description="Tokens in a row of it.")

    @field_validator("calibration", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        value = [value] if isinstance(value, (str, Mapping)) else value
        return [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value
