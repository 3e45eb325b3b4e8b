"""The ground: what a form is, the registries, and the artefact. Torch is imported only by what needs it."""

from luthier.delta.compression import Change, Compression, Small
from luthier.delta.form import Context, Form, No, Site, State
from luthier.delta.merge import Merge, Stack
from luthier.delta.registry import (
    CHOICES,
    COMPRESSIONS,
    EDITS,
    FORMS,
    INITS,
    MERGES,
    MOVES,
    OBJECTIVES,
    OPTIMISERS,
    Registry,
)

__all__ = [
    "CHOICES",
    "COMPRESSIONS",
    "EDITS",
    "FORMS",
    "INITS",
    "MERGES",
    "MOVES",
    "OBJECTIVES",
    "OPTIMISERS",
    "Change",
    "Compression",
    "Context",
    "Form",
    "Merge",
    "No",
    "Registry",
    "Site",
    "Small",
    "Stack",
    "State",
]
