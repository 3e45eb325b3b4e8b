"""Whether what a row claims is there: its names in the code, its recipe, its test."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import yaml
from pydantic import ValidationError

import luthier.delta
from luthier.delta import Registry
from luthier.errors import LuthierError
from luthier.papers.table import STATUSES, Paper
from luthier.plan import Plan
from luthier.plan.stages import load_stages

PACKAGE = Path(__file__).parents[1]
CLAIMING = ("works", "partly")


def check(paper: Paper, root: Path = PACKAGE.parent) -> list[str]:
    """The broken claims of a row, one line each; an empty list when everything it says is true.

    `root` is the folder that holds `tests/`: the repository. Rooms that the row names are imported.
    """
    broken = []
    if paper.status not in STATUSES:
        broken.append(f"status '{paper.status}' is none of {', '.join(STATUSES)}")
    if paper.status == "works" and not (paper.names and paper.recipe and paper.evidence):
        broken.append("a row that works states names, recipe and evidence")
    if paper.status == "partly" and not (paper.names and paper.reason):
        broken.append("a row that works partly states names and, as reason, what is missing")
    if paper.status == "other modality" and not paper.reason:
        broken.append("a row of another modality states what it is bound to, as reason")
    if paper.status not in CLAIMING and (paper.names or paper.recipe or paper.evidence):
        broken.append(f"a row that is '{paper.status}' claims names, a recipe or evidence")
    if paper.becomes not in (None, "recipe", "experiment", "page"):
        broken.append(f"becomes '{paper.becomes}' is none of recipe, experiment, page")
    broken += [problem for name in paper.names if (problem := _name(name))]
    broken += [problem for problem in (_recipe(paper), _evidence(paper.evidence, root)) if problem]
    return [f"{paper.id}: {problem}" for problem in broken]


def _name(name: str) -> str | None:
    """A dotted path below luthier: an entry of a room's registry, else a module, class or function."""
    room, _, rest = name.partition(".")
    for registry in vars(luthier.delta).values():
        if isinstance(registry, Registry) and registry.package == f"luthier.{room}" and rest:
            return None if rest in registry else f"no {registry.what} is entered as '{rest}' (name {name})"
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(("luthier", *parts[:cut]))
        if not _exists(module):
            continue
        thing = importlib.import_module(module)
        for attribute in parts[cut:]:
            if not hasattr(thing, attribute):
                return f"luthier.{name} does not exist: {module} has no '{attribute}'"
            thing = getattr(thing, attribute)
        return None
    return f"luthier.{name} does not exist"


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is a module, not a package: the rest are attributes
        return False


def _recipe(paper: Paper) -> str | None:
    """The recipe is a readable plan whose first line names this paper."""
    if paper.recipe is None:
        return None
    path = PACKAGE / "recipes" / paper.recipe
    if not path.is_file():
        return f"recipe {paper.recipe} does not exist in luthier/recipes"
    text = path.read_text(encoding="utf-8")
    if paper.id not in recipe_papers(text):
        return f"recipe {paper.recipe} does not name {paper.id} in its first line (# paper: {paper.id})"
    try:
        read = yaml.safe_load(text)
        if isinstance(read, dict) and "stages" in read:
            load_stages(read)
        else:
            Plan.model_validate(read)
    except yaml.YAMLError as e:
        return f"recipe {paper.recipe} is not YAML: {' '.join(str(e).split())}"
    except LuthierError as e:
        return f"recipe {paper.recipe} is no chain of stages: {e}"
    except ValidationError as e:
        first = e.errors()[0]
        return f"recipe {paper.recipe} is not a plan: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None


def recipe_papers(text: str) -> list[str]:
    """The ids in a recipe's first line, which reads `# paper: P110` or `# paper: P110 P159`."""
    first = text.split("\n", 1)[0]
    head, _, ids = first.partition(":")
    return ids.replace(",", " ").split() if head.replace(" ", "") == "#paper" else []


def _evidence(node: str | None, root: Path) -> str | None:
    """The test is defined in its file; read, not imported."""
    if node is None:
        return None
    file, *names = node.partition("[")[0].split("::")
    path = root / file
    if not names or not file.startswith("tests/"):
        return f"evidence {node} is not of the form tests/…/test_x.py::test_y"
    if not path.is_file():
        return f"evidence {node}: there is no file {file}"
    scope: ast.AST = ast.parse(path.read_text(encoding="utf-8"), filename=file)
    for name in names:
        inside = [n for n in ast.iter_child_nodes(scope) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        found = [n for n in inside if n.name == name]
        if not found:
            return f"evidence {node}: {file} defines no '{name}'"
        scope = found[0]
    return (
        None if isinstance(scope, ast.FunctionDef) and scope.name.startswith("test") else f"evidence {node} is no test"
    )
