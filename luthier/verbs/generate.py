"""generate: a base with deltas on it, answering prompts through its chat template."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.attach.assembly import Assembly, switch
from luthier.data.template import rendered, unknown_role
from luthier.errors import LuthierError
from luthier.sampling.generate import Sampling
from luthier.sampling.generate import generate as decode
from luthier.sampling.speculative import Drafting, speculate
from luthier.verbs.load import load_all

TABLES = (".json", ".csv", ".tsv", ".parquet")
"""Files that hold records, whose lines are no prompts."""

Prompt = str | Sequence[Mapping[str, Any]]
"""Text of a user's turn, or messages."""


class Speaker:
    """A base with deltas, or an assembly, loaded once and asked many times."""

    drafting: Drafting | None = None
    """Of the last answers, where they were drafted."""

    def __init__(self, base: Any = "practice", deltas: Iterable[Any] = (), **fields: Any) -> None:
        """base, deltas, fields: as for `luthier.load`."""
        self.model, loaded = load_all(base, deltas, **fields)
        self.tokenizer = loaded.tokenizer
        if self.tokenizer is None:
            raise LuthierError(f"base {base} has no tokenizer: give one by base.tokenizer")
        if loaded.kind == "classify":
            raise LuthierError(
                f"base {loaded.name} is a classifier and writes no text: luthier audit measures its labels"
            )

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        raw: bool = False,
        without: bool = False,
        batch_size: int = 16,
        draft: int = 0,
    ) -> list[str]:
        """The answers, in order. raw: go on from the text itself; without: with the deltas switched off. draft: of an
        assembly, tokens that its small tuned model writes ahead at a time; `drafting` then says what came of it."""
        check_heat(temperature)
        if draft and not isinstance(self.model, Assembly):
            raise LuthierError("draft: only an assembly has a small model that writes ahead: leave draft out")
        ids = [self.ids(p, raw) for p in prompts]
        sampling = Sampling(temperature=temperature, seed=seed)

        def run() -> list[list[int]]:
            if draft and not without:
                self.drafting = speculate(
                    self.model, self.tokenizer, ids, max_new_tokens, width=draft, sampling=sampling
                )
                return self.drafting.answers
            return decode(self.model, self.tokenizer, ids, max_new_tokens, batch_size, sampling=sampling)

        if without:
            with switch(self.model).off():
                answers = run()
        else:
            answers = run()
        return [self.tokenizer.decode(a, skip_special_tokens=True) for a in answers]

    def ids(self, prompt: Prompt, raw: bool) -> list[int]:
        """Tokens of a prompt: through the chat template, or raw."""
        chat = getattr(self.tokenizer, "chat_template", None)
        if raw or (chat is None and isinstance(prompt, str)):
            return list(self.tokenizer(prompt)["input_ids"])
        if chat is None:
            raise LuthierError("messages need a chat template and this tokenizer has none: give text, or another base")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for message in messages:
            if wrong := unknown_role(str(message["role"]), chat if isinstance(chat, str) else None):
                raise LuthierError(f"a prompt has the {wrong}")
        text = rendered(self.tokenizer, messages, ask=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_heat(temperature: float) -> None:
    """An error for a temperature that nothing can be drawn at."""
    if not 0 <= temperature < math.inf:
        raise LuthierError(f"temperature: {temperature} is no finite number of at least 0; 0 takes the likeliest token")


def generate(base: Any, prompts: str | Sequence[Prompt], deltas: Iterable[Any] = (), **options: Any) -> list[str]:
    """Answers of a base with deltas. options: as for Speaker.answer (max_new_tokens, temperature, seed, raw …).

    >>> luthier.generate("practice", ["Reverse: 3 1 2"], deltas=["out"])  # doctest: +SKIP
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    return Speaker(base, deltas).answer(asked, **options)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: one a line, or JSONL with 'prompt' or 'messages' (a last assistant turn is left out)."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as e:
        raise LuthierError(f"{path}: there is no such file: give prompts by --prompt, or another --file") from e
    except UnicodeDecodeError as e:
        raise LuthierError(f"{path}: not UTF-8 at byte {e.start}: save it as UTF-8 text") from e
    except OSError as e:
        raise LuthierError(f"{path}: cannot be read ({e.strerror}): give a readable file") from e
    if path.suffix.lower() in TABLES:
        raise LuthierError(
            f"{path}: prompts are read from text, one a line, or from .jsonl: write them as one of these"
        )
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise LuthierError(f"{path}: is empty: write one prompt a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt(line, f"{path}:{n}") for n, line in numbered]


def wrong_message(messages: Sequence[Any]) -> str | None:
    """What a template cannot read in messages; None where each has a role and content."""
    for n, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            return f"messages.{n} has no 'role' and 'content'"
        if not (isinstance(message["content"], (str, list)) or message.get("tool_calls")):
            return f"messages.{n}.content is no text"
    return None


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        said = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
        raise LuthierError(f"{where}: not JSON ({said}): correct that line") from e
    messages = row.get("messages") if isinstance(row, dict) else None
    if messages is not None and row.get("prompt"):
        raise LuthierError(f"{where}: has 'prompt' and 'messages': leave one of them out")
    if isinstance(messages, list) and messages:
        if wrong := wrong_message(messages):
            raise LuthierError(f"{where}: {wrong}: correct that line")
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise LuthierError(f"{where}: 'messages' holds an answer and nothing that asks for it: correct that line")
        return asked
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return row["prompt"]
    raise LuthierError(f"{where}: no 'prompt' and no 'messages': rename the column that holds the prompt")
