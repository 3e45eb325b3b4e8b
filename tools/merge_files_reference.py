"""Makes tests/numbers/merge_files.json: what mergekit writes for the merge files of tests/numbers/merge_files.py.

    PYTHON_WITH_MERGEKIT tools/merge_files_reference.py

Stored are type, shape, sum and a sample of every tensor: figures, none of mergekit's code or text.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    from mergekit.config import MergeConfiguration  # pyright: ignore[reportMissingImports]
    from mergekit.merge import run_merge  # pyright: ignore[reportMissingImports]
    from mergekit.options import MergeOptions  # pyright: ignore[reportMissingImports]

    from tests.numbers.merge_files import CASES, facts, make, placed

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        table = {"mergekit": version("mergekit"), "cases": {}}
        for name, plan in CASES.items():
            out = folder / "out" / name.replace(" ", "-")
            options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
            run_merge(MergeConfiguration.model_validate(placed(plan, folder)), str(out), options=options)
            table["cases"][name] = facts(out)
    target = ROOT / "tests" / "numbers" / "merge_files.json"
    target.write_text(json.dumps(table, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
