"""The practice base's tokenizer: byte-level BPE learnt from the taught families, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from luthier.practice.world import FIRST, records

VOCABULARY = 1536
PAD, END = "<|pad|>", "<|end|>"
SPECIAL = (PAD, END, "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>")
MASK = "<|bos|>"
"""What stands for a masked token in an encoder: it is in no text."""
SAMPLE = 6_000
"""Records of each taught family that the merges are learnt from."""

PIECES = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s"
"""What no merge may cross: a word with its space, one digit, one sign with its space, one white space. Digits stand
alone because sums are then done figure by figure; signs stand alone so that JSON is spelt as in any other text."""

OTHER_VOCABULARY = 1024
OTHER_PIECES = r"[0-9]{1,3}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+"
"""A second tokenizer's: up to three digits, runs of signs and runs of white space are one piece each."""

TEMPLATE = """\
{%- if tools -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
<|system|>{{ first.content + '\\n' if first else '' }}{{ tools | tojson }}<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}
{%- if message.reasoning_content -%}<think>{{ message.reasoning_content }}</think>{%- endif -%}
{{- message.content if message.content is string else '' -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function if call.function is defined else call -%}
{{- {'name': call.name, 'arguments': call.arguments} | tojson -}}
{%- endfor -%}
{{- '<|end|>' -}}{% endgeneration %}
{%- elif message.role == 'system' -%}
{%- if not (tools and loop.first) -%}<|system|>{{ message.content }}<|end|>{%- endif -%}
{%- elif message.role in ('user', 'tool') -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- else -%}
{{ raise_exception('unknown role ' ~ message.role ~ '; roles: system, user, assistant, tool') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
"""Every turn is a role token, the text, and <|end|>; the assistant's text and <|end|> lie between generation marks."""


def sample(each: int = SAMPLE) -> Iterator[str]:
    """Texts of the families of `FIRST`, every message on its own. The untaught ones are not looked at."""
    for record in chain.from_iterable(records(name, "train", each) for name in FIRST):
        for message in record["messages"]:
            yield message["content"]


def train(vocabulary: int = VOCABULARY, pieces: str = PIECES, each: int = SAMPLE) -> Any:
    """Learn the merges and return a transformers fast tokenizer with the chat template; the same one every time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    core.train_from_iterator(
        sample(each),
        trainers.BpeTrainer(
            vocab_size=vocabulary,  # pyright: ignore[reportCallIssue]
            special_tokens=list(SPECIAL),  # pyright: ignore[reportCallIssue]
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
            show_progress=False,  # pyright: ignore[reportCallIssue]
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL if t not in (PAD, END)],
        chat_template=TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
