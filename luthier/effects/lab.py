"""The bench an effect works at: records of the world, tuned models, and scores of them, item by item."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.delta.artefact import Delta
from luthier.delta.seals import seals_of
from luthier.effects.contract import Cell
from luthier.errors import LuthierError
from luthier.plan.load import load_plan
from luthier.practice import card
from luthier.practice.world import Record, records, verify
from luthier.sampling.generate import GREEDY, Sampling, generate
from luthier.training.run import Training, build

TRIAL_SEED = 5
"""The world's seed of what trial runs are scored on; what counts has seed 0. The base was trained on seed 1."""


@dataclass
class Model:
    """A model at hand, and its scores: each a list with an entry for every record, in order."""

    model: Any
    tokenizer: Any
    training: Training | None = None

    def solves(self, asked: Sequence[Record]) -> list[float]:
        """1 where the verifier passes the greedy answer, else 0."""
        said = card.answers(self.model, self.tokenizer, asked)
        return [verify(r, s).reward for r, s in zip(asked, said, strict=True)]

    def says(self, asked: Sequence[Record], most: int | None = None, sampling: Sampling = GREEDY) -> list[str]:
        """An answer to every record, of at most so many tokens (default card.LONGEST), greedy unless told otherwise;
        an assembly can be asked too."""
        prompts = [self._prompt(r) for r in asked]
        ids = generate(self.model, self.tokenizer, prompts, most or card.LONGEST, 64, sampling=sampling)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def losses(self, asked: Sequence[Record]) -> list[float]:
        """Mean loss in nats over the tokens of each record's last turn, its end included."""
        prompts = [self._prompt(r) for r in asked]
        answers = [[*self.tokenizer(r["messages"][-1]["content"])["input_ids"], self.end] for r in asked]
        return [-float(p.mean()) for p in self.logprobs(prompts, answers)]

    def logprobs(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch: int = 64
    ) -> list[torch.Tensor]:
        """Log-probability of every token of answer i after prompt i, [tokens of answer i]."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            rows = [prompts[i] + answers[i] for i in chosen]
            ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
            for k, row in enumerate(rows):
                ids[k, : len(row)] = torch.tensor(row)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=(ids != self.tokenizer.pad_token_id).long()).logits
            told = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            for k, i in enumerate(chosen):
                first = len(prompts[i]) - 1
                out[i] = told[k, first : first + len(answers[i])]
        return out

    def shares(self, asked: Sequence[Record], options: Sequence[str]) -> torch.Tensor:
        """Probability of each option as the whole answer to each record, made to add up to 1: [records, options]."""
        prompts = [self._prompt(r) for r in asked for _ in options]
        answers = [[*self.tokenizer(option)["input_ids"], self.end] for _ in asked for option in options]
        sums = torch.tensor([float(p.sum()) for p in self.logprobs(prompts, answers)])
        return sums.view(len(asked), len(options)).softmax(1)

    def saved(self, folder: Path) -> str:
        """Its delta, sealed, as a folder: what a plan, an edit or an assembly can be told to start from."""
        if self.training is None:
            raise LuthierError(f"effects: {folder} cannot be written, for this model was not tuned; tune it first")
        delta = self.training.delta()
        delta.seals = seals_of(self.training.handle)
        return str(delta.save(folder))

    @property
    def end(self) -> int:
        """The token that ends a turn."""
        return self.tokenizer.eos_token_id

    def _prompt(self, record: Record) -> list[int]:
        return self.tokenizer.apply_chat_template(
            record["messages"][:-1], add_generation_prompt=True, return_dict=False
        )


class Lab:
    """What one cell of an effect works with. ``scratch`` is a folder of its own."""

    def __init__(self, base: str, cell: Cell, scratch: Path) -> None:
        self.base, self.cell, self.scratch = base, cell, scratch
        scratch.mkdir(parents=True, exist_ok=True)

    def items(self, family: str, n: int, split: str = "test", **options: Any) -> list[Record]:
        """n records to score on: the same in every run that counts, others in trials."""
        return list(records(family, split, n, seed=TRIAL_SEED if self.cell.trial else 0, **options))

    def told(self, family: str, n: int, **options: Any) -> list[Record]:
        """n train records to tune on: others for every seed."""
        return list(records(family, "train", n, seed=0, start=n * self.cell.seed, **options))

    @contextmanager
    def tuned(self, told: Sequence[Record], **settings: Any) -> Iterator[Model]:
        """The base tuned at the cell's rate and seed on these records, in fp32. Settings are keys of ``plan``."""
        training = build(load_plan(self.plan(told, **settings)), self.scratch / "run", progress=False)
        training.train()
        try:
            yield Model(training.base.model, training.base.tokenizer, training)
        finally:
            training.machine.close()
            gc.collect()

    @contextmanager
    def untouched(self, base: str | None = None, deltas: Sequence[str | Delta] = ()) -> Iterator[Model]:
        """The base as it is, or another, or with these deltas (or their folders) on it."""
        from luthier.bases.load import load_base
        from luthier.plan.schema import BaseSpec

        got = load_base(BaseSpec(name=base or self.base, dtype="float32"), device=torch.device("cpu"))  # pyright: ignore
        for delta in deltas:
            (Delta.load(delta) if isinstance(delta, str) else delta).apply(got.model)
        yield Model(got.model.eval(), got.tokenizer)
        gc.collect()

    def plan(
        self,
        told: Sequence[Record],
        *,
        delta: Mapping[str, Any],
        steps: int,
        batch: int = 16,
        rate: float | None = None,
        base: Any = None,
        **train: Any,
    ) -> dict[str, Any]:
        """A plan of ``steps`` steps of ``batch`` records; ``delta`` is one entry of plan.delta, other keys go to train."""
        path = self.scratch / "records.jsonl"
        path.write_text("".join(json.dumps({"messages": r["messages"]}) + "\n" for r in told))
        return {
            "base": base or self.base,
            "data": {"train": str(path), "max_length": 256, "cache": False},
            "delta": dict(delta),
            "train": {
                "steps": steps,
                "batch_size": batch,
                "lr": rate if rate is not None else self.cell.rate,
                "seed": self.cell.seed,
                "precision": "fp32",
                "rehearse": False,
                **train,
            },
            "audit": {"enabled": False},
        }
