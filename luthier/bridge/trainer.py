"""One callback for the transformers Trainer, and TRL's: ledger and rehearsal before step one, probes before and after."""

from __future__ import annotations

import json
import logging
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from luthier.bases.hardware import peak_memory, reset_peak
from luthier.bridge.target import kind_of, logits_of
from luthier.delta.folder import UNWRITABLE, unwritten
from luthier.delta.probes import check_probes, record_probes
from luthier.errors import LuthierError

IGNORED = -100
"""Label of a token without loss."""
log = logging.getLogger("luthier")


@dataclass
class Window:
    """What the first rows say of the data. Counts over rows as the collator makes them."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    supervised: list[int] = field(default_factory=list)
    unsupervised_rows: list[int] = field(default_factory=list)
    ended_rows: int = 0
    unended_rows: int = 0
    at_limit_rows: int = 0
    limit: int = 0
    double_bos_rows: int = 0
    no_bos_rows: int = 0
    shifted_tokens: int = 0
    longest: int = 0
    longest_row: int = -1

    def to_dict(self) -> dict[str, Any]:
        """For luthier.json."""
        out = {k: v for k, v in asdict(self).items() if k not in ("supervised", "unsupervised_rows")}
        return out | {
            "supervised_per_row": {
                "min": min(self.supervised, default=0),
                "median": statistics.median(self.supervised) if self.supervised else 0,
                "max": max(self.supervised, default=0),
                "zero": len(self.unsupervised_rows),
            }
        }


class LuthierCallback(TrainerCallback):
    """Put it into `callbacks=[LuthierCallback()]` of a Trainer, SFTTrainer or any trainer of their kind.

    Before step one it reads the first `window` rows through the trainer's own collator, refuses a run that would train
    nothing, and takes the longest of them, as a full batch, through forward and backward. Everything is written to
    `output_dir/luthier.json`, and the probes to `luthier-probes.safetensors`. Random states are left as they were.

    unsupervised: 'error' refuses rows without a supervised token, 'count' only counts them. end_of_turn: 'require' refuses
    data whose end-of-turn is never supervised. rehearse: run the longest batch. A refusal is a LuthierError.
    """

    def __init__(
        self,
        window: int = 512,
        unsupervised: Literal["error", "count"] = "error",
        end_of_turn: Literal["require", "allow-missing"] = "require",
        rehearse: bool = True,
        probes: bool = True,
    ) -> None:
        self.window, self.unsupervised, self.end_of_turn = window, unsupervised, end_of_turn
        self.rehearse, self.probes = rehearse, probes
        self.report: dict[str, Any] = {}
        self._before: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ledger, rehearsal and the probes before."""
        model, words = kwargs["model"], kwargs.get("processing_class") or kwargs.get("tokenizer")
        loader = kwargs.get("train_dataloader")
        if loader is None:
            raise LuthierError("the trainer gives its callbacks no train_dataloader: use transformers 5 or newer")
        self.report = {"ledger": {}, "rehearsal": {}, "probes": {}, "notes": []}
        with _left_alone():
            rows = _rows(loader.dataset, self.window)
            seen = _read(rows, loader.collate_fn, words, model, args)
            self.report["ledger"] = seen.to_dict()
            self._write(args, state)
            self._judge(seen, words)
            if self.rehearse:
                self.report["rehearsal"] = _rehearse(model, rows, seen, loader, args)
            if self.probes:
                self._probe_before(model, words)
        self._write(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The probes after: whether training changed the model."""
        if not self._before:
            return
        model, words = kwargs["model"], kwargs.get("processing_class") or kwargs.get("tokenizer")
        before = iter(self._before)
        with _left_alone():
            run = logits_of(_plain(model))
            stored = record_probes(lambda ids: next(before), run, words)
            verdict = check_probes(stored, run)
        self.report["probes"] = {"ok": verdict.gap > 0, "gap": verdict.gap, "reason": verdict.reason}
        self._write(args, state)
        if state.is_world_process_zero:
            tensors = {k: v.contiguous() for k, v in stored.items()}
            with _told(args, state):
                save_file(tensors, Path(args.output_dir) / "luthier-probes.safetensors")
        if verdict.gap == 0:
            raise LuthierError(
                f"after {state.global_step} steps the model answers exactly as before: nothing was trained; check which "
                "parameters require gradients, the learning rate, and luthier.json"
            )

    def _judge(self, seen: Window, words: Any) -> None:
        """Refuses what would train nothing, or the wrong thing; notes the rest."""
        notes = self.report["notes"]
        if seen.rows == 0:
            raise LuthierError("the training data has no row: check the dataset")
        empty = seen.unsupervised_rows
        if empty and (self.unsupervised == "error" or len(empty) == seen.rows):
            which = ", ".join(map(str, empty[:5]))
            raise LuthierError(
                f"{len(empty)} of the first {seen.rows} rows have no supervised token (rows {which}{' …' if empty[5:] else ''}): "
                "the response marker or generation marks do not fit the template, or truncation cut the answer; correct "
                "that, or drop these rows"
            )
        if seen.shifted_tokens > 0.5 * seen.supervised_tokens:
            raise LuthierError(
                f"labels differ from input_ids at {seen.shifted_tokens} of {seen.supervised_tokens} supervised tokens: they are "
                "shifted already, and the model shifts them again; hand over unshifted labels"
            )
        if seen.ended_rows == 0 and seen.unended_rows and self.end_of_turn == "require":
            raise LuthierError(
                f"no row's end-of-turn ({getattr(words, 'eos_token', None)!r}) is supervised: the model would never learn to "
                "stop; use a pad token other than eos, a template that ends the answer with it, or "
                "LuthierCallback(end_of_turn='allow-missing')"
            )
        if seen.unended_rows:
            notes.append(f"{seen.unended_rows} of {seen.rows} rows end without a supervised end-of-turn")
        if seen.at_limit_rows:
            notes.append(
                f"{seen.at_limit_rows} of {seen.rows} rows are {seen.limit} tokens long, without an end: truncated"
            )
        if seen.double_bos_rows:
            notes.append(
                f"{seen.double_bos_rows} rows begin with two BOS: the template writes one and the tokenizer another"
            )
        for note in notes:
            log.warning("luthier: %s", note)

    def _probe_before(self, model: Any, words: Any) -> None:
        if words is None or not hasattr(words, "all_special_ids") or _wrapped(model):
            self.report["notes"].append("no probes: no tokenizer, or a model that is sharded")
            return
        self._before = []
        run = logits_of(_plain(model))

        def keep(ids: Tensor) -> Tensor:
            self._before.append(run(ids))
            return self._before[-1]

        replay = iter(self._before)
        record_probes(keep, lambda ids: next(replay), words)

    def _write(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            text = json.dumps(self.report, indent=1) + "\n"
            with _told(args, state):
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                (Path(args.output_dir) / "luthier.json").write_text(text, encoding="utf-8")


@contextmanager
def _told(args: Any, state: Any) -> Iterator[None]:
    """Makes one line of a write that fails."""
    try:
        yield
    except UNWRITABLE as e:
        taken = f"{state.global_step} steps were taken, and the model in memory is as they left it"
        raise unwritten(f"luthier's files in {args.output_dir}", e, taken) from e


@contextmanager
def _left_alone() -> Iterator[None]:
    """Leaves the random states as they are, so that the run is the one it would have been."""
    states = (
        random.getstate(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if states[2]:
            torch.cuda.set_rng_state_all(states[2])


def _rows(dataset: Any, window: int) -> list[Any]:
    """The first rows, read from the data set itself so that the loader's position and order stay untouched."""
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [dataset[i] for i in range(min(window, len(dataset)))]
    return list(islice(iter(dataset), window))


def _read(rows: list[Any], collate: Any, words: Any, model: Any, args: Any) -> Window:
    """Row by row through the collator, so that nothing is padded and every count is a row's own."""
    seen = Window()
    plain = _plain(model)
    ends, bos = _ends(words, plain), getattr(words, "bos_token_id", None)
    causal = kind_of(plain) == "causal" and "Masked" not in type(plain).__name__
    stated = getattr(args, "max_length", None) or getattr(args, "max_seq_length", None)
    unended: list[int] = []
    for number, row in enumerate(rows):
        batch = collate([row])
        ids, labels = batch["input_ids"][0], batch.get("labels")
        if labels is None or not isinstance(labels, Tensor) or labels.dim() < 2:
            raise LuthierError(
                "the collator gives no token labels: use a data collator that makes them, or leave this callback out"
            )
        labels = labels[0]
        mask = batch.get("attention_mask")
        real = mask[0].bool() if causal and isinstance(mask, Tensor) and mask.shape == ids[None].shape else ids == ids
        loss = labels != IGNORED
        count, length = int(loss[1:].sum() if causal else loss.sum()), int(real.sum())
        seen.rows, seen.tokens = seen.rows + 1, seen.tokens + length
        seen.supervised_tokens += count
        seen.supervised.append(count)
        if not count:
            seen.unsupervised_rows.append(number)
        if length > seen.longest:
            seen.longest, seen.longest_row = length, number
        ended = bool(torch.isin(labels[loss], ends).any())
        seen.ended_rows, seen.unended_rows = seen.ended_rows + ended, seen.unended_rows + (not ended)
        if not ended:
            unended.append(length)
        if causal:
            seen.shifted_tokens += int((labels[loss] != ids[loss]).sum())
            text = ids[real]
            if bos is not None and len(text) > 1:
                seen.double_bos_rows += bool(text[0] == bos and text[1] == bos)
                seen.no_bos_rows += bool(text[0] != bos)
    seen.limit = int(stated or seen.longest)
    seen.at_limit_rows = sum(length >= seen.limit for length in unended) if stated or len(unended) > 1 else 0
    return seen


def _ends(words: Any, model: Any) -> Tensor:
    """Ids at which generation stops: the tokenizer's eos and those of the generation config."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {getattr(words, "eos_token_id", None), *(stated if isinstance(stated, list) else [stated])}
    return torch.tensor(sorted(i for i in ids if i is not None), dtype=torch.long)


def _rehearse(model: Any, rows: list[Any], seen: Window, loader: Any, args: Any) -> dict[str, Any]:
    """The longest row, as a full batch, forward and backward; gradients are dropped afterwards."""
    if _wrapped(model):
        return {"ok": None, "reason": "not done: the model is sharded or on several processes"}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise LuthierError(
            "no parameter requires a gradient: nothing would be trained; attach the adapter as trainable"
        )
    size = getattr(args, "per_device_train_batch_size", 1)
    device = trained[0].device
    batch = loader.collate_fn([rows[seen.longest_row]] * size)
    batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    half = torch.bfloat16 if getattr(args, "bf16", False) else torch.float16 if getattr(args, "fp16", False) else None
    context = torch.autocast(device.type, half) if half else nullcontext()
    was, kept = model.training, [p.grad for p in trained]
    model.train()
    reset_peak(device)
    try:
        with context:
            loss = model(**batch).loss
        loss.backward()
        norm = float(
            torch.stack([p.grad.float().norm() for p in trained if p.grad is not None] or [torch.zeros(())]).norm()
        )
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise LuthierError(
            f"the longest batch ({size} × {seen.longest} tokens) does not fit in memory: lower per_device_train_batch_size and "
            "raise gradient_accumulation_steps, lower the maximum length, or set gradient_checkpointing"
        ) from e
    finally:
        for p, grad in zip(trained, kept, strict=True):
            p.grad = grad
        model.train(was)
    told = {
        "rows": size,
        "length": seen.longest,
        "loss": float(loss),
        "grad_norm": norm,
        "peak_memory": peak_memory(device),
    }
    if not torch.isfinite(loss) or norm != norm or norm == float("inf"):
        raise LuthierError(
            f"the longest batch (row {seen.longest_row}) gives loss {float(loss):.3g} and gradient norm {norm:.3g}: check that "
            "row, the labels, and the precision (fp16 overflows where bf16 does not)"
        )
    if norm == 0:
        raise LuthierError(
            f"the longest batch gives a loss of {float(loss):.3g} and no gradient at {len(trained)} trainable tensors: nothing "
            "would be trained; with gradient checkpointing set use_reentrant to False"
        )
    return {"ok": True, **told}


def _plain(model: Any) -> Any:
    """The transformers model inside wrappers that keep its forward (PEFT's hold prompts too, so they stay)."""
    return getattr(model, "module", model)


def _wrapped(model: Any) -> bool:
    return hasattr(model, "module") or any("Sharded" in type(m).__name__ or "FSDP" in type(m).__name__ for m in [model])
