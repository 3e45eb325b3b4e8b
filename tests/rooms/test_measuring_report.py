"""The report: one self-contained page, in which nothing that came from a record is markup.

Run as a script it writes an example report into a folder, to be looked at in a browser.
"""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.measuring import words
from luthier.measuring.report import KEYS, plain, render, write_report

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\" onload=\"x"


def interval(value: float, reach: float) -> dict:
    return {"value": value, "low": value - reach, "high": value + reach}


def check(name: str, kind: str, before: float, after: float, reach: float, unit: str = "share", samples=()) -> dict:
    share = unit == "share"
    gap = interval(after - before, reach * 1.2)
    won, lost = (max(0, round(200 * (after - before))) + 1, max(0, round(200 * (before - after))) + 1)
    turned = {"positive": won, "negative": lost, "positive_ids": ["a"], "negative_ids": ["b"]} if share else None
    return {
        "name": name, "kind": kind, "metric": "exact" if share else "perplexity", "unit": unit, "n": 200,
        "better": "higher" if share else "lower", "before": interval(before, reach), "after": interval(after, reach),
        "difference": gap, "detectable": 0.08 if share else 0.3, "flips": turned,
        "undecided": {"before": 0, "after": 1 if kind == "guard" and share else 0}, "samples": list(samples), "dropped": {"too long": 3} if not share else {}, "cached": False,
        "seconds": 3.2,
    }  # fmt: skip


def sample(prompt: str, expected: str, before: str, after: str, right: tuple[float, float]) -> dict:
    flip = None if right[0] == right[1] else "positive" if right[1] > right[0] else "negative"
    sides = [
        {"text": text, "value": value, "reason": "equal" if value else f"expected {expected!r}", "decided": True}
        for text, value in zip((before, after), right, strict=True)
    ]
    return {"id": "7", "prompt": prompt, "expected": expected, "flip": flip, "before": sides[0], "after": sides[1]}


def example(steps: int = 240) -> dict:
    """A plausible run: a translation learned, some arithmetic lost."""
    rng = random.Random(0)
    loss = [0.35 + 2.6 * math.exp(-s / 45) + rng.gauss(0, 0.09) for s in range(steps)]
    curve = [
        {"step": s + 1, "loss": loss[s], "lr": 2e-3 * min(1, (s + 1) / 12) * (1 + math.cos(math.pi * s / steps)) / 2,
         "grad_norm": 0.5 + abs(rng.gauss(0.4, 0.2)), "tokens": 900 * (s + 1), "seconds": 0.17 * (s + 1)}
        for s in range(steps)
    ]  # fmt: skip
    pairs = [
        sample("Translate into Tolvi: the old miller sees a red fox", "nu barek mil sa ruvo tasi",
               "The old miller went to the market and the red fox was in the box.", "nu barek mil sa ruvo tasi", (0, 1)),
        sample("Translate into Tolvi: a fisher sings", "fen doru lasi", "Mira lives in Ostvale.", "fen doru lasa", (0, 0)),
    ]  # fmt: skip
    lost = [sample("17 + 48 = ?", "65", "17 + 48: 7 + 8 = 15, write 5 carry 1. 65", "17 + 48: 7 + 8 = 15. 55", (1, 0))]
    roles = [
        ("attn.q", 0.9),
        ("attn.k", 0.6),
        ("attn.v", 1.4),
        ("attn.o", 1.1),
        ("ffn.gate", 1.8),
        ("ffn.up", 1.7),
        ("ffn.down", 2.2),
    ]
    norms = [
        {"site": f"model.layers.{n}.{role}", "role": role, "layer": n, "norm": 10 * size * (0.5 + n / 6),
         "base_norm": 1000.0, "relative": 0.01 * size * (0.5 + n / 6), "note": None}
        for role, size in roles for n in range(6)
    ]  # fmt: skip
    return {
        "plan": {"base": {"name": "practice"}, "delta": [{"form": "lora", "rank": 16}], "train": {"lr": 2e-3, "steps": steps}},
        "base": {"name": "practice", "fingerprint": "9f31c2a4e8b07d55", "parameters": 5_112_320},
        "delta": {"pieces": [{"name": "lora", "form": "lora", "sites": 42, "parameters": 423_936}],
                  "moved": 423_936, "share": 0.0829, "bytes": 1_712_345},
        "ledger": {"records": 2000, "kept": 1996, "dropped": {"unsupervised": 0, "duplicate": 4}, "truncated_rows": 3,
                   "truncated_tokens": 41, "tokens": 86_411, "supervised_tokens": 24_120,
                   "supervised_per_row": {"min": 4, "median": 12, "max": 31}, "end_of_turn_supervised_share": 1.0},
        "curve": curve,
        "evals": [{"step": s, "loss": 0.42 + 2.5 * math.exp(-s / 45)} for s in range(0, steps + 1, 40)],
        "audit": {
            "target": [check("translation", "target", 0.03, 0.91, 0.045, samples=pairs)],
            "guards": [check("arithmetic", "guard", 0.92, 0.75, 0.06, samples=lost), check("facts about people", "guard", 0.97, 0.96, 0.025),
                       check("stories (held-out text)", "guard", 4.12, 4.31, 0.12, unit="perplexity")],
            "shifted": [check("translation, longer sentences", "shifted", 0.0, 0.34, 0.06)],
            "drift": {"kl": interval(0.183, 0.02), "agreement": interval(0.87, 0.012), "tokens": 2048, "sequences": 64,
                      "source": "the base's own writing, begun as the guards' records begin", "seconds": 1.1},
        },
        "norms": norms,
        "cost": {"seconds": 41.3, "tokens": 86_411, "tokens_per_second": 2092.0, "peak_memory_bytes": 612_000_000,
                 "audit_seconds": 14.2, "bytes_on_disk": 1_712_345},
        "proof": {
            "fingerprints": {"base": {"ok": True, "reason": "9f31c2a4e8b07d55, unchanged after training"},
                             "tokenizer": "51d0aa3e", "template": "c0ffee12"},
            "probes": {"ok": True, "reason": "the delta is there: 0 from tuned, 1.58 from base, 1.58 between them"},
            "rehearsal": {"ok": True, "reason": "96 tokens forward, backward, step, evaluation and save", "peak_memory_bytes": 598_000_000},
            "resume": {"ok": None, "reason": "the run was not interrupted"},
            "known_answers": {"packed_equals_unpacked": True, "two_small_batches_equal_one_large": {"ok": True, "difference": 2.1e-7}},
        },
        "versions": {"luthier": "0.1.0", "torch": "2.13.0", "transformers": "5.2.3", "python": "3.11.4"},
        "warnings": ["4 duplicate records were dropped"],
    }  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and whether tags close in order."""

    VOID = {"meta", "line", "circle", "path", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def poison(value, keys: bool):
    """Every text of a table made hostile; with `keys` also the keys, where a run is free to choose them."""
    if isinstance(value, dict):
        return {k: poison(v, keys) for k, v in value.items()} | ({HOSTILE: HOSTILE} if keys else {})
    if isinstance(value, list):
        return [poison(v, keys) for v in value]
    return (
        HOSTILE
        if isinstance(value, str) and value not in ("share", "higher", "lower", "positive", "negative")
        else value
    )


def test_page_holds_every_section_and_is_well_formed():
    reader = read(render(example()))
    assert reader.crossed == [] and reader.open == []
    text = " ".join(" ".join(reader.words).split())
    for wanted in ("learned at a cost", "learned: translation 3 % → 91 % (+88 [83, 93])", "lost: arithmetic 92 % → 75 %",
                   "Ledger", "Proof", "Cost", "The resolved plan", "Versions", "4 duplicate records were dropped",
                   "nu barek mil sa ruvo tasi", "newly wrong", "KL(base ‖ tuned)", "423,936"):  # fmt: skip
        assert wanted in text, wanted
    assert reader.tags.count("svg") >= 5 * 1 + 3 * 2  # a dot plot a check, and three curves in two layers


def test_page_needs_nothing_from_outside():
    page = render(example())
    assert re.findall(r"https?:|url\(|@import|<link|<script|src=", page) == []
    assert "default-src 'none'" in page


def test_hostile_text_never_becomes_markup():
    free = ("plan", "ledger", "cost", "proof", "versions")
    data = {k: poison(v, k in free) for k, v in example().items()}
    clean, dirty = read(render(example())), read(render(data))
    assert "script" not in dirty.tags and "img" not in dirty.tags
    assert not [name for name, _ in dirty.attributes if name.startswith("on")]
    assert dirty.crossed == [] and dirty.open == []
    assert set(dirty.tags) <= set(clean.tags)
    assert "alert('x')" in "".join(dirty.words)  # it is there, as text


@pytest.mark.parametrize("missing", KEYS)
def test_any_key_may_be_missing(missing):
    data = example()
    data.pop(missing)
    assert read(render(data)).crossed == []


def test_nothing_but_an_empty_dict_still_renders():
    text = " ".join(read(render({})).words)
    assert "not measured" in text and "Nothing was measured." in text


def test_units_are_named_and_no_group_is_needed():
    data = example()
    page = render(data)
    for told in (
        "loss in nats a token that carries loss",
        "per cent of the base",
        "nats",
        "items · can detect ±8 points",
    ):
        assert told in page, told
    data["audit"] |= {"guards": [], "shifted": []}
    bare = render(data)
    assert "<h2>Target</h2>" in bare and "<h2>Guards</h2>" not in bare and "<h2>Shifted</h2>" not in bare
    for name, kind, told in (("dpo", "causal", None), ("sft", "classify", "nats a record")):
        data["plan"] |= {"objective": {"name": name}, "base": {"name": "b", "kind": kind}}
        assert ("loss in nats" in render(data)) == bool(told) and (told or "") in render(data)


def test_files_are_written_whole_and_json_is_strict(tmp_path):
    data = example() | {"cost": {"seconds": math.nan, "tokens": math.inf}}
    json_path, html_path = write_report(tmp_path / "deep" / "run", data)
    strict = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"not strict JSON: {name}"))
    assert strict["cost"] == {"seconds": None, "tokens": None}
    assert strict["audit"]["target"][0]["name"] == "translation"
    assert html_path.read_text().startswith("\n") or "<!doctype html>" in html_path.read_text()
    assert sorted(p.name for p in json_path.parent.iterdir()) == ["report.html", "report.json"]


def test_unknown_key_is_an_error(tmp_path):
    with pytest.raises(LuthierError, match="auditt"):
        write_report(tmp_path, {"auditt": {}})


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path, example())
    old = (tmp_path / "report.html").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LuthierError, match="No space left"):
        write_report(tmp_path, {})
    assert (tmp_path / "report.html").read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_plain_knows_tensors_and_sets():
    import numpy as np

    assert plain({1: np.float32(0.5), "s": {3, 1}, "n": math.nan, "t": (1, 2)}) == {
        "1": 0.5,
        "s": [1, 3],
        "n": None,
        "t": [1, 2],
    }


@pytest.mark.parametrize(
    ("target", "guard", "status"),
    [
        ((0.1, 0.9), (0.9, 0.9), "learned"),
        ((0.1, 0.9), (0.9, 0.5), "learned at a cost"),
        ((0.5, 0.52), (0.9, 0.9), "learned nothing clear"),
        ((0.5, 0.2), (0.9, 0.9), "got worse"),
    ],
)
def test_verdict_says_what_the_intervals_allow(target, guard, status):
    audit = {"target": [check("t", "target", *target, 0.05)], "guards": [check("g", "guard", *guard, 0.05)]}
    assert words.verdict(audit)["status"] == status


def test_a_falling_loss_is_a_gain():
    worse = check("text", "guard", 3.0, 4.0, 0.1, unit="perplexity")
    assert words.direction(worse) == "worse"
    assert words.direction(check("text", "guard", 4.0, 3.0, 0.1, unit="perplexity")) == "better"


@pytest.mark.parametrize(
    ("value", "key", "told"),
    [(1_712_345, "bytes", "1.71 MB"), (41.3, "seconds", "41 s"), (0.0829, "share", "8.3 %"), (2000, "rows", "2,000"),
     (None, "x", "–"), (True, "ok", "yes"), (5000, "seconds", "83 min 20 s"), ([1, 2], "layers", "1, 2")],
)  # fmt: skip
def test_values_read_as_their_key_suggests(value, key, told):
    assert words.by_key(key, value) == told


if __name__ == "__main__":
    sys.stdout.write(f"{write_report(Path(sys.argv[1]), example())[1]}\n")


def test_a_drift_on_one_text_has_no_interval() -> None:
    data = example()
    for part in ("kl", "agreement"):
        data["audit"]["drift"][part] |= {"low": None, "high": None}
    assert "0.183 nats" in " ".join(read(render(data)).words)
