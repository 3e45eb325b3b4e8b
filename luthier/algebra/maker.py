"""Pieces of a delta as they are made: each tensor goes straight to the file, and its seal is taken on the way."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.algebra.stacking import lora_of, lora_piece, sealed
from luthier.delta import FORMS, Site
from luthier.delta.artefact import Piece
from luthier.delta.folder import UNWRITABLE
from luthier.delta.form import Form
from luthier.delta.seals import project, project_rows, seal, turned
from luthier.delta.stream import TensorStream
from luthier.errors import LuthierError
from luthier.parts.bits import encode
from luthier.parts.spread import spans

PIECE = 1 << 22
"""Numbers worked on at once in float32: of large tensors no such copy is made."""
SPARSE = 8
"""Bytes of an entry's place: where few entries changed, places and differences are smaller than all differences."""


class Maker:
    """Collects pieces, their tensors going straight to the file; without one they are kept in memory."""

    def __init__(self, stream: TensorStream | None = None) -> None:
        self.stream = stream
        self.sites: dict[str, dict[str, Site]] = {}
        self.forms: dict[str, Form] = {}
        self.ranks: dict[str, int] = {}
        self.seals: dict[str, list[float]] = {}
        self.kept: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        self.waiting: dict[str, tuple[Site, dict[str, Tensor]]] = {}

    @staticmethod
    def names(exact: Iterable[str], factors: Iterable[str] = ()) -> list[str]:
        """Names that the file may get, for its header's room: of parameters held exactly, and of the keys of LoRA sites."""
        rows = [f"entries-bfloat16/{name}/fixed/index" for name in exact]
        return 2 * (rows + [f"merged/{key}/fixed/A" for key in factors])

    def put(self, piece: str, form: Form, key: str, site: Site, p: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        """One site's numbers, of the piece that has this name."""
        self.forms.setdefault(piece, form)
        self.sites.setdefault(piece, {})[key] = site
        for group, numbers in (("p", p), ("fixed", fixed)):
            if self.stream is None:
                self.kept[piece, key, group] = numbers
                continue
            for name, tensor in numbers.items():
                self.stream.add(f"{piece}/{key}/{group}/{name}", tensor)

    def whole(self, piece: Piece) -> None:
        """A piece of LoRA that is made already."""
        for key, site in piece.sites.items():
            self.put(piece.name, piece.form, key, site, piece.p[key], piece.fixed[key])
        self.seals |= sealed(piece)

    def exact(self, name: str, site: Site, tuned: Tensor, base: Tensor, module: Any) -> int:
        """A parameter's exact difference; gives how many numbers that takes, 0 where nothing changed."""
        dtype = str(tuned.dtype)[6:]
        bits = encode(tuned, base)
        count, width = int(bits.count_nonzero()), bits.element_size()
        if not count:
            return 0
        few = count * (SPARSE + width) < bits.numel() * width
        moved = bits.reshape(-1).nonzero()[:, 0] if few else bits.new_zeros(0)
        kind = "entries" if few else "dense"
        piece = f"{kind}-{dtype}"
        p, fixed = {"bits": bits.reshape(-1)[moved] if few else bits}, {"index": moved} if few else {}
        site = replace(site, entries=count) if few else site
        self.put(piece, FORMS.make(kind, {"dtype": dtype}), name, site, p, fixed)
        self.seals[f"{piece}/{name}"] = seal_of(tuned, base, module)
        return p["bits"].numel()

    def lowrank(self, key: str, site: Site, a: Tensor, b: Tensor) -> None:
        """Factors at one site. Fused experts wait for the others of their module, with which they share a rank."""
        module = site.name if site.kind == "fused-experts" else None
        if self.waiting and next(iter(self.waiting.values()))[0].name != module:
            self.settle()
        self.waiting[key] = (site, {"A": a, "B": b})
        if module is None:
            self.settle()

    def settle(self) -> None:
        """Writes the factors that wait."""
        if not self.waiting:
            return
        piece = lora_piece(
            "lora", {k: s for k, (s, _) in self.waiting.items()}, {k: p for k, (_, p) in self.waiting.items()}
        )
        for s, key in zip(piece.states(), piece.sites, strict=True):
            self.put("lora", piece.form, key, s.site, dict(s.p), {})
            self.seals[f"lora/{key}"] = seal(piece.form, s)
            self.ranks[s.site.name] = int(s.p["A"].shape[-2])
        self.waiting = {}

    def pieces(self) -> list[Piece]:
        """All of them, low-rank ones first; they hold no tensors where these went to a file."""
        self.settle()
        if "lora" in self.forms:
            self.forms["lora"] = lora_of(self.ranks)

        def numbers(name: str, group: str) -> dict[str, dict[str, Tensor]]:
            return {key: self.kept.get((name, key, group), {}) for key in self.sites[name]}

        order = sorted(self.sites, key=lambda n: self.forms[n].at == "base")
        return [Piece(n, self.forms[n], self.sites[n], numbers(n, "p"), numbers(n, "fixed")) for n in order]


@contextlib.contextmanager
def streamed(out: Path, names: Iterable[str]) -> Iterator[TensorStream]:
    """A file beside the folder `out` for a delta's numbers, of which nothing is left at the end: `Delta.save` moves it.

    names: what tensors may be called. What cannot be written is a LuthierError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{out.name}-", suffix=".safetensors", dir=out.parent)
    os.close(handle)
    stream = TensorStream(Path(temporary), names)
    try:
        yield stream
    except UNWRITABLE as e:
        raise LuthierError(
            f"cannot write the delta to {out}: {getattr(e, 'strerror', None) or e}; nothing was left behind"
        ) from e
    finally:
        stream.drop()
        Path(temporary).unlink(missing_ok=True)


def difference(now: Tensor, was: Tensor) -> Tensor:
    """now − was in float32, or wider numbers' difference rounded to it."""
    wide = torch.promote_types(torch.promote_types(now.dtype, was.dtype), torch.float32)
    return now.to(wide).sub(was).float()


def squared(tensor: Tensor, less: Tensor | None = None) -> float:
    """Squared norm of a tensor, or of its change from another one, piece by piece: no wide copy of the whole is made."""
    x, y = tensor.reshape(-1), None if less is None else less.reshape(-1)
    total = 0.0
    for a, b in spans(len(x), PIECE):
        piece = x[a:b].float() if y is None else difference(x[a:b], y[a:b])
        total += float(piece.square().sum(dtype=torch.float64))
    return total


def seal_of(tuned: Tensor, base: Tensor, module: Any) -> list[float]:
    """`project` of the change as the module turns it, a few rows of it at a time."""
    if tuned.dim() < 2:
        return project(difference(tuned, base))
    now, was = (x.reshape(-1, x.shape[-1]) for x in (tuned, base))
    size = max(1, PIECE // max(1, now.shape[1]))
    flip = turned(tuned, module) is not tuned
    return project_rows(lambda a, b: difference(now[a:b], was[a:b]), (now.shape[0], now.shape[1]), size, flip)
