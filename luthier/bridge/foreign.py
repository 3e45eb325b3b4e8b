"""Adapter folders as TRL, PEFT, axolotl or LLaMA-Factory wrote them: complete, trained, on the right base and template?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.bases.fingerprint import fingerprint_template, fingerprint_tokenizer
from luthier.bases.tokens import load_tokenizer
from luthier.bridge.merged import verify_merged
from luthier.bridge.peft_config import read_config
from luthier.bridge.peft_in import from_peft
from luthier.bridge.peft_keys import HEADS
from luthier.bridge.peft_words import base_of
from luthier.bridge.proof import Report, prove
from luthier.bridge.target import Target, logits_of
from luthier.bridge.tensors import read_places
from luthier.delta import FORMS
from luthier.delta.artefact import Delta
from luthier.delta.probes import probe_inputs
from luthier.errors import LuthierError

SERVED_RANK = 16
"""Largest rank that vLLM serves unless told otherwise (max_lora_rank)."""
MOVES = 1e-6
"""Root mean square in logits below which the tuned model is the base."""


def verify_adapter(path: Path, base: Any = None, merged: str | os.PathLike[str] | None = None) -> Report:
    """All checks of an adapter folder against its base."""
    report = Report(str(path), "adapter")
    try:
        config = read_config(path)
    except LuthierError as e:
        report.add("config", False, str(e))
        return report
    named = config.get("base_model_name_or_path")
    if base is None and not named:
        report.add("base", False, "adapter_config.json names no base: state it (--base)")
        return report
    try:
        read_places(path / "adapter_model.safetensors")
    except LuthierError as e:
        report.add("keys", False, str(e))
        return report
    on = base_of(path, base)
    _name(report, named, on, stated=base is not None)
    try:
        delta = from_peft(path, on)
    except LuthierError as e:
        report.add("keys", False, str(e))
        return report
    count = sum(len(p) for q in delta.pieces for p in q.p.values())
    report.add("keys", True, f"{count} tensors, each with its place in the base, none missing")
    _trained(report, delta)
    prove(delta, on)
    _moves(report, delta, on)
    _tokenizer(report, path, on, config)
    _server(report, delta, config)
    if merged is not None:
        verify_merged(report, on, Path(merged), delta)
    return report


def _name(report: Report, named: str | None, on: Target, stated: bool) -> None:
    if not named or not stated:
        report.add("base name", None if not named else True, f"{named or 'the adapter names none'}")
        return
    leaf = Path(str(named)).name
    same = leaf == Path(on.name).name
    detail = f"the adapter names {named}, this is {on.name}"
    report.add("base name", True if same else None, detail if same else f"{detail}: make sure that they are one")


def _trained(report: Report, delta: Delta) -> None:
    """Whether what starts at zero (or one) has left it, at every site."""
    idle, rows, total = [], [], 0
    for piece in delta.pieces:
        kind = FORMS.name_of(type(piece.form))
        for key in piece.sites:
            total += 1
            if not _left_start(kind, piece.p[key]):
                (rows if kind == "entries" else idle).append(key)
    if len(idle) + len(rows) == total:
        report.add("trained", False, f"all {total} sites stand at their start (B is zero): it was saved before training, or "
                   "training had no effect; train again and check the supervised tokens")  # fmt: skip
    elif idle and all(key.split(".")[0] in HEADS for key in idle):
        report.add("trained", None, f"the head is the base's own ({idle[0]}), all else moved: PEFT saves it either way")
    elif idle:
        report.add("trained", False, f"{len(idle)} of {total} sites never moved ({idle[0]}): their gradients did not "
                   "arrive, or the save was partial; train again, or leave them out of target_modules")  # fmt: skip
    elif rows:
        report.add(
            "trained", None, f"the rows of {rows[0]} are as they started: their tokens did not occur in training"
        )
    else:
        report.add("trained", True, f"all {total} sites moved from their start")


def _left_start(kind: str, p: dict[str, Tensor]) -> bool:
    if kind in ("lora", "dora"):
        return bool(p["B"].any())
    if kind == "ia3":
        return bool((p["l"] != 1).any())
    return any(bool(t.any()) for t in p.values())


def _moves(report: Report, delta: Delta, on: Target) -> None:
    """Whether the adapter changes the model's answers at all."""
    handle = delta.apply(on.model)
    try:
        run = logits_of(on.model)
        size = on.tokenizer if on.tokenizer is not None else on.model.get_input_embeddings().weight.shape[0]
        total, n = 0.0, 0
        for row in probe_inputs(size):
            ids = torch.tensor([row])
            tuned = run(ids)
            with handle.off():
                base = run(ids)
            if not torch.isfinite(tuned).all():
                report.add("answers", False, "logits are not finite with the adapter on: the training broke down")
                return
            total, n = total + float((tuned.float() - base.float()).square().sum()), n + base.numel()
    finally:
        delta.detach(on.model)
    apart = (total / n) ** 0.5
    told = f"{apart:.3g} logits (root mean square) from the base on probes"
    report.add("answers", apart > MOVES, told if apart > MOVES else f"{told}: the adapter does nothing; train it again")


def _tokenizer(report: Report, path: Path, on: Target, config: dict[str, Any]) -> None:
    """The tokenizer and chat template saved beside the adapter against the base's."""
    if on.tokenizer is None:
        report.add("tokenizer", None, "not checked: the base came without a tokenizer")
        return
    if not any((path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        report.add("tokenizer", None, "none beside the adapter: the base's own will be used")
    else:
        compare_tokenizers(report, load_tokenizer(path, False), on, config)
    template = path / "chat_template.jinja"
    if template.exists() and not (path / "tokenizer_config.json").exists():
        same = fingerprint_template(template.read_text(encoding="utf-8")) == fingerprint_template(on.tokenizer)
        report.add("template", same, "the same as the base's" if same else _other_template())


def compare_tokenizers(report: Report, own: Any, on: Target, config: dict[str, Any] | None = None) -> None:
    """Tokens, end-of-turn and template of a saved tokenizer against the base's."""
    theirs = on.tokenizer
    added = sorted(set(own.get_vocab()) - set(theirs.get_vocab()))
    lost = sorted(set(theirs.get_vocab()) - set(own.get_vocab()))
    rows = on.model.get_input_embeddings().weight.shape[0]
    same = fingerprint_tokenizer(own) == fingerprint_tokenizer(theirs)
    if lost:
        report.add(
            "tokenizer", False, f"{len(lost)} tokens of the base are gone ({lost[0]!r}): use the base's tokenizer"
        )
    elif added and max(own.get_vocab()[t] for t in added) >= rows:
        report.add("tokenizer", False, f"{len(added)} tokens ({added[0]!r} …) have no row among the base's {rows}: load the "
                   "base with base.new_tokens, or save the embedding (modules_to_save)")  # fmt: skip
    elif added and config is not None and not _saves_embedding(config):
        report.add("tokenizer", False, f"{len(added)} tokens were added ({added[0]!r}) but no embedding was trained or saved: "
                   "their rows are noise; train with modules_to_save or trainable_token_indices")  # fmt: skip
    else:
        told = "the same as the base's" if same else f"{len(added)} added tokens, special tokens or steps differ"
        report.add("tokenizer", True if same or added else None, told)
    _end(report, own, theirs)
    mine, base = fingerprint_template(own), fingerprint_template(theirs)
    if not mine and base:
        report.add("template", False, "the chat template is missing: copy the base's chat_template.jinja beside it")
    elif mine != base and base:
        report.add("template", False, _other_template())
    else:
        report.add("template", True, "the same as the base's" if mine else "neither has one")


def _other_template() -> str:
    return (
        "the chat template is not the base's: the adapter answers to the one it was trained with; serve it with this file "
        "(--chat-template), and score it with the same"
    )


def _end(report: Report, own: Any, theirs: Any) -> None:
    """End-of-turn: there, one token, and the one that generation stops at."""
    end, base = own.eos_token, theirs.eos_token
    if end is None:
        report.add("end of turn", False, "the tokenizer has no eos_token: nothing will stop; set the base's again")
        return
    ids = own(end, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        report.add("end of turn", False, f"{end!r} is {len(ids)} tokens, not one: restore it as a special token")
    elif base is not None and end != base:
        report.add("end of turn", False, f"eos_token is {end!r}, the base's is {base!r}: if the template ends turns with it, "
                   "state it in generation_config.json too; if not, restore the base's")  # fmt: skip
    elif own.pad_token_id is not None and own.pad_token_id == own.eos_token_id:
        report.add("end of turn", None, f"pad and eos are both {end!r}: trainers that mask padding never train the end of "
                   "turn; check that labels hold it")  # fmt: skip
    else:
        report.add("end of turn", True, f"{end!r}, one token")


def _saves_embedding(config: dict[str, Any]) -> bool:
    return bool(config.get("trainable_token_indices")) or any(
        "embed" in m or m in ("wte", "shared", "embed_in") for m in config.get("modules_to_save") or []
    )


def _server(report: Report, delta: Delta, config: dict[str, Any]) -> None:
    """What a server's defaults refuse: notes, since none of it is wrong."""
    notes = []
    ranks = [q.p[k]["A"].shape[-2] for q in delta.pieces for k in q.sites if "A" in q.p[k]]
    if ranks and max(ranks) > SERVED_RANK:
        notes.append(f"rank {max(ranks)} is over vLLM's default {SERVED_RANK} (start it with --max-lora-rank)")
    if config.get("use_dora"):
        notes.append("DoRA is not served unmerged by vLLM (export to hf)")
    if config.get("modules_to_save"):
        notes.append(f"modules_to_save {config['modules_to_save']} are not served unmerged by vLLM (export to hf)")
    if config["peft_type"] not in ("LORA",):
        notes.append(f"{config['peft_type']} is not served by vLLM (export to hf)")
    report.add("serving", None, "; ".join(notes) or "within the common servers' limits")
