"""An assembly on disk: which models, with which deltas, play which part, and how their predictions are joined. No pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.delta.artefact import Delta, digest
from luthier.delta.folder import file_digest, new_folder
from luthier.delta.registry import MOVES
from luthier.errors import LuthierError
from luthier.plan.places import kind_of

FORMAT = 1
FILE = "assembly.json"


@dataclass
class Member:
    """One model of an assembly: a base, as a delta's card names it, and the deltas on it."""

    base: dict[str, Any]
    """name, fingerprint, kind, tokenizer; `spec`: how it is loaded, where that is not the default."""
    deltas: list[Delta] = field(default_factory=list)

    @property
    def mark(self) -> str:
        """Of the base's values and the deltas' numbers: equal members are one model."""
        told = [self.base.get("fingerprint"), self.base.get("new_tokens"), *map(_mark, self.deltas)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


@dataclass
class Wiring:
    """A large model, pairs of (expert, base) that steer it, and the fusion: the artefact that is saved and loaded."""

    fusion: Any
    large: Member
    pairs: list[tuple[Member, Member]]
    lineage: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the answers: members, their parts, the fusion and its settings."""
        parts = [self.large.mark, *([e.mark, b.mark] for e, b in self.pairs)]
        told = json.dumps([MOVES.name_of(type(self.fusion)), dataclasses.asdict(self.fusion), parts], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:48]

    @property
    def base(self) -> dict[str, Any]:
        """The large model's base: what the assembly answers instead of."""
        return self.large.base

    def members(self) -> Iterator[tuple[str, Member]]:
        """(role, member) of all: large, expert 1, base 1, expert 2 …"""
        yield "large", self.large
        for n, (expert, base) in enumerate(self.pairs, 1):
            yield f"expert {n}", expert
            yield f"base {n}", base

    def header(self) -> dict[str, Any]:
        """What assembly.json holds; deltas by the folders they are saved in."""
        places = {id(d): f"deltas/{n}" for n, d in enumerate(self._deltas())}
        return {
            "format": FORMAT,
            "fusion": {"name": MOVES.name_of(type(self.fusion)), "settings": dataclasses.asdict(self.fusion)},
            "members": [
                {"role": role, "base": member.base, "deltas": [places[id(d)] for d in member.deltas]}
                for role, member in self.members()
            ],
            "fingerprint": self.fingerprint,
            "lineage": self.lineage,
            "audit": self.audit,
        }

    def _deltas(self) -> list[Delta]:
        found: dict[int, Delta] = {id(d): d for _, member in self.members() for d in member.deltas}
        return list(found.values())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the folder whole or not at all; one that is there and not empty is refused."""
        with new_folder(folder) as new:
            for n, delta in enumerate(self._deltas()):
                delta.save(new / "deltas" / str(n))
            header = self.header()
            if self.probes:
                save_file({k: v.contiguous() for k, v in self.probes.items()}, new / "probes.safetensors")
                header["probes_digest"] = file_digest(new / "probes.safetensors")
            (new / "README.md").write_text(_card(self), encoding="utf-8")
            (new / FILE).write_text(json.dumps(header, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Wiring:
        """Reads an assembly folder; everything must be there and be what the fingerprint says."""
        folder = Path(folder)
        header = read_wiring(folder)
        held: dict[str, Delta] = {}
        members: dict[str, Member] = {}
        for entry in header["members"]:
            for place in entry["deltas"]:
                if place not in held:
                    held[place] = Delta.load(folder / place)
            members[entry["role"]] = Member(entry["base"], [held[p] for p in entry["deltas"]])
        count = (len(members) - 1) // 2
        wanted = ["large", *(f"{part} {n}" for n in range(1, count + 1) for part in ("expert", "base"))]
        if sorted(members) != sorted(wanted) or not count:
            raise LuthierError(f"{folder / FILE}: members: the roles are {', '.join(members)}, not large and pairs of expert "
                               "and base: altered; make the assembly again")  # fmt: skip
        try:
            fusion = MOVES.make(header["fusion"]["name"], header["fusion"]["settings"])
        except LuthierError as e:
            raise LuthierError(f"{folder / FILE}: {e}") from e
        pairs = [(members[f"expert {n}"], members[f"base {n}"]) for n in range(1, count + 1)]
        out = cls(fusion, members["large"], pairs, header["lineage"], header["audit"], _probes(folder, header))
        if out.fingerprint != header["fingerprint"]:
            raise LuthierError(f"{folder} is altered: its fingerprint is {out.fingerprint[:16]}…, {FILE} says "
                               f"{header['fingerprint'][:16]}…: copy it again, or make the assembly anew")  # fmt: skip
        return out


class _Member(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: str
    base: dict[str, Any]
    deltas: list[str]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: int
    fusion: dict[str, Any]
    members: list[_Member]
    fingerprint: str
    lineage: dict[str, Any]
    audit: dict[str, Any]
    probes_digest: str | None = None


def is_assembly(folder: Any) -> bool:
    """Whether a name is the folder of an assembly."""
    return isinstance(folder, (str, os.PathLike)) and kind_of(folder) == "assembly"


def read_wiring(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """assembly.json of a folder, checked for format and types. No tensor is read."""
    path = Path(folder) / FILE
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise LuthierError(f"{folder} holds no {FILE}: give the folder of an assembly") from e
    except (ValueError, RecursionError) as e:
        raise LuthierError(f"{path} is not JSON ({e}): copy the folder again") from e
    except OSError as e:
        raise LuthierError(f"{path} cannot be read ({e.strerror}): check its permissions") from e
    version = header.get("format") if isinstance(header, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise LuthierError(f"{path} has format {version}, this version reads up to {FORMAT}: upgrade luthier")
    try:
        _Header.model_validate(header)
    except ValidationError as e:
        problem = e.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise LuthierError(f"{path}: {place}: {problem['msg']}: altered or no assembly; copy it again") from e
    for place in [p for m in header["members"] for p in m["deltas"]]:
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise LuthierError(f"{path}: members: '{place}' is no folder inside the assembly: copy it again")
    if not {"name", "settings"} <= set(header["fusion"]):
        raise LuthierError(f"{path}: fusion: states no name and settings: altered; copy it again")
    return header


def _probes(folder: Path, header: dict[str, Any]) -> dict[str, Tensor]:
    path, stated = folder / "probes.safetensors", header.get("probes_digest")
    if stated is None:
        return {}
    try:
        if file_digest(path) != stated:
            raise LuthierError(f"{path} is truncated or altered (its digest is not the one in {FILE}): copy it again")
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as e:
        raise LuthierError(f"{path} is missing or not whole ({e}): copy it again") from e


def _mark(delta: Delta) -> str:
    """Of a delta's numbers and how they are read."""
    pieces = json.dumps(delta.header()["pieces"], sort_keys=True, default=list)
    return hashlib.sha256(f"{digest(sorted(delta._flat()))}{pieces}".encode()).hexdigest()


def _card(wiring: Wiring) -> str:
    rows = "\n".join(
        f"| {role} | {m.base.get('name')} | {', '.join(q.name for d in m.deltas for q in d.pieces) or 'none'} | "
        f"`{str(m.base.get('fingerprint'))[:24]}` |"
        for role, m in wiring.members()
    )
    name, settings = MOVES.name_of(type(wiring.fusion)), dataclasses.asdict(wiring.fusion)
    return (
        f"---\nlibrary_name: luthier\nbase_model: {wiring.base.get('name')}\n---\n\n"
        f"# {wiring.base.get('name')}, steered by {len(wiring.pairs)} small pair{'s' if len(wiring.pairs) > 1 else ''}\n\n"
        f"Joined by `{name}` {settings}; fingerprint `{wiring.fingerprint}`.\n\n"
        f"| part | base | deltas | fingerprint of the base |\n|---|---|---|---|\n{rows}\n\n"
        "Ask it: `luthier generate FOLDER -p TEXT`. Check it: `luthier verify FOLDER`.\n"
    )
