"""What a form is: how a delta is written down at one site, as pure functions of the numbers handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class No:
    """Something a form cannot do, with the reason. False in a condition; the conformance suite holds the form to it."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Site:
    """One place where a delta attaches.

    Shapes are those of a linear map y = x Wᵀ + b with W [d_out, d_in], however the model stores W. For an embedding
    d_in is the vocabulary; for a norm both are its width; for fused experts W is [experts, d_out, d_in]; for a layer,
    an attention or feed-forward module or the whole model both are the hidden width.
    """

    name: str
    """Module path in the model, as in the checkpoint's parameter names ('' for the whole model)."""
    role: str
    """attn.q, ffn.down, norm …"""
    layer: int | None
    kind: str
    """linear, conv1d, embedding, norm, fused-experts, attention, feed-forward, layer or model."""
    d_in: int
    d_out: int
    bias: bool = False
    parameter: str = "weight"
    """Name of the weight inside the module."""
    shape: tuple[int, ...] = ()
    """Shape of that parameter as the model stores it."""
    entries: int = 0
    """Entries of the parameter that move, where only some do."""
    experts: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    layers: int = 0
    """Number of layers in the site's stack."""


@dataclass
class Context:
    """What a form may know of the moment: shared by all sites of a model."""

    training: bool = False
    step: int = 0
    mask: Any = None
    """Padding mask of the batch, [B, T], 1 where there is a token; None when all are."""
    segments: Any = None
    """Packed rows: record number of each position [B, T], 0 for padding."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    aux: list[Any] = field(default_factory=list)

    def note(self, loss: Any) -> None:
        """Adds an auxiliary loss (a scalar tensor) of this forward pass."""
        self.aux.append(loss)


@dataclass
class State:
    """Everything a form's method is handed about one site."""

    site: Site
    p: Tensors
    """Trained numbers."""
    fixed: Tensors
    """Constant numbers, saved with the delta."""
    W: Callable[[], Tensor]
    """The base's weight [d_out, d_in], on demand."""
    bias: Tensor | None = None
    ctx: Context = field(default_factory=Context)
    product: bool = False
    """Whether the y of this call is x Wᵀ + b of a frozen W and b and nobody else reads it: `onto` may take it out of the graph,
    and then gives x the gradient of both."""


class Form:
    """Base of all forms: a frozen dataclass of hyper-parameters without tensors. See docs/add-a-method.md.

    Where `at` is 'weight', changes of several forms add, and each reads the base's x and y. At 'output' and 'hidden'
    they chain in the order in which they were attached. 'keys-values' gives extra keys and values to an attention module,
    'input' extra embeddings before the first token.
    """

    at: ClassVar[str] = "weight"
    """weight, output, hidden, keys-values or input; 'base' for what choices leave behind (edits in place)."""
    scope: ClassVar[str] = "site"
    """site, layer or model."""
    sites: ClassVar[tuple[str, ...]] = ("linear",)
    """Roles it goes to unless the plan says otherwise."""
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    """Kinds of site it can attach to."""
    dense: ClassVar[bool | No] = True
    """Whether `delta` gives the exact change of weight and bias."""
    identity: ClassVar[bool | No] = True
    """Whether the tuned model equals the base at the start."""
    scales: ClassVar[bool | No] = True
    """Whether the change can be multiplied by a number."""
    reads_output: ClassVar[bool] = True
    """Whether `change` looks at y; one that does not may add into it in place."""
    changes_weight: ClassVar[bool] = False
    """True for forms without a cheap path: the tensor W + delta is put in the weight's place during forward."""
    stride: ClassVar[float] = 0.05
    """How far its numbers have to be pushed off their start to change anything: more where they start saturated."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Trained numbers that all sites of a piece have in common, of one shape: one parameter on the model, a copy at every
    site in the delta."""
    paper: ClassVar[str] = ""

    def check(self, sites: Sequence[Site]) -> None:
        """Raises ValueError where the settings cannot be meant for these sites, which are all of a piece."""

    def build(self, site: Site, g: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained and constant numbers for a site, drawn with generator g, on the CPU in float32."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def start(self, s: State) -> tuple[Tensors, Tensors]:
        """Replaces what `build` drew by numbers that need the base's weight. Default: as built."""
        return s.p, s.fixed

    def before(self, x: Tensor, s: State) -> Tensor:
        """The changed input of the site's module."""
        return x

    def change(self, x: Tensor, y: Tensor, s: State) -> Tensor | None:
        """What is added to the module's output y [..., d_out] for the input x [..., d_in]; None for nothing."""
        return None

    def onto(self, total: Tensor, x: Tensor, y: Tensor, scale: float, s: State) -> Tensor:
        """total + scale · change, for forms that can do it in one go."""
        dy = self.change(x, y, s)
        return total if dy is None else total + (dy if scale == 1 else dy * scale)

    def delta(self, s: State) -> dict[str, Tensor] | No:
        """The exact change {'weight': [d_out, d_in], 'bias': [d_out]} (either may be missing) to the weight s.W()."""
        return self.dense if isinstance(self.dense, No) else No(f"{type(self).__name__} states no weight change")

    def count(self, site: Site) -> int:
        """How many numbers it trains at a site, as the paper counts; the shared ones apart."""
        raise NotImplementedError(f"{type(self).__name__} has no count")

    def count_shared(self, site: Site) -> int:
        """How many numbers all its sites have in common."""
        return 0

    def stored(self, site: Site, p: Tensors, fixed: Tensors) -> tuple[Tensors, Tensors]:
        """The numbers as they lie on disk, for forms that code them tighter there than they work with them."""
        return p, fixed

    def restored(self, site: Site, p: Tensors, fixed: Tensors) -> tuple[Tensors, Tensors]:
        """The numbers as they are worked with, from what `stored` gave; exact."""
        return p, fixed

    def penalty(self, s: State) -> Tensor | float:
        """The form's own regulariser, at a site."""
        return 0.0

    def penalty_shared(self, s: State) -> Tensor | float:
        """The regulariser of what its sites have in common, asked for once, at any of them."""
        return 0.0

    def extra(self, s: State) -> tuple[Tensor, Tensor] | Tensor | None:
        """For 'keys-values': (K, V), each [kv_heads, length, head_dim]. For 'input': embeddings [length, hidden]."""
        return None
