"""Loading a base: model, tokenizer, roles and fingerprint, from a plan's `base`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.bases.fingerprint import fingerprint
from luthier.bases.hardware import choose_device, has_bf16
from luthier.bases.locate import check_weights, locate, read_json
from luthier.bases.roles import Roles
from luthier.bases.tokens import add_tokens, choose_pad, load_tokenizer
from luthier.errors import LuthierError, nearest
from luthier.plan.schema import BaseSpec

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "classify": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
FRESH = ("classifier", "pooler")
"""Roles whose parts a classification base may start anew."""
RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|attention\.(masked_)?bias$|position_ids$")
"""Tensors of old checkpoints that hold constants which are computed today; they are not carried on."""


@dataclass
class Base:
    """A model and tokenizer as they were before."""

    spec: BaseSpec
    name: str
    model: Any
    """transformers model, in eval mode; on the meta device when loaded without weights."""
    tokenizer: Any
    roles: Roles
    fingerprint: str | None
    """None without weights. Taken before new rows; a fresh head does not count."""
    kind: str
    folder: Path
    new_parameters: tuple[str, ...] = ()
    """Parameters that the checkpoint does not have (a fresh classifier): training moves and saves them."""
    new_rows: tuple[int, ...] = ()
    """Ids of new tokens: rows of `embed` (and of `head`) that training moves and saves."""
    notes: list[str] = field(default_factory=list)
    """What was chosen on the way, for the report."""
    seed: int = 0
    """Of the new parameters and rows at their start."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type the base is held in."""
        return next(self.model.parameters()).dtype


def load_base(
    spec: BaseSpec | str,
    *,
    weights: bool = True,
    device: str | torch.device | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Base:
    """Load what a plan's `base` names.

    weights: False builds the model on the meta device from its configuration alone. device: default the best one.
    tokenizer: False leaves it out. seed: of a fresh head and of new rows. `use_cache` stays as the checkpoint has it.
    Every failure is a LuthierError in one line: missing, offline, gated, pickled, truncated, keys that do not fit.
    """
    spec = BaseSpec(name=spec) if isinstance(spec, str) else spec  # pyright: ignore[reportCallIssue]
    folder = locate(spec, weights)
    config = _config(spec, folder)
    notes: list[str] = []
    target = torch.device("meta") if not weights else choose_device(device)
    dtype = _dtype(spec, config, choose_device(device) if not weights else target)
    with quiet():
        if weights:
            model, fresh = _read(spec, folder, config, dtype, seed, notes)
            model.to(target)
        else:
            model, fresh = _empty(spec, config, dtype), []
    model.eval()
    used = getattr(model.config, "_attn_implementation", None)
    if spec.attention is None and used not in ("sdpa", None):
        notes.append(f"attention is {used}: sdpa is not supported by {type(model).__name__}")
    roles = Roles(model, spec.roles)
    if not weights and spec.kind == "classify":
        fresh = [n for p in roles.parts if p.role.startswith("classifier") for n in p.parameters]
    mark = fingerprint(model, fresh) if weights else None
    words = load_tokenizer(_tokenizer_folder(spec, folder), spec.trust_remote_code) if tokenizer else None
    rows: list[int] = []
    if words is not None:
        table = model.get_input_embeddings().weight.shape[0]
        if len(words) > table:
            raise LuthierError(
                f"base {spec.name}: {len(words)} tokens but {table} embedding rows; the tokenizer is not its own"
            )
        if note := choose_pad(words, table):
            notes.append(note)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = words.pad_token_id
    if spec.new_tokens:
        if words is None:
            raise LuthierError("base.new_tokens needs the tokenizer; load the base with it")
        rows = add_tokens(words, model, spec.new_tokens, seed)
        roles = Roles(model, spec.roles)
    return Base(spec, spec.name, model, words, roles, mark, spec.kind, folder, tuple(fresh), tuple(rows), notes, seed)


def _tokenizer_folder(spec: BaseSpec, folder: Path) -> Path:
    if spec.tokenizer is None:
        return folder
    return locate(BaseSpec(name=spec.tokenizer), weights=False)  # pyright: ignore[reportCallIssue]


def _config(spec: BaseSpec, folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    stated = read_json(folder / "config.json")
    if (ending := folder / "generation_config.json").is_file():
        read_json(ending)  # transformers passes over one that it cannot read, and with it over the end of a turn
    family = stated.get("model_type", "")
    if "auto_map" in stated and family not in CONFIG_MAPPING and not spec.trust_remote_code:
        raise LuthierError(
            f"base {spec.name}: runs code of its own repository; if you trust it, state base.trust_remote_code: true"
        )
    if family not in CONFIG_MAPPING and "auto_map" not in stated:
        near = nearest(family, CONFIG_MAPPING, "model_type").partition(" (")[0]
        raise LuthierError(f"{folder}/config.json: model_type '{family}' is unknown to transformers; {near}"[:300])
    extra: dict[str, Any] = {}
    if spec.kind == "classify" and spec.labels:
        extra["id2label"] = dict(enumerate(spec.labels))
        extra["label2id"] = {name: number for number, name in enumerate(spec.labels)}
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=spec.trust_remote_code, **extra
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise LuthierError(f"{folder}/config.json: not readable ({_first_line(error)}); correct it") from error
    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    if spec.kind == "causal" and two_stacks:
        raise LuthierError(f"base {spec.name}: an encoder–decoder model; state base.kind: seq2seq")
    if spec.kind == "seq2seq" and not two_stacks:
        raise LuthierError(f"base {spec.name}: no encoder–decoder model; state base.kind: causal or classify")
    if spec.kind != "classify" and spec.labels:
        raise LuthierError("base.labels belongs to base.kind: classify; state that kind or leave the labels out")
    return config


def _dtype(spec: BaseSpec, config: Any, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's own type on hardware that computes in bfloat16 on a GPU, float32 elsewhere."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return own if isinstance(own, torch.dtype) and device.type == "cuda" and has_bf16(device) else torch.float32


def _builder(spec: BaseSpec, config: Any) -> Any:
    import transformers

    builder = getattr(transformers, CLASSES[spec.kind])
    remote = spec.trust_remote_code and CLASSES[spec.kind] in getattr(config, "auto_map", {})
    if not remote and type(config) not in builder._model_mapping:
        raise LuthierError(f"base {spec.name}: {config.model_type} has no {spec.kind} model; state another base.kind")
    return builder


def _empty(spec: BaseSpec, config: Any, dtype: torch.dtype) -> Any:
    builder = _builder(spec, config)
    try:
        with torch.device("meta"):
            model = builder.from_config(
                config, dtype=dtype, attn_implementation=spec.attention, trust_remote_code=spec.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise LuthierError(f"base {spec.name}: {_first_line(error)}") from error
    model.tie_weights()
    return model


def _read(
    spec: BaseSpec, folder: Path, config: Any, dtype: torch.dtype, seed: int, notes: list[str]
) -> tuple[Any, list[str]]:
    """(model on the CPU, names of the parameters that the checkpoint does not have)."""
    from safetensors import SafetensorError

    builder = _builder(spec, config)
    check_weights(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = builder.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                attn_implementation=spec.attention,
                trust_remote_code=spec.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise LuthierError(f"{folder}: a weight file cannot be read ({error}); fetch it again") from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise LuthierError(f"base {spec.name}: cannot be loaded ({_first_line(error)})") from error
    return model, _judge_keys(spec, model, info, notes)


def _judge_keys(spec: BaseSpec, model: nn.Module, info: dict[str, Any], notes: list[str]) -> list[str]:
    """Names of parameters to be started anew; LuthierError where the checkpoint does not fit the architecture."""
    missing = set(info["missing_keys"])
    wrong = {str(item[0]) if isinstance(item, (tuple, list)) else str(item) for item in info["mismatched_keys"]}
    extra = {key for key in info["unexpected_keys"] if not RECOMPUTED.search(key)}
    fresh: set[str] = set()
    if spec.kind == "classify":
        owner = Roles(model, spec.roles).owner
        fresh = {n for n in missing | wrong if n in owner and owner[n].role.startswith(FRESH)}
        prefix = getattr(model, "base_model_prefix", "") + "."
        dropped = {key for key in extra if not key.startswith(prefix)}
        for text, names in (("started anew", fresh), ("of the checkpoint not used", dropped)):
            if names:
                notes.append(f"{text}: {_some(names)}")
        extra -= dropped
    if bad := wrong - fresh:
        raise LuthierError(
            f"base {spec.name}: shapes in the checkpoint differ from config.json for {_some(bad)}; fetch it again"
        )
    if bad := missing - fresh:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        family = getattr(getattr(model, "config", None), "model_type", None)
        remedy = "; of an encoder, state base.kind: classify" if spec.kind == "causal" and family in ENCODERS else ""
        raise LuthierError(
            f"base {spec.name}: the checkpoint lacks {_some(bad)}; it is not whole, or not a {spec.kind} model{remedy}"
        )
    if extra:
        raise LuthierError(
            f"base {spec.name}: the checkpoint holds {_some(extra)}, which the model does not have; correct base.kind"
        )
    return sorted(fresh)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No reports or progress bars of transformers: what they would say is an error or a note here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
