"""The same verbs for Python as on the command line: tune, load, verify, audit, generate, serve …, each imported at first use."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.delta.artefact import Delta
    from luthier.verbs.assemble import assemble
    from luthier.verbs.audit import audit
    from luthier.verbs.compress import compress
    from luthier.verbs.diff import diff
    from luthier.verbs.edit import edit
    from luthier.verbs.export import export
    from luthier.verbs.gate import gate
    from luthier.verbs.generate import generate
    from luthier.verbs.import_ import import_
    from luthier.verbs.inspect import inspect
    from luthier.verbs.load import load
    from luthier.verbs.merge import merge
    from luthier.verbs.port import port
    from luthier.verbs.rebase import rebase
    from luthier.verbs.serve import serve
    from luthier.verbs.tune import tune
    from luthier.verbs.verify import verify

_HOME = {
    "assemble": "luthier.verbs.assemble",
    "audit": "luthier.verbs.audit",
    "compress": "luthier.verbs.compress",
    "diff": "luthier.verbs.diff",
    "edit": "luthier.verbs.edit",
    "export": "luthier.verbs.export",
    "gate": "luthier.verbs.gate",
    "generate": "luthier.verbs.generate",
    "import_": "luthier.verbs.import_",
    "inspect": "luthier.verbs.inspect",
    "load": "luthier.verbs.load",
    "merge": "luthier.verbs.merge",
    "port": "luthier.verbs.port",
    "rebase": "luthier.verbs.rebase",
    "serve": "luthier.verbs.serve",
    "tune": "luthier.verbs.tune",
    "verify": "luthier.verbs.verify",
}
__all__ = [
    "Delta",
    "assemble",
    "audit",
    "compress",
    "diff",
    "edit",
    "export",
    "gate",
    "generate",
    "import_",
    "inspect",
    "load",
    "merge",
    "port",
    "rebase",
    "serve",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "Delta":
        importlib.import_module("luthier.attach")  # supplies Delta.apply and Delta.detach
        return importlib.import_module("luthier.delta.artefact").Delta
    if name not in _HOME:
        raise AttributeError(f"module 'luthier.verbs' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)


class _Verbs(ModuleType):
    """Importing a verb's file binds the file's module to the package under the verb's name; the verb is what is meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Verbs
