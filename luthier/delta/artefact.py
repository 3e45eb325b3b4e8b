"""The delta as a thing: pieces of named tensors, the form that made each, the base they belong to. Saved without pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luthier.delta.card import card_of
from luthier.delta.folder import UNWRITABLE, file_digest, unwritten
from luthier.delta.form import Form, No, Site, State
from luthier.delta.header import FORMAT, OWN, read_header, site_of
from luthier.delta.registry import FORMS
from luthier.delta.stream import fsync
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FORMAT", "Delta", "Piece", "check_files", "digest", "made_of", "read_header", "supply_attacher"]


@dataclass
class Piece:
    """One form at its sites. `p` are trained and `fixed` constant numbers: site -> name -> tensor."""

    name: str
    form: Form
    sites: dict[str, Site]
    p: dict[str, dict[str, Tensor]]
    fixed: dict[str, dict[str, Tensor]]
    scale: float = 1.0

    def states(self, weights: Callable[[Site], Tensor] | None = None) -> Iterator[State]:
        """A State for every site, its weight read by `weights` where the form asks for it."""
        for key, site in self.sites.items():

            def weight(site: Site = site) -> Tensor:
                if weights is None:
                    raise LuthierError(f"piece '{self.name}' needs the base's weight at {site.name}: pass weights=")
                return weights(site)

            yield State(site, self.p.get(key, {}), self.fixed.get(key, {}), weight)

    def stored(self, key: str, site: Site) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """A site's numbers as they lie on disk."""
        return self.form.stored(site, self.p.get(key, {}), self.fixed.get(key, {}))

    def count(self) -> int:
        """Numbers trained, as the form counts."""
        common = self.form.count_shared(next(iter(self.sites.values()))) if self.sites else 0
        return common + sum(self.form.count(site) for site in self.sites.values())


@dataclass
class Delta:
    """What was added to a base: the artefact everything in the house makes, changes or measures.

    Lawful: `a + b` puts both on the same base, `2 * a` scales every change, `a.only("attn.q")` keeps some sites. The files
    go along; of a sum's that have one name, the first delta's.
    """

    pieces: list[Piece]
    base: dict[str, Any] = field(default_factory=dict)
    """name, fingerprint, tokenizer and template digests."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """plan, data digest, parents, versions."""
    audit: dict[str, Any] = field(default_factory=dict)
    """Summary of the measurements."""
    seals: dict[str, list[float]] = field(default_factory=dict)
    """Site -> seeded projection of its change."""
    probes: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Small files that travel along: tokenizer files where tokens were added, the chat template."""
    id: str = field(default="", compare=False)
    """The first 16 digits of the digest of the numbers that it was read from, or last saved to; empty until then."""

    # -- algebra

    def __add__(self, other: Delta) -> Delta:
        a, b = self.base.get("fingerprint"), other.base.get("fingerprint")
        if a and b and a != b:
            raise LuthierError(
                f"cannot add deltas of different bases ({a} and {b}): port one of them to the other's base first"
            )
        base, tokens = dict(self.base or other.base), [d.base.get("new_tokens") or [] for d in (self, other)]
        if any(x != y for x, y in zip(*tokens, strict=False)):
            raise LuthierError(
                f"cannot add deltas that add other tokens ({tokens[0]} and {tokens[1]}): train them with the same base.new_tokens"
            )
        if any(tokens):
            base["new_tokens"] = max(tokens, key=len)
        names: set[str] = set()
        pieces = []
        for piece in [*self.pieces, *other.pieces]:
            name, k = piece.name, 2
            while name in names:
                name, k = f"{piece.name}-{k}", k + 1
            names.add(name)
            pieces.append(dataclasses.replace(piece, name=name))
        return Delta(pieces, base, made_of([self, other], "add"), files={**other.files, **self.files})

    def __mul__(self, factor: float) -> Delta:
        pieces = []
        for piece in self.pieces:
            if isinstance(piece.form.scales, No) and factor != 1:
                raise LuthierError(f"piece '{piece.name}' cannot be scaled: {piece.form.scales.reason}")
            pieces.append(dataclasses.replace(piece, scale=piece.scale * factor))
        return Delta(pieces, dict(self.base), made_of([self], f"scale {factor}"), files=dict(self.files))

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return -1 * self

    def __sub__(self, other: Delta) -> Delta:
        return self + -other

    def toward(self, other: Delta, t: float) -> Delta:
        """The delta on the straight line from this one (t = 0) to another (t = 1) of the same base; t may lie beyond."""
        return (1 - t) * self + t * other

    def only(self, *patterns: str) -> Delta:
        """The delta at the sites whose role or name matches one of the patterns; a pattern without a match is an error."""
        kept, used = [], set()
        for piece in self.pieces:
            sites = {}
            for key, site in piece.sites.items():
                hits = {q for q in patterns if site.role == q or site.role.startswith(q + ".") or fnmatch(site.name, q)}
                used |= hits
                if hits:
                    sites[key] = site
            if sites:
                kept.append(
                    dataclasses.replace(
                        piece, sites=sites, p={k: piece.p[k] for k in sites}, fixed={k: piece.fixed[k] for k in sites}
                    )
                )
        if unused := set(patterns) - used:
            roles = sorted({s.role for piece in self.pieces for s in piece.sites.values()})
            raise LuthierError(f"no site of this delta matches {sorted(unused)}; its roles: {', '.join(roles)}")
        return Delta(kept, dict(self.base), made_of([self], "only"), files=dict(self.files))

    def count(self) -> int:
        """Numbers trained over all pieces, as their papers count."""
        return sum(piece.count() for piece in self.pieces)

    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.numel() * t.element_size() for _, t in self._flat())

    # -- tensors

    def tensors(self, weights: Callable[[Site], Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, dense additive change [d_out, d_in] or [d_out]) for every folding piece; one at a time.

        `weights` gives the base's weight of a site for forms that need it. A form that has no weight change is an error
        that gives its reason.
        """
        for piece in self.pieces:
            for s in piece.states(weights):
                change = piece.form.delta(s)
                if isinstance(change, No):
                    raise LuthierError(f"piece '{piece.name}' has no weight change: {change.reason}")
                for part, value in change.items():
                    name = s.site.parameter if part == "weight" else part
                    yield f"{s.site.name}.{name}", value * piece.scale

    def _flat(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it lies on disk."""
        for piece in self.pieces:
            for key, site in piece.sites.items():
                for group, numbers in zip(("p", "fixed"), piece.stored(key, site), strict=True):
                    for name, tensor in numbers.items():
                        yield f"{piece.name}/{key}/{group}/{name}", tensor

    # -- the folder

    def header(self) -> dict[str, Any]:
        """What delta.json holds."""
        return {
            "format": FORMAT,
            "base": self.base,
            "pieces": [
                {
                    "name": piece.name,
                    "form": FORMS.name_of(type(piece.form)),
                    "settings": dataclasses.asdict(piece.form),  # pyright: ignore[reportArgumentType]
                    "scale": piece.scale,
                    "sites": {key: dataclasses.asdict(site) for key, site in piece.sites.items()},
                }
                for piece in self.pieces
            ],
            "lineage": self.lineage,
            "audit": self.audit,
            "seals": self.seals,
        }

    def save(
        self, folder: str | os.PathLike[str], card: str | None = None, numbers: str | os.PathLike[str] | None = None
    ) -> Path:
        """Writes the folder: everything to a neighbour first, then moved, so that no half-written delta is left behind.

        numbers: the delta's tensors as a safetensors file that is there already (`delta.stream`); it is moved into the
        folder, and the pieces need not hold them.

        An existing delta in `folder` is replaced file by file, `delta.json` last; what only the earlier one had (probes,
        files that travelled along) is then removed.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            os.chmod(new, 0o755)
            if numbers is None:
                tensors = {name: t.detach().cpu().contiguous() for name, t in self._flat()}
                save_file(tensors, new / "delta.safetensors", {"format": "luthier"})
            else:
                shutil.move(numbers, new / "delta.safetensors")
            if self.probes:
                save_file({k: v.contiguous() for k, v in self.probes.items()}, new / "probes.safetensors")
            (new / "README.md").write_text(card or card_of(self), encoding="utf-8")
            for name, content in self.files.items():
                if name in OWN:
                    raise LuthierError(f"a file that travels along cannot be called {name}: name it otherwise")
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).write_bytes(content)
            header = self.header() | {
                "digest": file_digest(new / "delta.safetensors"),
                "probes_digest": file_digest(new / "probes.safetensors") if self.probes else None,
                "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())},
            }
            (new / "delta.json").write_text(json.dumps(header, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync(new)
            stale = _travelling(folder) - set(self.files) | ({"probes.safetensors"} if not self.probes else set())
            folder.mkdir(exist_ok=True)
            written = sorted((p for p in new.rglob("*") if p.is_file()), key=lambda p: p.name == "delta.json")
            for path in written:
                (folder / path.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / path.relative_to(new))
            for name in stale - {"README.md"}:
                (folder / name).unlink(missing_ok=True)
            for place in (folder, folder.parent):
                fsync(place)
            self.id = header["digest"][:16]
        except UNWRITABLE as e:
            raise unwritten(f"the delta to {folder}", e, "what stood there before is whole") from e
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Delta:
        """Reads a delta folder; every tensor must be there, of the stated shape, and the file whole (digest)."""
        folder = Path(folder)
        header = read_header(folder)
        path = folder / "delta.safetensors"
        _is_whole(path, header.get("digest"))
        tables: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = {}
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    piece, rest = key.split("/", 1)
                    site, group, name = rest.rsplit("/", 2)
                    tables.setdefault(piece, {}).setdefault(group, {}).setdefault(site, {})[name] = f.get_tensor(key)
        except (SafetensorError, ValueError, OSError) as e:
            raise LuthierError(f"{path} is not a whole safetensors file ({e}): copy it again") from e
        pieces = []
        for entry in header["pieces"]:
            name = entry["name"]
            sites = {key: site_of(site, folder / "delta.json", name, key) for key, site in entry["sites"].items()}
            table = tables.pop(name, {})
            if strangers := sorted({k for group in table.values() for k in group} - set(sites)):
                raise LuthierError(
                    f"{path}: piece '{name}' has tensors for {strangers[0]}, which delta.json does not name"
                )
            p, fixed = ({k: table.get(group, {}).get(k, {}) for k in sites} for group in ("p", "fixed"))
            empty = [k for k in sites if not p[k] and not fixed[k]]
            if empty:
                raise LuthierError(
                    f"{path}: piece '{entry['name']}' has no tensor for site {empty[0]} ({len(empty)} such sites)"
                )
            try:
                form = FORMS.make(entry["form"], entry["settings"])
            except LuthierError as e:
                raise LuthierError(f"{folder / 'delta.json'}: piece '{name}': {e}") from e
            if type(form).restored is not Form.restored:
                for key, site in sites.items():
                    p[key], fixed[key] = map(dict, _opened(path, name, key, form, site, p[key], fixed[key]))
            pieces.append(Piece(name, form, sites, p, fixed, entry.get("scale", 1.0)))
        if tables:
            raise LuthierError(f"{path} holds tensors of pieces that delta.json does not name: {sorted(tables)}")
        return cls(
            pieces,
            header["base"],
            header["lineage"],
            header.get("audit", {}),
            header.get("seals", {}),
            _probes(folder, header),
            {name: _along(folder, name, stated) for name, stated in header.get("files", {}).items()},
            header["digest"][:16],
        )

    # -- on a model (the attach room supplies these two at import, since it stands above this one)

    def apply(self, model: nn.Module, *, strict: bool = True) -> Any:
        """Puts the delta on a model by hooks; gives the handle (`off()`, `fold()`, `detach()`). Another base is an error."""
        return _ATTACHER["apply"](model, self, strict=strict)

    def detach(self, model: nn.Module) -> None:
        """Takes this delta off the model; the base is then bit for bit what it was."""
        _ATTACHER["detach"](model, self)


def made_of(deltas: Iterable[Delta], how: str) -> dict[str, Any]:
    """The lineage of what was made of these, and how: their ids, or what those that were never on disk were made of."""
    parents = [p for d in deltas for p in ([d.id] if d.id else d.lineage.get("parents") or [])]
    return {"parents": list(dict.fromkeys(parents)), "made_by": how}


_ATTACHER: dict[str, Callable[..., Any]] = {}


def supply_attacher(**functions: Callable[..., Any]) -> None:
    """For the attach room: the functions behind Delta.apply and Delta.detach."""
    _ATTACHER.update(functions)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (first 16 hex digits) of named tensors, in the order given."""
    h = hashlib.sha256()
    for name, t in tensors:
        h.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()[:16]


def check_files(folder: Path, header: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that travel along with a delta, after a look at all that delta.json speaks of, without the numbers in
    memory: a file that is missing, truncated or altered is a LuthierError."""
    _is_whole(folder / "delta.safetensors", header.get("digest"))
    if header.get("probes_digest") is not None:
        _is_whole(folder / "probes.safetensors", header["probes_digest"])
    return {name: _along(folder, name, stated) for name, stated in header.get("files", {}).items()}


def _is_whole(path: Path, stated: str | None) -> None:
    if not path.exists():
        raise LuthierError(f"{path} is missing: the delta folder is incomplete; copy it again")
    if stated != file_digest(path):
        raise LuthierError(f"{path} is truncated or altered (its digest is not the one in delta.json): copy it again")


def _opened(path: Path, piece: str, key: str, form: Form, site: Site, p: Any, fixed: Any) -> Any:
    """A site's numbers as they are worked with; codes that do not decode are an altered file."""
    try:
        return form.restored(site, p, fixed)
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        raise LuthierError(f"{path}: piece '{piece}', site {key}: its codes cannot be read ({e}): copy it again") from e


def _probes(folder: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The probes that delta.json speaks of; a file it does not speak of was left by another delta."""
    path = folder / "probes.safetensors"
    stated = header.get("probes_digest")
    if stated is None and ("probes_digest" in header or not path.exists()):
        return {}
    if stated is not None:
        _is_whole(path, stated)
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError, OSError) as e:
        raise LuthierError(f"{path} is not a whole safetensors file ({e}): copy it again") from e


def _along(folder: Path, name: str, stated: str) -> bytes:
    """A file that travels along."""
    try:
        content = (folder / name).read_bytes()
    except OSError as e:
        raise LuthierError(f"{folder / name} cannot be read ({e.strerror}): copy the delta again") from e
    if hashlib.sha256(content).hexdigest() != stated:
        raise LuthierError(f"{folder / name} is altered (its digest is not the one in delta.json): copy it again")
    return content


def _travelling(folder: Path) -> set[str]:
    """Files that travel along with the delta that stands in a folder; none where there is no readable one."""
    try:
        return set(read_header(folder).get("files", {}))
    except LuthierError:
        return set()


def _sync(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        fsync(path)
