"""Writes luthier/papers/table.jsonl: from a list of papers, or one row's claim at a time.

    python tools/papers_table.py build PAPERS.jsonl      facts anew, claims that are in the table are kept
    python tools/papers_table.py claim P110 --status works --name forms.lora --recipe lora.yaml \
        --evidence tests/contract/test_forms.py::test_merged

`build` reads id, title, room, kind and fits of each line and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.papers import STATUSES, Paper, check, paper
from luthier.papers.table import papers

TABLE = Path(__file__).parents[1] / "luthier" / "papers" / "table.jsonl"
FACTS = ("id", "title", "room", "kind", "fits")
CLAIMS = ("status", "names", "recipe", "evidence", "reason")
BECOMES = {
    "study": "experiment",
    "theory": "experiment",
    "benchmark": "experiment",
    "survey": "page",
    "dataset": "page",
    "model": "recipe",
}
"""What a row that is not a method turns into."""
BOUND = {
    "P040": "coded health-record events instead of text",
    "P061": "microscope images of tissue",
    "P098": "satellite images, masked-patch pretraining",
    "P209": "images from radio telescopes",
    "P283": "a review of image-and-text models",
    "P322": "image patches, a pretraining task for them",
    "P359": "time series, not tokens of text",
    "P362": "photographs of crops",
    "P374": "screenshots and touch coordinates",
    "P378": "driving control in a learned world model",
    "P379": "anomaly maps from image features",
    "P381": "image restoration by diffusion",
    "P385": "image generation from mixed conditions",
    "P391": "the patch embedding of vision transformers",
    "P395": "portraits made by image diffusion",
    "P400": "image-text retrieval with two encoders",
    "P409": "the noise process of flows and diffusion",
    "P414": "points and boxes in medical images",
    "P420": "prompts made from image patches",
    "P422": "face restoration by image diffusion",
    "P425": "generation of video frames",
    "P440": "scores and training of image generators",
    "P445": "satellite bands and other earth-observation rasters",
}
"""Rows of another modality: what their mechanism is tied to."""


def built(source: Path) -> list[dict[str, Any]]:
    """The rows of a list of papers, with the claims that the table has already."""
    before = {p.id: p for p in papers()} if TABLE.exists() else {}
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        facts = json.loads(line)
        row: dict[str, Any] = {key: facts[key] for key in FACTS}
        if row["id"] in before:
            row |= {key: getattr(before[row["id"]], key) for key in CLAIMS}
        elif row["fits"] == "out":
            row |= {"status": "other modality", "reason": f"bound to {BOUND[row['id']]}"}
        else:
            row["status"] = "not yet"
        if row["status"] != "other modality":
            row["becomes"] = BECOMES.get(row["kind"])
        rows.append(row)
    return sorted(rows, key=lambda r: r["id"])


def write(rows: list[dict[str, Any]]) -> None:
    """One line for each row; what is empty is left out."""
    keys = [f.name for f in fields(Paper)]
    lines = (json.dumps({k: r[k] for k in keys if r.get(k)}, ensure_ascii=False) for r in rows)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line; a claim that is not true is refused before anything is written."""
    parser = argparse.ArgumentParser(description="Writes the table of papers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build").add_argument("source", type=Path)
    claim = commands.add_parser("claim")
    claim.add_argument("id")
    claim.add_argument("--status", choices=STATUSES, required=True)
    claim.add_argument("--name", action="append", default=[], help="dotted path below luthier; may be repeated")
    claim.add_argument("--recipe")
    claim.add_argument("--evidence")
    claim.add_argument("--reason")
    args = parser.parse_args()
    if args.command == "build":
        write(built(args.source))
        return
    try:
        old = paper(args.id)
        stated = {"status": args.status, "recipe": args.recipe, "evidence": args.evidence, "reason": args.reason}
        row = {**vars(old), **stated, "names": tuple(args.name)}
        if broken := check(Paper(**row)):
            raise LuthierError("; ".join(broken))
    except LuthierError as e:
        sys.stderr.write(f"{e}\n")
        raise SystemExit(2) from e
    write([row if p.id == old.id else vars(p) for p in papers()])


if __name__ == "__main__":
    main()
