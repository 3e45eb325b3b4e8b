"""One vocabulary for several models: which rows a token gets, by hand on small tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.algebra.tokenizers import reconcile
from luthier.errors import LuthierError


def words(folder: Path, tokens: Sequence[str], added: Sequence[str] = ()) -> Path:
    """A tokenizer with these tokens in this order, and special ones added behind."""
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=tokens[0])
    if added:
        made.add_tokens([AddedToken(t, special=True) for t in added])
    made.save_pretrained(folder)
    return folder


def table(rows: int, start: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Row i is (start + i, −start − i)."""
    first = torch.arange(rows, dtype=torch.float32) + start
    return torch.stack([first, -first], 1).to(dtype)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A base of a b c; one with the same and <new>; one with b a d and <new>."""
    return [
        words(tmp_path / "base", ["$", "a", "b", "c"]),
        words(tmp_path / "one", ["$", "a", "b", "c"], ["<new>"]),
        words(tmp_path / "two", ["$", "b", "a", "d"], ["<new>"]),
    ]


def aligned(folders: list[Path], source: Any = "union", **more: Any) -> tuple[Any, list[dict[str, float]]]:
    """The vocabulary, and of each model token -> the first number of its row in the result."""
    tables = [table(n, s) for n, s in ((4, 10), (5, 20), (5, 30))]
    found = reconcile(source, folders, sizes=[4, 5, 5], **more)
    out = found.align("embed", tables[: len(folders)], range(len(folders)))
    ids = found.tokenizer.get_vocab()
    assert all(t.shape == (found.rows, 2) and torch.equal(t[:, 0], -t[:, 1]) for t in out)
    return found, [{token: float(t[i, 0]) for token, i in ids.items()} for t in out]


def test_union_with_a_base(three: list[Path]) -> None:
    found, (base, one, two) = aligned(three, base=0)
    assert found.tokenizer.get_vocab() == {"$": 0, "a": 1, "b": 2, "c": 3, "d": 4, "<new>": 5} and found.vocab_size == 6
    assert one == {"$": 20, "a": 21, "b": 22, "c": 23, "d": 33, "<new>": 24}  # d: of the only model that has it
    assert two == {"$": 30, "a": 32, "b": 31, "c": 13, "d": 33, "<new>": 34}  # c: of the base, though two have it
    assert base == {"$": 10, "a": 11, "b": 12, "c": 13, "d": 33, "<new>": (24 + 34) / 2}  # of both that have it


def test_union_without_a_base_takes_the_mean(three: list[Path]) -> None:
    _, (_, _, two) = aligned(three)
    assert two["c"] == (13 + 23) / 2


def test_the_base_tokenizer_and_a_named_one(three: list[Path]) -> None:
    found, (base, _, two) = aligned(three, "base", base=0)
    assert set(found.tokenizer.get_vocab()) == {"$", "a", "b", "c"} and found.rows == 4
    assert base == {"$": 10, "a": 11, "b": 12, "c": 13} and two["a"] == 32
    found, (base, one, _) = aligned(three, three[2], base=0)
    assert found.tokenizer.get_vocab() == {"$": 0, "b": 1, "a": 2, "d": 3, "<new>": 4}
    assert base == {"$": 10, "a": 11, "b": 12, "d": 33, "<new>": 29} and one["d"] == 33


def test_stated_tokens(three: list[Path]) -> None:
    stated = {
        "<new>": {"source": 2, "force": True},
        "d": {"source": {"kind": "zero"}},
        "a": {"source": {"kind": "model_token", "model": 1, "token": "b"}, "force": True},
        "<own>": {"source": {"kind": "model_token", "model": 0, "token_id": 3}},
    }
    found, rows = aligned(three, base=0, tokens=stated)
    assert found.rows == 7
    for row in rows:
        assert row["<new>"] == 34 and row["a"] == 22 and row["<own>"] == 13
    assert rows[0]["d"] == rows[1]["d"] == 0 and rows[2]["d"] == 33  # not forced: the model that has it keeps it


def test_padding_rows_are_the_mean(three: list[Path]) -> None:
    found = reconcile("union", three, 0, pad_to_multiple_of=8, sizes=[4, 5, 5])
    (one,) = found.align("embed", [table(5, 20)], [1])
    assert found.rows == 8 and torch.allclose(one[6:], one[:6].mean(0).expand(2, 2))
    assert reconcile("base", three, 0, pad_to_multiple_of=4, sizes=[4, 5, 5]).rows == 4


def test_tokens_beyond_the_tables(tmp_path: Path, three: list[Path]) -> None:
    """A base whose tokenizer has a token without a row: the token goes. Another model's is not taken for a row of its own."""
    long = words(tmp_path / "long", ["$", "a", "b", "c", "e"])
    found = reconcile("union", [long, three[1]], 0, sizes=[4, 5])
    assert set(found.tokenizer.get_vocab()) == {"$", "a", "b", "c", "<new>"}
    found = reconcile("union", [three[0], long], 0, sizes=[4, 4])
    assert set(found.tokenizer.get_vocab()) == {"$", "a", "b", "c"}


def test_types_widen_and_a_model_without_a_tokenizer_has_the_bases(tmp_path: Path, three: list[Path]) -> None:
    (tmp_path / "bare").mkdir()
    found = reconcile("union", [three[0], tmp_path / "bare"], 0)
    out = found.align("embed", [table(4, 1, torch.bfloat16), table(4, 5)], [0, 1])
    assert all(t.dtype == torch.float32 for t in out) and torch.equal(out[1], table(4, 5))


BAD = {
    "kind": ({"a": {"source": {"kind": "zeroes"}}}, "a source is a model"),
    "both": (
        {"a": {"source": {"kind": "model_token", "model": 0, "token": "a", "token_id": 1}}},
        "either token or token_id",
    ),
    "unknown": ({"a": {"source": {"kind": "model_token", "model": 0, "token": "zz"}}}, "has no token 'zz'"),
    "forced": ({"a": {"force": True}}, "no source is stated"),
    "row": (
        {"a": {"source": {"kind": "model_token", "model": 0, "token_id": 99}, "force": True}},
        "has 4 rows, not 100",
    ),
    "lacks": ({"d": {"source": 0}}, "model 1 has no token 'd'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(three: list[Path], case: str) -> None:
    stated, told = BAD[case]
    with pytest.raises(LuthierError, match=told):
        aligned(three, base=0, tokens=stated)


def test_tables_that_do_not_fit(three: list[Path]) -> None:
    found = reconcile("union", three, 0, sizes=[4, 5, 5])
    with pytest.raises(LuthierError, match="differ in more than their rows"):
        found.align("embed", [table(4, 0), torch.zeros(5, 3)], [0, 1])
    with pytest.raises(LuthierError, match="3 rows and a token of number 3"):
        found.align("embed", [table(3, 0), table(5, 0)], [0, 1])
