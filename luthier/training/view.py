"""One micro-batch as an objective sees it: what it asks for is computed, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.parts.logprobs import token_logprobs

Batch = dict[str, Any]
BLOCK = 32


def block_of(dtype: torch.dtype, device: torch.device) -> int:
    """Positions that go together. On a CPU, bfloat16 products of whole blocks share their compiled kernels; any other number
    of rows has kernels of its own, half a megabyte a product, compiled when it is first seen."""
    return BLOCK if dtype == torch.bfloat16 and device.type in ("cpu", "meta") else 1


class HeadSelector:
    """Lets only chosen positions reach the head: logits that carry no loss are never computed.

    A pre-hook on the output embedding, so it holds for every architecture, whatever its forward does around it.
    Positions are filled up to a multiple of `block` with others, whose logits are cut off again.
    """

    def __init__(self, head: nn.Module, block: int = 1) -> None:
        self.block = block
        self.index: Tensor | None = None
        self.full_length = 0
        """Positions of the batch, B·T, while selecting."""
        self.hook = head.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.index is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.index].unsqueeze(0), *args[1:])

    @contextmanager
    def at(self, index: Tensor, full_length: int) -> Iterator[None]:
        """Within: the head sees the flat positions `index` of [B·T] only, as a batch of one row."""
        self.index, self.full_length = index, full_length
        try:
            yield
        finally:
            self.index = None


class Answers(NamedTuple):
    """A batch by rows; of comparisons [2B] the better answers come first."""

    logprobs: Tensor
    """[B] sum of log-probabilities over the supervised tokens, each counted once."""
    tokens: Tensor
    """[B] how many they are."""
    weights: Tensor
    """[B] loss weight of the row: that of its heaviest token."""


class View:
    """A batch on a model. Attributes are computed when first read.

    Decoder-only: `batch` has input_ids [B, T], attention_mask, position_ids, weights [B, T] (of predicting that token)
    and `segments` with `mask_4d` when packed. Sequence-to-sequence: target_ids [B, S] with their weights and
    decoder_input_ids. Classification: labels and label_weights. `off`, where an objective needs the reference, hides
    what trains while it is entered.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        selector: HeadSelector | None,
        kind: str = "causal",
        off: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model, self.batch, self.selector, self.kind, self.off = model, batch, selector, kind, off

    @cached_property
    def _supervised(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.kind == "seq2seq":
            weights, tokens, shift = self.batch["weights"], self.batch["target_ids"], 0
        else:
            weights, tokens, shift = self.batch["weights"][:, 1:], self.batch["input_ids"][:, 1:], 1
        rows, columns = torch.nonzero(weights, as_tuple=True)
        index = rows * (weights.shape[1] + shift) + columns
        return index, tokens[rows, columns], weights[rows, columns].float(), rows

    @cached_property
    def _selected(self) -> Tensor:
        """Flat positions of the supervised tokens, and after them as many others as fill the last block, where there are."""
        index = self._supervised[0]
        if self.selector is None or not (more := -len(index) % self.selector.block):
            return index
        free = torch.ones(self.batch["weights"].numel(), dtype=torch.bool, device=index.device).index_fill(
            0, index, False
        )
        return torch.cat([index, free.nonzero()[:more, 0]])

    @property
    def weights(self) -> Tensor:
        """[N] loss weight of each supervised token."""
        return self._supervised[2]

    @property
    def targets(self) -> Tensor:
        """[N] the supervised tokens."""
        return self._supervised[1]

    @property
    def rows(self) -> Tensor:
        """[N] row of the batch each supervised token belongs to."""
        return self._supervised[3]

    def inputs(self) -> Batch:
        """What the model's forward is given."""
        keep = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids")
        given = {k: self.batch[k] for k in keep if k in self.batch}
        if "mask_4d" in self.batch:
            given["attention_mask"] = self.batch["mask_4d"]
        elif self.kind == "causal":
            # Padding stands on the right, where causal attention never looks from a token: no mask, a faster kernel.
            del given["attention_mask"]
        if self.kind != "classify":
            given["use_cache"] = False
        return given

    @cached_property
    def logits(self) -> Tensor:
        """[N, V] at the supervised tokens only."""
        rows, n = self._rows, len(self.targets)
        return rows if len(rows) == n else rows[:n]

    @cached_property
    def _rows(self) -> Tensor:
        """[N', V] at the selected positions: the supervised tokens, and after them what fills the last block."""
        if self.off is not None:
            _ = (
                self.reference
            )  # first: what it puts back in place must not change under a pass that has its backward to come
        if self.selector is None:
            out = self.model(**self.inputs()).logits
            return out.reshape(-1, out.shape[-1])[self._supervised[0]]
        with self.selector.at(self._selected, self.batch["weights"].numel()):
            logits = self.model(**self.inputs()).logits
        if logits.shape[-2] != len(self._selected):
            raise LuthierError(
                f"the model gave {logits.shape[-2]} rows of logits for {len(self._selected)} selected tokens: "
                "its head is not where get_output_embeddings() says; report this architecture"
            )
        return logits.reshape(-1, logits.shape[-1])

    @cached_property
    def logprobs(self) -> Tensor:
        """[N] log-probability of each supervised token, float32."""
        # Of all rows, and cut after: behind a slice the loss could not write its gradient over the logits.
        more = len(self._rows) - len(self.targets)
        return token_logprobs(self._rows, nn.functional.pad(self.targets, (0, more)))[: len(self.targets)]

    @cached_property
    def answers(self) -> Answers:
        """The supervised tokens row by row."""
        _, _, weights, rows = self._supervised
        zero = torch.zeros(len(self.batch["input_ids"]), device=weights.device)
        heaviest = zero.scatter_reduce(0, rows, weights, "amax")
        return Answers(
            zero.index_add(0, rows, self.logprobs), zero.index_add(0, rows, torch.ones_like(weights)), heaviest
        )

    @cached_property
    def reference(self) -> View:
        """The same batch as the base answers it: without what trains, in evaluation mode, without gradients."""
        assert self.off is not None, "an objective reads the reference and does not say that it needs it"
        then, was = View(self.model, self.batch, self.selector, self.kind), self.model.training
        then.__dict__ |= {k: v for k, v in self.__dict__.items() if k in ("_supervised", "_selected")}
        self.model.eval()
        try:
            with torch.no_grad(), self.off():
                _ = then.logprobs
        finally:
            self.model.train(was)
        return then

    @cached_property
    def class_logits(self) -> Tensor:
        """[B, classes]."""
        return self.model(**self.inputs()).logits

    @property
    def labels(self) -> Tensor:
        """[B] class indices."""
        return self.batch["labels"]

    @property
    def record_weights(self) -> Tensor:
        """[B] loss weight of each record."""
        return self.batch["label_weights"]
