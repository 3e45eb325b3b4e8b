"""The ground: what a form is, the registries, and the artefact. Torch is imported only by what needs it."""

from luthier.delta.form import Context, Form, No, Site, State
from luthier.delta.registry import CHOICES, FORMS, INITS, OBJECTIVES, OPTIMISERS, Registry

__all__ = [
    "CHOICES",
    "FORMS",
    "INITS",
    "OBJECTIVES",
    "OPTIMISERS",
    "Context",
    "Form",
    "No",
    "Registry",
    "Site",
    "State",
]
