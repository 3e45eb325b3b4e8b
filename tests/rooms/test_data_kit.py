"""A tokenizer and chat templates made in memory for the data room's tests, and a check that they are what they say."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.plan.schema import DataSpec

WORDS = (
    "the cat sat on a mat; what is two plus two? four. answer question thinking about it now and then 0123456789 " * 3
)
BODY = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}@GEN@{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>@DNE@"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = BODY.replace("@GEN@", "").replace("@DNE@", "")
MARKED = BODY.replace("@GEN@", "{% generation %}").replace("@DNE@", "{% endgeneration %}")
MARKED_SHORT = BODY.replace("@GEN@", "{% generation %}").replace("<|end|>@DNE@", "{% endgeneration %}<|end|>")
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Drops the thinking of earlier answers, so that prefixes of a conversation are not prefixes of its text."""
ENDLESS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


@lru_cache
def _serialised(bos: bool) -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([WORDS], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
        )
    return made.to_str()


def tokenizer(template: str | None = PLAIN, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; <|end|> ends turns and texts, <|bos|> begins them."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_serialised(bos)),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = template
    return made


def written(folder: Path, records: list[Any], name: str = "data.jsonl") -> str:
    """A JSON Lines file of these records; its path."""
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def chat(*turns: str, **extra: Any) -> dict[str, Any]:
    """A record of turns that alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)], **extra}


def spec(path: str | list[Any], **settings: Any) -> DataSpec:
    return DataSpec.model_validate({"train": path, "cache": False, **settings})


def taught(row: Any, tok: Any) -> str:
    """The supervised tokens of a row as text."""
    return tok.decode([int(i) for i, w in zip(row.ids, row.weights, strict=True) if w > 0])


def test_the_tokenizer_round_trips_and_frames() -> None:
    tok = tokenizer()
    ids = tok("the cat, 42 é 漢")["input_ids"]
    assert ids[0] == tok.bos_token_id and tok.decode(ids[1:]) == "the cat, 42 é 漢"
    assert tok.pad_token_id != tok.eos_token_id
