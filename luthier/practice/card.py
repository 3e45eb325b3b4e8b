"""The practice base's card, measured anew: ``python -m luthier.practice.card`` writes card.json and README.md beside it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.practice.world import SPLITS, Record, families, family_named, records, taught, untaught, verify

ASSET = Path(__file__).parent.parent / "assets" / "practice" / "base"
COMMAND = "python -m luthier.practice.card"
LONGEST = 72
"""Most tokens of an answer, unless the right answers of its batch are longer: then a quarter more than the longest."""


def load(folder: Path = ASSET) -> tuple[Any, Any]:
    """Model (fp32, in evaluation) and tokenizer of a base's folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "model.safetensors").is_file():
        raise LuthierError(f"practice base: no model in {folder}; train one with python -m luthier.practice.train_base")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval(), tokenizer


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


def measure(folder: Path = ASSET, n: int = 200, only: Sequence[str] = ()) -> dict[str, Any]:
    """The card: score per family per split, perplexity per family, what it was trained on and what never. With ``only``
    some families, the others' figures are those of the folder's present card, which must be of ``n`` items too."""
    model, tokenizer = load(folder)
    told = folder / "training.json"
    kept: dict[str, Any] = {"scores": {}, "perplexity": {}}
    if only:
        kept = json.loads((folder / "card.json").read_text())
        missing = set(families()) - set(only) - set(kept["scores"])
        if kept["items"] != n or missing:
            raise LuthierError(
                f"practice base: the card in {folder} has {kept['items']} items a family and lacks "
                f"{', '.join(sorted(missing)) or 'none'}; measure all families"
            )
    for name in only or families():
        kept["scores"][name] = {s: round(score(model, tokenizer, name, s, n), 4) for s in SPLITS}
        kept["perplexity"][name] = round(perplexity(model, tokenizer, name, n), 3)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "training": json.loads(told.read_text()) if told.is_file() else None,
        "taught": taught(),
        "never_taught": untaught(),
        "items": n,
        "scores": {name: kept["scores"][name] for name in families()},
        "perplexity": {name: kept["perplexity"][name] for name in families()},
        "command": COMMAND,
    }


def page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    rows = [
        f"| {f} | {'yes' if f in card['taught'] else 'never'} | "
        + " | ".join(f"{100 * card['scores'][f][s]:.1f}" for s in SPLITS)
        + f" | {card['perplexity'][f]:.2f} | {family_named(f).ABOUT} |"
        for f in (*card["taught"], *card["never_taught"])
    ]
    run = card["training"]
    trained = (
        f"Trained on {run['tokens']:,} tokens ({run['records']:,} records, {run['steps']:,} steps) that the taught families'\n"
        "generators made, and on nothing else."
        if run
        else "Its training is not on record."
    )
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            "# The practice base",
            "",
            f"A Llama of {card['parameters'] / 1e6:.1f} million parameters with a vocabulary of {card['vocabulary']:,}, to practise tuning on.",
            "It knows a small invented world: well in some families of tasks, not at all in others, so that tuning it has",
            f"something to gain and something to lose. {trained}",
            "",
            f"Exact match in per cent, greedy, {card['items']} records of each family and split; perplexity of the true answers",
            "in the test split.",
            "",
            "| family | taught | train | test | shifted | perplexity | what it asks |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Never taught: {', '.join(card['never_taught'])}.",
            "",
            "Train it again: `python -m luthier.practice.train_base --install`"
            + (f" ({run['steps']:,} steps, {run['threads']} threads, torch {run['torch']})." if run else "."),
            *([run["note"]] if run and "note" in run else []),
            "",
            f"Measure this page again: `{card['command']}`.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--base", type=Path, default=ASSET, help="folder of the base (default: the package's own)")
    parser.add_argument("--items", type=int, default=200, help="records of each family and split (default 200)")
    parser.add_argument("--families", default="", help="measure these only, keep the card's other figures (a,b,…)")
    told = parser.parse_args(arguments)
    try:
        card = measure(told.base, told.items, [name for name in told.families.split(",") if name])
    except LuthierError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    (told.base / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (told.base / "README.md").write_text(page(card))
    sys.stdout.write(page(card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
