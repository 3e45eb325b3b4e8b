"""The tokenizer of a base: loading, a pad token that is not the end token, and new tokens with their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.bases.locate import read_json
from luthier.errors import LuthierError

PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|PAD_TOKEN|>", "<|endoftext|>")
"""Names under which vocabularies carry a pad token, in order of trust."""
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that are their tokenizer.json and nothing else."""
ROWS = 4096
"""Rows of a table worked on at once in float64."""


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, padding on the right. LuthierError where there is none or it cannot be read.

    One that was saved as a plain pipeline is read as it stands: the automatic class may go by the model's family
    instead and rebuild the pipeline, which splits text differently (seen with Qwen2).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    stated = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    plain = stated in PLAIN and (folder / "tokenizer.json").is_file()
    reader: Any = PreTrainedTokenizerFast if plain else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, padding_side="right"
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LuthierError(f"{folder}: no usable tokenizer ({reason[:160]}); name one in base.tokenizer") from error
    if not len(tokenizer):
        raise LuthierError(f"{folder}: holds no tokenizer; name one in base.tokenizer")
    return without_place(tokenizer)


def without_place(tokenizer: Any) -> Any:
    """The tokenizer, which no longer writes into its saved settings that it was read from a local folder."""
    for told in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(told, None)
    return tokenizer


def choose_pad(tokenizer: Any, rows: int) -> str | None:
    """Give the tokenizer a pad token where it has none, other than the end token where there is any other.

    In this order: a pad token under another name, the unknown token, a new token where the embedding table (of `rows`
    rows) has room, the start token; last the end token, which is harmless only because masks and labels here go by
    position and never by id. Returns a line for the report, or None where there was nothing to choose.
    """
    if tokenizer.pad_token_id is not None:
        same = tokenizer.pad_token_id == tokenizer.eos_token_id
        return (
            "pad token is the end token; padding is masked by position, so the end token is trained" if same else None
        )
    vocabulary, end = tokenizer.get_vocab(), tokenizer.eos_token
    named = next((name for name in PADS if name in vocabulary and name != end), None)
    unknown = tokenizer.unk_token if tokenizer.unk_token != end else None
    if named or unknown:
        tokenizer.pad_token = named or unknown
        return f"no pad token: {tokenizer.pad_token} is used"
    if len(tokenizer) < rows:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        return f"no pad token: <pad> is added as id {tokenizer.pad_token_id}, a row the base has and does not use"
    if tokenizer.bos_token is not None and tokenizer.bos_token != end:
        tokenizer.pad_token = tokenizer.bos_token
        return f"no pad token: the start token {tokenizer.bos_token} is used"
    if end is None:
        raise LuthierError("the tokenizer has no pad, unknown, start or end token; name another in base.tokenizer")
    tokenizer.pad_token = end
    return (
        f"no pad token and no room for one: {end} is used; padding is masked by position, so the end token is trained"
    )


def add_tokens(tokenizer: Any, model: nn.Module, tokens: list[str], seed: int = 0) -> list[int]:
    """Add tokens to tokenizer and model; returns their ids, which are their rows in embeddings and head.

    A new row is the mean of the old rows plus seeded noise of a hundredth of their spread, so that the rows differ; see
    `start_rows`. Raises LuthierError for a token that is already there or stated twice.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if token in vocabulary or token in tokens[:number] or not token:
            raise LuthierError(f"base.new_tokens: '{token}' is already a token, or empty; leave it out")
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tokens])
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(tokens)]
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:  # pyright: ignore
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)  # pyright: ignore
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]  # pyright: ignore
    weights = {id(t.weight): t.weight for t in tables if t is not None}
    for weight in weights.values():
        start_rows(weight, ids, seed)
    return ids


@torch.no_grad()
def start_rows(weight: torch.Tensor, ids: Sequence[int], seed: int = 0) -> None:
    """Fills the rows `ids` of a table [rows, width] by the rows below the first of them; not on the meta device.

    The numbers are the same on every device and in every type that the table may be held in: sums in float64, on the CPU,
    and values that bfloat16 and float16 both hold. A delta's exact differences at these rows rest on that.
    """
    if weight.is_meta:
        return
    old, count = weight[: min(ids)], max(1, min(ids))
    mean, square = (torch.zeros(weight.shape[1], dtype=torch.float64) for _ in range(2))
    for part in old.split(ROWS):
        wide = part.cpu().double()
        mean += wide.sum(0)
        square += wide.square().sum(0)
    mean /= count
    spread = (square - count * mean.square()).clamp(min=0).div(max(1, count - 1)).sqrt()
    noise = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(seed))
    made = (mean + 0.01 * spread * noise).to(torch.float16).to(torch.bfloat16)
    weight[list(ids)] = made.to(weight.device, weight.dtype)
