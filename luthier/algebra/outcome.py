"""What stands beside the weights of a merged checkpoint: config, tokenizer, generation config, card and the plan."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from luthier.algebra.layout import Layout, is_head
from luthier.algebra.sources import Source
from luthier.bases.locate import read_json
from luthier.errors import LuthierError
from luthier.plan.merge import MergePlan

TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
BESIDE = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
        "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set told = namespace(first='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{% set told.first = message['content'] + '\\n\\n' %}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] | trim + eos_token }}{% else %}{{ '[INST] ' + told.first + message['content'] | trim + "
        "' [/INST]' }}{% set told.first = '' %}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}{{ message['content'] | trim + '\\n\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}"
        "{% endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}
"""Chat formats by the names that the field's merge files give them, as their makers publish them."""


def config_of(
    plan: MergePlan, sources: Sequence[Source], layout: Layout, written: torch.dtype, vocabulary: int | None
) -> dict[str, Any]:
    """The merged model's config: the base's (or the first model's), with what the merge changes of it."""
    donor = sources[0]
    config: dict[str, Any] = json.loads(json.dumps(donor.config))
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(written).removeprefix("torch.")
    if "text_config" in config and key in text:
        text[key] = config[key]
    if vocabulary is not None:
        text["vocab_size"] = vocabulary
    if any(is_head(item.name) for item in layout.items) and donor.tied:
        config["tie_word_embeddings"] = False  # the head has numbers of its own now
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    if len(layout.layers) == 1:
        prefix, count = next(iter(layout.layers.items()))
        _layers(text, count, layout.origins.get(prefix, []), sources)
    elif plan.modules:
        _stacks(config, layout)
    return config


def _layers(text: dict[str, Any], count: int, origins: Sequence[tuple[int, int]], sources: Sequence[Source]) -> None:
    """Number of layers, and the lists with an entry for each layer (layer_types …) put together as the layers are."""
    key = next((k for k in LAYER_KEYS if isinstance(text.get(k), int)), None)
    if key is None:
        return
    before = text[key]
    straight = count == before and [layer for _, layer in origins] == list(range(count))
    text[key] = count
    for name, value in list(text.items()):
        if straight or not isinstance(value, list) or len(value) != before or name == "architectures":
            continue
        rows = [sources[k].text_config.get(name) for k, _ in origins]
        if all(isinstance(r, list) and layer < len(r) for r, (_, layer) in zip(rows, origins, strict=True)):
            text[name] = [r[layer] for r, (_, layer) in zip(rows, origins, strict=True)]  # pyright: ignore


def _stacks(config: dict[str, Any], layout: Layout) -> None:
    for prefix, count in layout.layers.items():
        inner = next(
            (config[k] for k in config if k.removesuffix("_config") in prefix and isinstance(config[k], dict)), config
        )
        keys = (
            ("num_decoder_layers", "decoder_layers")
            if "decoder" in prefix
            else ("num_layers", "encoder_layers", *LAYER_KEYS)
        )
        key = next((k for k in keys if isinstance(inner.get(k), int)), None)
        if key is not None:
            inner[key] = count


def write_beside(
    new: Path,
    plan: MergePlan,
    sources: Sequence[Source],
    config: Mapping[str, Any],
    tokens: Any,
    notes: Sequence[str],
    found: Mapping[str, Sequence[float]] | None = None,
    layers: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Everything of a checkpoint folder but the weights. found: what a search found for the models. layers: what the merge
    says of each layer."""
    donor = sources[0]
    (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in BESIDE + (TOKENIZER if tokens is None else ()):
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, new / name)
    for code in donor.folder.glob("*.py"):  # of a model whose classes come with it
        shutil.copyfile(code, new / code.name)
    if tokens is not None:
        tokens.tokenizer.save_pretrained(new)
    if plan.chat_template:
        _template(new, plan.chat_template, sources)
    written = plan_of(plan)
    (new / "merge.yaml").write_text(written, encoding="utf-8")
    told = {"method": plan.method, "notes": list(notes), "found": found or {}, "layers": layers or {}}
    (new / "merge.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (new / "README.md").write_text(_card(plan, written, notes), encoding="utf-8")


def _template(new: Path, stated: str, sources: Sequence[Source]) -> None:
    text = template_of(stated, sources)
    if text is None:
        return
    (new / "chat_template.jinja").write_text(text, encoding="utf-8")
    file = new / "tokenizer_config.json"
    if file.exists():
        settings = read_json(file)
        if settings.pop("chat_template", None) is not None:
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def template_of(stated: str, sources: Sequence[Source]) -> str | None:
    """The chat template that is meant: a Jinja text, a file, a name of TEMPLATES, or auto for the one most models carry."""
    if stated == "auto":
        found = [text for s in sources if (text := _carried(s.folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if stated in TEMPLATES:
        return TEMPLATES[stated]
    if "{" in stated:
        return stated
    path = Path(stated).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise LuthierError(
        f"chat_template: '{stated}' is no template: give auto, {', '.join(TEMPLATES)}, a Jinja text, or the path of a file"
    )


def _carried(folder: Path) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
    if not (folder / "tokenizer_config.json").is_file():
        return ""
    own = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(own, list):
        own = next((row.get("template") for row in own if row.get("name") == "default"), None)
    return own.strip() if isinstance(own, str) else ""


def same_tokens(sources: Sequence[Source]) -> None:
    """An error where a token number stands for other text in one model than in another; more tokens are no conflict."""
    first: dict[str, int] = {}
    reverse: dict[int, str] = {}
    where = ""
    seen: set[bytes] = set()
    for source in sources:
        file = source.folder / "tokenizer.json"
        if not file.is_file():
            continue
        content = file.read_bytes()
        if content in seen:
            continue
        seen.add(content)
        vocabulary = vocabulary_of(file)
        if not where:
            first, reverse, where = vocabulary, {i: t for t, i in vocabulary.items()}, source.name
            continue
        for token, number in vocabulary.items():
            if first.get(token, number) != number or reverse.get(number, token) != token:
                other = reverse.get(number) or f"number {first[token]}"
                raise LuthierError(
                    f"{source.name} has another tokenizer than {where}: {number} is {token!r} in the one and {other!r} in "
                    "the other: state tokenizer_source (union, base, or a model)"
                )


def vocabulary_of(file: Path) -> dict[str, int]:
    """Token -> number of a tokenizer.json."""
    table = read_json(file)
    model = table.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: rows of (token, score)
        vocabulary = {str(row[0]): i for i, row in enumerate(vocabulary)}
    added = {str(row["content"]): int(row["id"]) for row in table.get("added_tokens") or []}
    if not vocabulary and not added:
        raise LuthierError(f"{file} holds no vocabulary: copy the tokenizer again")
    return {str(k): int(v) for k, v in vocabulary.items()} | added


def plan_of(plan: MergePlan) -> str:
    """The plan as YAML that makes the same merge again."""
    stated = plan.model_dump(mode="json", exclude_defaults=True, exclude={"field_file"}, exclude_none=True)

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) <= {"path", "revision", "lora"} and "path" in value:
                at = f"@{value['revision']}" if value.get("revision") else ""
                return f"{value['path']}{at}{'+' + value['lora'] if value.get('lora') else ''}"
            return {k: named(v) for k, v in value.items()}
        return [named(v) for v in value] if isinstance(value, list) else value

    stated = named(stated)
    if plan.field_file:
        stated = {{"method": "merge_method", "base": "base_model"}.get(k, k): v for k, v in stated.items()}
    return yaml.safe_dump(stated, sort_keys=False, allow_unicode=True, width=110)


def _card(plan: MergePlan, written: str, notes: Sequence[str]) -> str:
    models = [str(r) for r in plan.refs()]
    remarks = "".join(f"- {n}\n" for n in notes)
    listed = "\n".join(f"- {m}{' (base)' if plan.base is not None and m == str(plan.base) else ''}" for m in models)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- luthier\n---\n\n# A merge by {plan.method}\n\nMerged by luthier from\n\n"
        f"{listed}\n\nThe plan, `luthier merge merge.yaml --out FOLDER`:\n\n```yaml\n{written}```\n"
        + (f"\n{remarks}" if remarks else "")
    )
