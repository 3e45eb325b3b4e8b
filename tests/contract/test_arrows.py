"""The house: a room imports only from rooms below it, and a method's file nothing but torch, the ground and its own engine."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import luthier

HOUSE = [
    {"errors", "plan", "papers", "parts", "assets", "delta"},
    {"bases", "data"},
    {"forms", "choices", "inits", "objectives", "optimisers", "merging", "compressing", "editing", "moving"},
    {"attach"},
    {"sampling", "judging"},
    {"training"},
    {"measuring", "bridge"},
    {"algebra"},
    {"practice"},
    {"recipes"},
    {"verbs"},
    {"cli", "effects"},
]
"""Floors from the ground up. Rooms of the ground may know each other; above it a room knows what is below, and itself."""
METHODS = HOUSE[2]
ENGINE = "engine"
"""A room of methods may have this one file of shared machinery."""
LOW = {"torch", "luthier.delta", "luthier.parts", "luthier.errors"}
BY_NAME = {
    ("data/read.py", "luthier.practice.world"): "records of practice: are made by the built-in world",
    ("measuring/sources.py", "luthier.practice.world"): "and judged by its verifiers",
}
"""Rooms above that are reached through a string, when a plan asks for them; each with its reason."""
FLOOR = {room: k for k, rooms in enumerate(HOUSE) for room in rooms}
ROOT = Path(luthier.__file__).parent


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, and every string in it that names one of ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names if node.module == "luthier"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"luthier(\.[a-z_]+)+(:\w+)?", node.value):
                found.add(node.value.partition(":")[0])
    return found


def room_of(module: str) -> str:
    """luthier.attach.sites -> attach."""
    return module.split(".")[1] if module.startswith("luthier.") else ""


def files() -> list[tuple[str, Path]]:
    """(room, file) of all of the package but its front door."""
    out = []
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        room = inside.parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            out.append((room, path))
    return out


def test_every_room_has_its_floor() -> None:
    assert {room for room, _ in files()} <= set(FLOOR), "a new room: decide its floor here and in the design"


def test_arrows_point_down() -> None:
    read, arrows, wrong, by_name = 0, 0, [], set()
    for room, path in files():
        read += 1
        for module in imports(path):
            other = room_of(module)
            if not other or other == room or module == "luthier.__version__":
                continue
            if other not in FLOOR:
                continue  # a name of the package itself
            arrows += 1
            if path == ROOT / "delta" / "registry.py" and other in METHODS:
                continue  # the registries name the rooms that they search; nothing there is imported before it is asked for
            hook = (path.relative_to(ROOT).as_posix(), module)
            if hook in BY_NAME and f'"{module}"' in path.read_text(encoding="utf-8"):
                by_name.add(hook)
                continue
            down = FLOOR[other] < FLOOR[room] or FLOOR[other] == FLOOR[room] == 0
            if not down:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))
    assert by_name == set(BY_NAME), "a stated exception is no longer used"
    assert read == len(files()) > 40 and arrows > 40


def test_methods_import_little() -> None:
    read, wrong = 0, []
    for room, path in files():
        if room not in METHODS or path.name == "__init__.py":
            continue
        read += 1
        for module in imports(path):
            top = module.split(".")[0]
            fine = (
                top in sys.stdlib_module_names or top == "torch" or any(f"{module}.".startswith(f"{m}.") for m in LOW)
            )
            if not fine and module != f"luthier.{room}.{ENGINE}":
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))
    assert read >= sum(len(list((ROOT / room).glob("*.py"))) - 1 for room in METHODS) >= 8


def test_the_reader_sees_what_it_should(tmp_path: Path) -> None:
    """The test of the test: imports inside functions and modules named in strings count too."""
    path = tmp_path / "f.py"
    path.write_text(
        "import importlib\nfrom luthier import verbs\ndef f():\n    import luthier.cli.main\n    from luthier.attach.sites import x\n"
        "    importlib.import_module('luthier.training.loop')\n    y = 'luthier.data.read:f'\n    z = 'luthier is a word'\n"
    )
    rooms = {room_of(m) for m in imports(path)} - {""}
    assert rooms == {"verbs", "cli", "attach", "training", "data"}
