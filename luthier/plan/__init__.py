"""The plan: what a run is, typed and complete."""

from luthier.plan.schema import Plan

__all__ = ["Plan"]
