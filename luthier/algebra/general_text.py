"""General text, for statistics and for what an edit must not change: given, or what the base says of itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from luthier.bridge.target import Target
from luthier.data.read import read
from luthier.data.template import rendered
from luthier.editing.engine import Text
from luthier.errors import LuthierError
from luthier.plan.schema import SourceSpec
from luthier.sampling.generate import Sampling, generate

LENGTH = 128
"""Longest passage in tokens."""
HELD = 4
"""Every so many passages one is held out for the scorecard."""


@dataclass
class GeneralText:
    """Passages of a source ({text}, {messages} or {prompt, completion} records), or, without one, the base's own
    generations at temperature 1 from the beginning of a turn (with a chat template) or of a text."""

    on: Target
    source: SourceSpec | None = None
    seed: int = 0
    _own: dict[tuple[str, int], list[Text]] = field(default_factory=dict)
    _read: list[Text] | None = None

    @property
    def name(self) -> str:
        """What the scorecard calls it."""
        return self.source.path if self.source else "the base's own generations"

    def mark(self) -> str:
        """What identifies the text, without making it where the base would."""
        if self.source is None:
            return f"own/{self.seed}"
        return hashlib.sha256(str([t.ids for t in self._all()]).encode()).hexdigest()[:16]

    def working(self, tokens: int) -> list[Text]:
        """About so many tokens that edits may use (all there are, where there are fewer)."""
        if self.source is None:
            return self._generated("working", tokens)
        return _enough([t for n, t in enumerate(self._all()) if n % HELD or len(self._all()) < HELD], tokens)

    def held_out(self, tokens: int) -> list[Text]:
        """About so many tokens that no edit sees."""
        if self.source is None:
            return self._generated("held out", tokens)
        return _enough(self._all()[::HELD], tokens)

    def openings(self, count: int) -> list[str]:
        """The first words of as many passages."""
        if not count:
            return []
        passages = self.working(count * 16) if self.source is None else self.working(10**9)[:count]
        words = [self.on.tokenizer.decode(t.ids, skip_special_tokens=True).split() for t in passages]
        found = [" ".join(w[n * 8 : n * 8 + 8]) for n in range(count) for w in words if len(w) > n * 8 + 3]
        return found[:count]

    def _all(self) -> list[Text]:
        if self._read is None:
            assert self.source is not None
            found = [Text(ids) for r in read(self.source) for ids in self._cut(self._rendered(r.fields, r.where))]
            if not found:
                raise LuthierError(f"text {self.source.path}: no record has two tokens: give other text")
            self._read = found
        return self._read

    def _rendered(self, f: dict[str, Any], where: str) -> list[int]:
        words = self.on.tokenizer
        turns = f.get("messages")
        if turns is None and "prompt" in f and "completion" in f:
            turns = [{"role": "user", "content": f["prompt"]}, {"role": "assistant", "content": f["completion"]}]
        if turns is not None and words.chat_template:
            text = rendered(words, turns)
            return words(text, add_special_tokens=False, verbose=False)["input_ids"]
        text = f.get("text") or "\n".join(str(m.get("content") or "") for m in turns or [])
        if not text:
            raise LuthierError(
                f"{where}: general text needs text, messages, or prompt and completion: name another file"
            )
        return words(text, verbose=False)["input_ids"]

    def _cut(self, ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[n : n + LENGTH]) for n in range(0, len(ids), LENGTH) if len(ids[n : n + LENGTH]) > 1]

    def _generated(self, part: str, tokens: int) -> list[Text]:
        if (part, tokens) not in self._own:
            rows = -(-tokens // LENGTH)
            seed = self.seed * 2 + (part == "held out")
            how = Sampling(temperature=1.0, seed=1_000_000 + seed)
            start = self._start()
            with torch.no_grad():
                found = generate(self.on.model, self.on.tokenizer, [start] * rows, LENGTH - len(start), 64, (), how)
            self._own[part, tokens] = [Text((*start, *ids), len(start)) for ids in found if ids]
        return self._own[part, tokens]

    def _start(self) -> list[int]:
        """What stands before the first word: the opening of a user's turn, or a start token."""
        words = self.on.tokenizer
        if words.chat_template:
            text = rendered(words, [{"role": "user", "content": "§"}]).partition("§")[0]
            if ids := words(text, add_special_tokens=False)["input_ids"]:
                return list(ids)
        first = words.bos_token_id if words.bos_token_id is not None else words.eos_token_id
        return [0 if first is None else first]


def _enough(texts: list[Text], tokens: int) -> list[Text]:
    out, count = [], 0
    for text in texts:
        if count >= tokens:
            break
        out.append(text)
        count += len(text.ids)
    return out
