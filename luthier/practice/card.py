"""A practice base's card, measured anew: ``python -m luthier.practice.card`` writes card.json and README.md beside it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.bases.built import ASSETS, SHIPPED, entry, practice_folder
from luthier.errors import LuthierError, in_one_line
from luthier.practice.world import SPLITS, Record, families, family_named, records, taught, verify

ASSET = ASSETS / "base"
COMMAND = "python -m luthier.practice.card"
LONGEST = 72
"""Most tokens of an answer, unless the right answers of its batch are longer: then a quarter more than the longest."""


def load(folder: Path = ASSET) -> tuple[Any, Any]:
    """Model (fp32, in evaluation) and tokenizer of a base's folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    from luthier.bases.tokens import without_place

    if not (folder / "model.safetensors").is_file():
        raise LuthierError(f"practice base: no model in {folder}; build one with `make practice-base NAME=…`")
    tokenizer = without_place(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    encoder = AutoConfig.from_pretrained(folder, local_files_only=True).model_type == "bert"
    builder = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    return builder.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval(), tokenizer


def answers(model: Any, tokenizer: Any, asked: Sequence[Record], batch: int = 64) -> list[str]:
    """The model's greedy answer to every record, in order; prompts of like length go together."""
    import torch

    prompts = [
        tokenizer.apply_chat_template(r["messages"][:-1], add_generation_prompt=True, return_dict=False) for r in asked
    ]
    order = sorted(range(len(asked)), key=lambda i: (len(prompts[i]), len(asked[i]["answer"])))
    said = [""] * len(asked)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        told = [len(tokenizer(asked[i]["messages"][-1]["content"])["input_ids"]) for i in chosen]
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=max(LONGEST, max(told) * 5 // 4), do_sample=False)
        for i, row in zip(chosen, out[:, inputs["input_ids"].shape[1] :], strict=True):
            said[i] = tokenizer.decode(row, skip_special_tokens=True)
    return said


def score(model: Any, tokenizer: Any, family: str, split: str, n: int, seed: int = 0) -> float:
    """Share of n records of a family's split that the verifier passes, answered greedily."""
    asked = list(records(family, split, n, seed))
    said = answers(model, tokenizer, asked)
    return sum(verify(r, s).reward == 1.0 for r, s in zip(asked, said, strict=True)) / n


def perplexity(model: Any, tokenizer: Any, family: str, n: int, seed: int = 0) -> float:
    """exp of the mean loss over the tokens that the assistant says in n test records."""
    import torch

    total, count = 0.0, 0
    asked = sorted(records(family, "test", n, seed), key=lambda r: sum(len(m["content"]) for m in r["messages"]))
    for at in range(0, n, 50):
        rows = [
            tokenizer.apply_chat_template(r["messages"], return_dict=True, return_assistant_tokens_mask=True)
            for r in asked[at : at + 50]
        ]
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            these, spoken = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"], dtype=torch.bool)
            ids[i, : len(these)] = these
            labels[i, : len(these)] = torch.where(spoken, these, -100)
        with torch.inference_mode():
            logits = model(ids.to(model.device)).logits[:, :-1].float()
        targets = labels[:, 1:].to(logits.device)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return math.exp(total / count)


def masked(model: Any, tokenizer: Any, family: str, split: str, n: int, seed: int = 0) -> tuple[float, float]:
    """Of an encoder: (share of masked tokens that it guesses, exp of its mean loss on them) in n records of a split.

    A record is its whole conversation, cut where the rows ended that the encoder was trained on.
    """
    import torch

    from luthier.practice.shapes import cover
    from luthier.practice.train_base import Run

    right, total, count = 0, 0.0, 0
    asked = list(records(family, split, n, seed))
    for at in range(0, n, 50):
        texts = [tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in asked[at : at + 50]]
        rows = tokenizer.pad({"input_ids": [t[: Run.length] for t in texts]}, padding_side="right", return_tensors="pt")
        ids, real = rows["input_ids"].to(model.device), rows["attention_mask"].to(model.device)
        shown, hidden = cover(ids, real.bool(), seed + at, model.config.vocab_size, tokenizer.mask_token_id)
        with torch.inference_mode():
            logits = model(input_ids=shown, attention_mask=real).logits[hidden].float()
        right += int((logits.argmax(-1) == ids[hidden]).sum())
        total += torch.nn.functional.cross_entropy(logits, ids[hidden], reduction="sum").item()
        count += int(hidden.sum())
    return right / count, math.exp(total / count)


def figures(model: Any, tokenizer: Any, family: str, n: int) -> tuple[dict[str, float], float]:
    """(score of each split, perplexity in the test split) of a base in one family."""
    if model.config.model_type == "bert":
        found = {split: masked(model, tokenizer, family, split, n) for split in SPLITS}
        return {split: round(share, 4) for split, (share, _) in found.items()}, round(found["test"][1], 3)
    scores = {split: round(score(model, tokenizer, family, split, n), 4) for split in SPLITS}
    return scores, round(perplexity(model, tokenizer, family, n), 3)


def told_of(run: dict[str, Any] | None) -> tuple[str, ...]:
    """The families that a base was told of: those of its run's text, and its parent's. ``run``: its training.json."""
    if run is None or "families" not in run:
        return taught()
    own = {name.partition(":")[0] for name in (*run["families"], *run.get("parent_families", ()))}
    return tuple(name for name in families() if name in own)


def measure(folder: Path = ASSET, n: int = 200, only: Sequence[str] = (), command: str = COMMAND) -> dict[str, Any]:
    """The card: score per family per split, perplexity per family, what it was trained on and what never. With ``only``
    some families, the others' figures are those of the folder's present card, which must be of ``n`` items too.
    ``command`` is what measures it again."""
    if n < 1:
        raise LuthierError(f"practice base: a card of {n} items a family: choose 1 at least")
    for name in only:
        family_named(name)
    model, tokenizer = load(folder)
    told = folder / "training.json"
    kept: dict[str, Any] = {"scores": {}, "perplexity": {}}
    if only:
        kept = json.loads((folder / "card.json").read_text())
        missing = set(families()) - set(only) - set(kept["scores"])
        if kept["items"] != n:
            raise LuthierError(
                f"practice base: the card in {folder} has {kept['items']} items a family: state --items {kept['items']}, or "
                "measure all families"
            )
        if missing:
            raise LuthierError(
                f"practice base: the card in {folder} lacks {', '.join(sorted(missing))}: name these too "
                "(--families A,B), or measure all families"
            )
    for name in only or families():
        kept["scores"][name], kept["perplexity"][name] = figures(model, tokenizer, name, n)
    run = json.loads(told.read_text()) if told.is_file() else None
    known = told_of(run)
    return {
        "kind": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training": run,
        "taught": known,
        "never_taught": tuple(name for name in families() if name not in known),
        "items": n,
        "scores": {name: kept["scores"][name] for name in families()},
        "perplexity": {name: kept["perplexity"][name] for name in families()},
        "command": command,
    }


WHAT = {"llama": "A Llama", "mixtral": "A mixture of experts", "bert": "A BERT"}


def page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    rows = [
        f"| {f} | {'yes' if f in card['taught'] else 'never'} | "
        + " | ".join(f"{100 * card['scores'][f][s]:.1f}" for s in SPLITS)
        + f" | {card['perplexity'][f]:.2f} | {family_named(f).ABOUT} |"
        for f in (*card["taught"], *card["never_taught"])
    ]
    run = card["training"] or {}
    name, kind = run.get("base", SHIPPED), card.get("kind", "llama")
    again = "make practice-base" + (f" NAME={name}" if name != SHIPPED else "")
    about = entry(name)["about"] if name != SHIPPED else ""
    encoder = kind == "bert"
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            f"pipeline_tag: {'fill-mask' if encoder else 'text-generation'}",
            "---",
            "",
            f"# practice/{name}" if name != SHIPPED else "# The practice base",
            "",
            *([f"{about[0].upper()}{about[1:]}.", ""] if about else []),
            f"{WHAT[kind]} of {card['parameters'] / 1e6:.1f} million parameters with a vocabulary of {card['vocabulary']:,}, to practise tuning on.",
            "It knows a small invented world: well in some families of tasks, not at all in others, so that tuning it has",
            f"something to gain and something to lose. {_training(run)}",
            "",
            f"{'Masked tokens guessed' if encoder else 'Exact match'} in per cent, {'' if encoder else 'greedy, '}{card['items']} records of each family and split; perplexity of the true {'tokens' if encoder else 'answers'}",
            "in the test split.",
            "",
            "| family | taught | train | test | shifted | perplexity | what it asks |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Never taught: {', '.join(card['never_taught'])}.",
            "",
            f"Train it again: `{again}`"
            + (f" ({run['steps']:,} steps, {run['threads']} threads, torch {run['torch']})." if run else "."),
            *([run["note"]] if "note" in run else []),
            *(_kept(run["kept"], run["parent"]) if "kept" in run else []),
            "",
            f"Measure this page again: `{card['command']}`.",
            "",
        ]
    )


def _kept(kept: dict[str, Any], parent: str) -> list[str]:
    """What the compressions of the change cost, on the families told of; the one it is kept in last."""
    mean = {"bf16": sum(kept["before"].values()) / len(kept["before"])}
    mean |= {way["method"]: sum(way["scores"].values()) / len(way["scores"]) for way in kept["tried"]}
    size = {way["method"]: f"{way['bytes']:,} bytes" for way in kept["tried"]}
    rows = [f"| {way} | {size.get(way, 'whole')} | {100 * score:.1f} |" for way, score in mean.items()]
    held = f"Kept as a delta on practice/{parent} by {kept['as']}" if kept["as"] != "bf16" else "Kept whole"
    return [
        "",
        f"{held}. Mean test score of the families told of:",
        "",
        "| kept as | size | score |",
        "|---|---|---|",
        *rows,
    ]


def _training(run: dict[str, Any]) -> str:
    if not run:
        return "Its training is not on record."
    amount = f"{run['tokens']:,} tokens ({run['records']:,} records, {run['steps']:,} steps)"
    if "parent" not in run:
        return f"Trained on {amount} that the taught families'\ngenerators made, and on nothing else."
    told = ", ".join(f"{family} {share}" for family, share in run["run"]["mixture"].items())
    grown = ", made larger," if "grown" in run else ","
    return f"Starting from practice/{run['parent']}{grown} trained on\n{amount} in these shares: {told}."


def write(folder: Path, n: int = 200, only: Sequence[str] = (), command: str = "") -> str:
    """Measure a base's card and write card.json and README.md into its folder; gives the page."""
    command = command or (COMMAND if folder == ASSET else f"{COMMAND} --base {folder}")
    card = measure(folder, n, only, command)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(page(card))
    return page(card)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--base", default="practice", help="a practice base's name, or its folder (default: practice)")
    parser.add_argument("--items", type=int, default=200, help="records of each family and split (default 200)")
    parser.add_argument("--families", default="", help="measure these only, keep the card's other figures (a,b,…)")
    told = parser.parse_args(arguments)
    try:
        named = told.base.split("/")[0] == "practice"
        folder = practice_folder(told.base) if named else Path(told.base)
        command = f"{COMMAND} --base {told.base}" if named and folder != ASSET else ""
        shown = write(folder, told.items, [name for name in told.families.split(",") if name], command)
    except (LuthierError, OSError) as error:
        sys.stderr.write(f"{in_one_line(error)}\n")
        return 2
    sys.stdout.write(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
