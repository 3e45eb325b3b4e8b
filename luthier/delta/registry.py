"""Methods found by name: every file of a room is a method or a family of them, and no list is edited."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from luthier.errors import LuthierError, nearest
from luthier.plan.schema import counts

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """Name -> method for one room. Files of the room are imported at the first look.

    >>> FORMS = Registry("form", "luthier.forms")
    >>> "lora" in FORMS
    True
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._found: dict[str, Any] = {}
        self._read = False

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a method under a name; a name given twice is an error."""

        def enter(method: T) -> T:
            if name in self._found and self._found[name].__module__ != getattr(method, "__module__", None):
                raise LuthierError(
                    f"{self.what} '{name}' is defined twice: in {self._found[name].__module__} and {method.__module__}"
                )
            self._found[name] = method
            return method

        return enter

    def _load(self) -> dict[str, Any]:
        if not self._read:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._read = True  # last: a file that fails to import fails again at the next look, and is not passed over
        return self._found

    def __getitem__(self, name: str) -> Any:
        found = self._load()
        if name not in found:
            raise LuthierError(f"no {self.what} is called '{name}': {nearest(name, found, self.what)}")
        return found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())

    def name_of(self, method: type) -> str:
        """The name a class was entered under."""
        return next(name for name, m in self._load().items() if m is method)

    def make(self, name: str, settings: Mapping[str, Any]) -> Any:
        """The dataclass called `name` with checked settings; an unknown or mistyped one is one clear line."""
        cls = self[name]
        known = {f.name for f in dataclasses.fields(cls)}
        for key in settings:
            if key not in known:
                raise LuthierError(f"{self.what} '{name}' has no setting '{key}': {nearest(key, known, 'setting')}")
        hints = get_type_hints(cls)
        values = {}
        for key, value in settings.items():
            try:
                config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
                hint = hints[key]
                if isinstance(value, bool) and counts(hint):
                    raise LuthierError(f"{self.what} '{name}', setting '{key}': expected a number, got {value!r}")
                plain = isinstance(hint, type) and dataclasses.is_dataclass(hint)
                values[key] = TypeAdapter(hint, config=None if plain else config).validate_python(value)
            except ValidationError as e:
                said = "; or ".join(dict.fromkeys(problem["msg"] for problem in e.errors()[:2]))
                shown = key.rstrip("_")  # lambda_
                raise LuthierError(f"{self.what} '{name}', setting '{shown}': {said}, got {value!r}") from e
        try:
            return cls(**values)
        except (TypeError, ValueError) as e:
            raise LuthierError(f"{self.what} '{name}': {e}") from e


FORMS = Registry("form", "luthier.forms")
CHOICES = Registry("choice", "luthier.choices")
INITS = Registry("init", "luthier.inits")
OBJECTIVES = Registry("objective", "luthier.objectives")
OPTIMISERS = Registry("optimiser", "luthier.optimisers")
MERGES = Registry("merge", "luthier.merging")
COMPRESSIONS = Registry("compression", "luthier.compressing")
EDITS = Registry("edit", "luthier.editing")
MOVES = Registry("move", "luthier.moving")
