"""YAML as plans are written: safe, no key twice, 1e-4 is a number, and ${NAME:-default} reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from luthier.errors import LuthierError

FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^{}]*))?\}")


class _Loader(yaml.SafeLoader):
    """The safe loader, with every spelling of a float, and a key given twice as an error."""

    # YAML 1.1 wants a point in a float and reads 1e-4 as text; that would be a learning rate of the wrong type.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rows if tag != "tag:yaml.org,2002:float"]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a list or a table cannot be a key", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Broken YAML is an error that names the line of `where`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = " ".join(str(e.problem or e.context or "cannot be read").split())
        if said == "but found another document":
            raise LuthierError(f"{where}{line}: several plans in one file (---): make a file of each") from e
        raise LuthierError(f"{where}{line}: broken YAML ({said}): correct that line") from e
    except (yaml.YAMLError, ValueError) as e:
        raise LuthierError(f"{where}: broken YAML ({' '.join(str(e).split())}): correct it") from e
    except RecursionError as e:
        raise LuthierError(f"{where}: nested too deeply to be read: write it flat") from e


def expand(value: Any, where: str) -> Any:
    """`value` with ${NAME} and ${NAME:-default} in its texts replaced; a name that is not set needs a default."""
    try:
        return _expanded(value, where)
    except RecursionError as e:
        raise LuthierError(f"{where or 'plan'}: an anchor (&name) holds itself: write out what is meant") from e


def _expanded(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return VARIABLE.sub(lambda m: _variable(m, where), value)
    if isinstance(value, Mapping):
        return {k: _expanded(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v, f"{where}.{i}") for i, v in enumerate(value)]
    return value


def _variable(match: re.Match[str], where: str) -> str:
    name, default = match.groups()
    if (found := os.environ.get(name) or default) is None:
        raise LuthierError(
            f"{where}: the environment variable {name} is not set: set it, or give a default as in ${{{name}:-…}}"
        )
    return found
