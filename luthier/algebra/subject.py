"""A model as edits see it: passes with stand-in weights, what goes in and out of its modules, general text."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from luthier.attach import attached
from luthier.attach.sites import sites_of
from luthier.attach.weights import oriented
from luthier.bridge.target import Target
from luthier.delta import Site
from luthier.delta.folder import UNWRITABLE
from luthier.editing.engine import Hook, Seen, Subject, Text, Weights, key
from luthier.errors import LuthierError
from luthier.measuring.forward import vocabulary_of
from luthier.parts.seeds import generator_of
from luthier.sampling.generate import Sampling, generate, stop_ids

LOGITS = 1 << 25
"""Logits held at once (128 MB in float32)."""
NEAR = 32
"""Tokens said from inside a prompt."""
KINDS = ("linear", "conv1d", "embedding", "norm", "other")


class ModelSubject(Subject):
    """A causal model with whatever deltas lie on it.

    general: gives general text of about so many tokens. mark: names model, deltas and text, for what is cached; None
    caches nothing. The model's parameters are held in float32 inside `working()` and are afterwards bit for bit what
    they were.
    """

    def __init__(
        self,
        on: Target,
        general: Callable[[int], list[Text]],
        *,
        seed: int = 0,
        mark: str | None = None,
        tokens: int = 20_000,
    ) -> None:
        self.on, self.model, self.roles = on, on.model, on.roles
        self.layers, self.seed, self.mark, self.tokens = on.roles.layer_count, seed, mark, tokens
        self._general, self._moments = general, {}
        self.device = next(self.model.parameters()).device

    @contextmanager
    def working(self) -> Iterator[ModelSubject]:
        """Evaluation mode, nothing trains, parameters in float32; afterwards all is as it was."""
        handle, training = attached(self.model), self.model.training
        # What stands in for a weight has its gradient; those of the model's own would be computed for nothing.
        asking = [p for p in self.model.parameters() if p.requires_grad]
        for p in asking:
            p.requires_grad_(False)
        held = [(p, p.dtype) for p in self.model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
        for p, _ in held:
            p.data = p.data.float()
        self.model.eval()
        try:
            yield self
        finally:
            for p, dtype in held:
                p.data = p.data.to(dtype)
            for p in asking:
                p.requires_grad_(True)
            self.model.train(training)
            if not handle.pieces and not handle.edits:
                handle.detach()

    def sites(self, roles: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
        if "all" in roles:
            wanted = None if layers is None else {n % self.layers for n in layers}
            found = [q for q in self.on.items.values() if wanted is None or q.layer in wanted]
        else:
            found = sites_of(self.roles, roles, (), layers)
        if odd := next((q for q in found if q.kind == "fused-experts"), None):
            raise LuthierError(
                f"editing: {odd.name} holds all experts in one tensor, which edits cannot address: state other roles"
            )
        found = [q for q in found if q.kind in KINDS]
        return found

    def layer(self, number: int) -> str:
        return self.roles.layers[number]

    def weight(self, site: Site) -> Tensor:
        return oriented(self.model.get_parameter(key(site)).detach(), site).float()

    def run(
        self,
        texts: Sequence[Text],
        weights: Weights | None = None,
        *,
        at: Mapping[str, Hook] | None = None,
        keep: Sequence[str] = (),
        probe: Sequence[str] = (),
    ) -> Seen:
        ids, mask = self._padded(texts)
        seen = Seen(ids)
        hooks = [
            self._listen(name, seen, (at or {}).get(name), name in keep, name in probe)
            for name in {*(at or {}), *keep, *probe}
        ]
        try:
            swapped = {name: self._stored(name, value) for name, value in (weights or {}).items()}
            given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            seen.logits = functional_call(self.model, swapped, (), given).logits.float()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _listen(self, name: str, seen: Seen, change: Hook | None, keep: bool, probe: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            if keep:
                seen.inputs[name] = args[0] if args else next(iter(kwargs.values()))
            if probe:
                seen.probes[name] = torch.zeros_like(y).requires_grad_(True)
                y = y + seen.probes[name]
            y = y if change is None else change(y)
            if keep:
                seen.outputs[name] = y
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    def _stored(self, name: str, value: Tensor) -> Tensor:
        return oriented(value, self.on.items[name]).to(self.model.get_parameter(name).dtype)

    def _padded(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        longest = max(len(t.ids) for t in texts)
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None) or 0
        ids = torch.tensor([[*t.ids, *[pad] * (longest - len(t.ids))] for t in texts], device=self.device)
        mask = torch.tensor([[1] * len(t.ids) + [0] * (longest - len(t.ids)) for t in texts], device=self.device)
        return ids, mask

    def batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        order = sorted(range(len(texts)), key=lambda n: (-len(texts[n].ids), n))
        width = vocabulary_of(self.model)
        while order:
            take = max(1, min(32, LOGITS // (len(texts[order[0]].ids) * width)))
            yield order[:take]
            order = order[take:]

    def passages(self, tokens: int) -> list[Text]:
        return self._general(tokens)

    def near(self, texts: Sequence[Text], count: int) -> list[Text]:
        g, stop, asked = self.generator("near"), stop_ids(self.model), [t for t in texts if t.start > 1]
        how = [Sampling(temperature=1.0, seed=2_000_000 + 2 * self.seed + n) for n in (0, 1)]
        # A turn that a prompt closes is closed as there, and answered; what no turn holds runs on.
        picked = [asked[n % len(asked)] for n in range(count if asked else 0)]
        ends = [max((n for n in range(1, t.start) if t.ids[n] in stop), default=t.start) for t in picked]
        heads = [t.ids[: int(torch.randint(1, n + 1, (1,), generator=g))] for t, n in zip(picked, ends, strict=True)]
        said = generate(self.model, None, heads, NEAR, 64, stop, how[0])
        prompts = [(*h, *s, *t.ids[n : t.start]) for h, s, t, n in zip(heads, said, picked, ends, strict=True)]
        answers = generate(self.model, None, prompts, NEAR, 64, stop, how[1], keep_stop=True)
        told = [t.ids[t.start : t.end] for t in asked]
        made = [Text((*q, *a), len(q)) for q, a in zip(prompts, answers, strict=True) if a]
        return [t for t in made if not any(_holds(t.ids, target) for target in told)]

    def generator(self, *names: object) -> torch.Generator:
        return generator_of(self.seed, *names)

    @torch.no_grad()
    def moment(self, site: Site) -> Tensor:
        if site.name not in self._moments:
            path = self._cached(site)
            found = _read(path, site.d_in) if path else None
            if found is None:
                found = self._measured(site).cpu()
                if path:
                    _keep(path, found)
            self._moments[site.name] = found
        return self._moments[site.name].to(self.device)

    def _measured(self, site: Site) -> Tensor:
        texts, total, count = self.passages(self.tokens), torch.zeros(site.d_in, site.d_in, device=self.device), 0
        for at in self.batches(texts):
            part = [texts[n] for n in at]
            x = self.run(part, keep=[site.name]).inputs[site.name].float()
            rows = torch.cat([x[n, : len(t.ids)] for n, t in enumerate(part)])
            total += rows.t() @ rows
            count += len(rows)
        return total / count

    def _cached(self, site: Site) -> Path | None:
        if self.mark is None:
            return None
        name = hashlib.sha256(f"{self.mark}/{self.tokens}/{self.seed}/{site.name}".encode()).hexdigest()[:32]
        root = Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")
        return root / "moments" / f"{name}.safetensors"


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[n : n + len(part)]) == tuple(part) for n in range(len(ids) - len(part) + 1))


def _read(path: Path, width: int) -> Tensor | None:
    """A cached moment; None where it is missing or not whole, and is then measured again."""
    try:
        found = load_file(path).get("moment") if path.exists() else None
    except (SafetensorError, OSError):
        return None
    return found if found is not None and found.shape == (width, width) else None


def _keep(path: Path, moment: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(handle)
        try:
            save_file({"moment": moment.contiguous()}, part)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except UNWRITABLE as e:
        raise LuthierError(
            f"cannot write the cache in {path.parent} ({getattr(e, 'strerror', None) or e}): set LUTHIER_CACHE elsewhere"
        ) from e
