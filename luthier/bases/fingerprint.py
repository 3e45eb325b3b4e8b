"""Fingerprints by content: is this the base, the tokenizer, the template that a delta was made for?

A base's fingerprint is "bf16:exact:dtype": a hash of a strided sample rounded to bfloat16, a hash of the sample as it
is held, and the type it is held in. The first tells that a base held in bfloat16 and the same checkpoint held in
float32 are one base; the second that they are not the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.bases.part import is_attached
from luthier.errors import LuthierError

SAMPLE = 4096
"""Most elements read from one tensor."""
DIGITS = 24
"""Hex digits kept of each hash: 96 bits."""
BLOCK = 4 << 20
"""Bytes of memory in which samples lie side by side."""

Same = Literal["same", "same, other dtype", "different"]


def base_tensors(model: nn.Module, skip: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the base's own parameters and saved buffers, by name; tied tensors once, under their first name.

    Leaves out what a delta attached and the names in skip (a fresh classification head).
    """
    saved = set(model.state_dict(keep_vars=True))
    found = {n: p.data for n, p in model.named_parameters() if not is_attached(n) and n not in skip}
    found |= {n: b for n, b in model.named_buffers() if n in saved and not is_attached(n) and n not in skip}
    yield from sorted(found.items())


def fingerprint(model: nn.Module, skip: Collection[str] = ()) -> str:
    """Fingerprint of a model's values by a strided sample; independent of device and of attached deltas.

    Time is that of reading 4096 elements of every tensor; it does not see a change that misses them all: use
    full_fingerprint to be sure. Raises LuthierError on the meta device, where there are no values.
    """
    return fingerprint_of(base_tensors(model, skip))


def fingerprint_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same of named tensors in the order of `base_tensors`, read one at a time."""
    mark = Fingerprint()
    for name, tensor in tensors:
        mark.add(name, tensor)
    return str(mark)


class Fingerprint:
    """fingerprint, fed with one tensor after another in the order of `base_tensors`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._samples: list[torch.Tensor] = []
        self._dtypes: dict[str, int] = {}
        self._block = torch.empty(0, dtype=torch.uint8)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a sample of the tensor, not the tensor."""
        if tensor.is_meta:
            raise LuthierError(f"{name} has no values (meta device); load the base with weights to fingerprint it")
        self._names.append(f"{name} {tuple(tensor.shape)}")
        self._samples.append(self._kept(_sample(tensor.detach())))
        kind = str(tensor.dtype).removeprefix("torch.")
        self._dtypes[kind] = self._dtypes.get(kind, 0) + tensor.numel()

    def _kept(self, sample: torch.Tensor) -> torch.Tensor:
        """A copy of a sample. On the CPU they share blocks: each in memory of its own would lie in a hole that a large
        tensor left, where the next one of its size then no longer fits, and a process that streams a model would grow."""
        if sample.device.type != "cpu":
            return sample.clone()
        size = -(-sample.numel() * sample.element_size() // 16) * 16
        if len(self._block) < size:
            self._block = torch.empty(max(BLOCK, size), dtype=torch.uint8)
        place, self._block = self._block[:size], self._block[size:]
        return place.view(sample.dtype)[: sample.numel()].copy_(sample)

    def __str__(self) -> str:
        rounded, exact = hashlib.sha256(), hashlib.sha256()
        for line, kinds in ((rounded, ""), (exact, ",".join(str(s.dtype) for s in self._samples))):
            line.update(("\n".join(self._names) + kinds).encode())
        for group in _by_type(self._samples):
            exact.update(_bytes(group))
        rounded.update(_bytes(torch.cat([s.to(torch.bfloat16).cpu() for s in self._samples] or [torch.zeros(0)])))
        dtype = max(self._dtypes, key=lambda kind: self._dtypes[kind]) if self._dtypes else "none"
        return f"{rounded.hexdigest()[:DIGITS]}:{exact.hexdigest()[:DIGITS]}:{dtype}"


def compare(a: str, b: str) -> Same:
    """What two fingerprints of bases say about each other."""
    rounded_a, exact_a, dtype_a = _split(a)
    rounded_b, exact_b, dtype_b = _split(b)
    if exact_a == exact_b:
        return "same"
    return "same, other dtype" if rounded_a == rounded_b and dtype_a != dtype_b else "different"


def full_fingerprint(what: nn.Module | str | Path, skip: Collection[str] = ()) -> str:
    """SHA-256 over every value of a model in memory, or over every tensor of a folder's safetensors files.

    Independent of device and of how a checkpoint is cut into shards. A model's and a folder's hash are not comparable:
    names and layouts in memory differ from those on disk.
    """
    if isinstance(what, nn.Module):
        return _hashed((name, tensor.detach().cpu()) for name, tensor in base_tensors(what, skip))
    from safetensors import SafetensorError, safe_open

    places = {}
    for file in sorted(Path(what).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise LuthierError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
    if not places:
        raise LuthierError(f"{what}: no safetensors file to fingerprint; name the folder of a checkpoint")

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(places):
            with safe_open(places[name], "pt") as opened:
                yield name, opened.get_tensor(name)

    return _hashed(read())


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hash of what turns text into ids: the fast tokenizer's whole pipeline, else the vocabulary, and the special ids.

    The chat template has its own fingerprint; padding and truncation settings do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    special = {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items()) if k != "pad_token"}
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()[: 2 * DIGITS]


def fingerprint_template(template: Any) -> str:
    """Hash of a chat template: its text, several by name, or a tokenizer that carries one; "" where there is none."""
    text = template if isinstance(template, (str, dict, type(None))) else getattr(template, "chat_template", None)
    if not text:
        return ""
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[: 2 * DIGITS]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most SAMPLE elements at equal strides, the first one included; a view where the layout allows.

    The stride is odd: an even one would look at the same few columns of every row.
    """
    flat = tensor.reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE) | 1]


def _by_type(samples: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The samples joined by type, on the CPU: one transfer for each type and device."""
    for dtype in sorted({s.dtype for s in samples}, key=str):
        same = [s for s in samples if s.dtype == dtype]
        devices = {s.device for s in same}
        yield torch.cat(same).cpu() if len(devices) == 1 else torch.cat([s.cpu() for s in same])


def _bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor of any type, as a buffer."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


class FullHash:
    """full_fingerprint, fed with one tensor after another in the order of `base_tensors`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes every value of a tensor on the CPU in."""
        self._digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            self._digest.update(_bytes(tensor))

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _hashed(tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
    digest = FullHash()
    for name, tensor in tensors:
        digest.add(name, tensor)
    return str(digest)


def _split(text: str) -> tuple[str, str, str]:
    parts = text.split(":")
    if len(parts) != 3:
        raise LuthierError(f"'{text}' is no fingerprint of a base (three parts with colons); the file was altered")
    return parts[0], parts[1], parts[2]
