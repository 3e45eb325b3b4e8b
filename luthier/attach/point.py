"""What happens at one module: inputs chain, changes of the weight add, outputs chain. Installed as forward hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from luthier.attach.weights import oriented
from luthier.delta import Form, State


@dataclass(eq=False)
class Placed:
    """A piece at one site of a model."""

    piece: str
    form: Form
    state: State
    scale: float


class Point:
    """The hooks of one module. With nothing switched on they return at once and the module is the base's."""

    def __init__(self, module: nn.Module, switch: Any) -> None:
        self.module, self.switch = module, switch
        self.placed: list[Placed] = []
        self._swapped: list[tuple[str, nn.Parameter | None]] = []
        self._arrange()
        self._hooks = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def add(self, placed: Placed) -> None:
        self.placed.append(placed)
        self._arrange()

    def drop(self, piece: str) -> None:
        self.placed = [q for q in self.placed if q.piece != piece]
        self._arrange()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrange(self) -> None:
        weight = [q for q in self.placed if q.form.at == "weight"]
        self.swaps = [q for q in weight if q.form.changes_weight or q.state.site.kind in ("fused-experts", "norm")]
        # Forms that do not look at y come last: they may add into it in place.
        self.adds = sorted((q for q in weight if q not in self.swaps), key=lambda q: not q.form.reads_output)
        self.chain = [q for q in self.placed if q.form.at in ("output", "hidden")]
        self.inputs = [q for q in self.placed if type(q.form).before is not Form.before]

    def _on(self, placed: list[Placed]) -> list[Placed]:
        return placed if self.switch.enabled else [q for q in placed if q.piece in self.switch.kept]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.switch.enabled and not self.switch.kept:
            return None
        if self.swaps:
            self._swap_in()
        if self.inputs:
            key = "" if args else next(iter(kwargs))
            x = args[0] if args else kwargs[key]
            for q in self._on(self.inputs):
                rows = self.switch.rows.get(q.piece)
                own = x if rows is None else x[rows]
                changed = q.form.before(own, q.state)
                changed = changed if q.scale == 1 else own + (changed - own) * q.scale
                x = changed if rows is None else x.index_copy(0, rows, changed)
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {key: x})
        return None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self._swapped:
            self._swap_out()
        off = not self.switch.enabled and not self.switch.kept
        if off or not (self.adds or self.chain) or out is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        y = out[0] if isinstance(out, tuple) else out
        total: Tensor = y
        for k, q in enumerate(self._on(self.adds)):
            q.state.product = k == 0 and not q.form.reads_output and self._is_product()
            total = self._onto(q, total, x, y)
        for q in self._on(self.chain):
            total = self._onto(q, total, x, total)
        return (total, *out[1:]) if isinstance(out, tuple) else total

    def _is_product(self) -> bool:
        """Whether the module's output is x Wᵀ + b of a frozen weight and bias, and the site takes nothing else from it."""
        own = self.module._parameters.values()
        return (
            type(self.module) is nn.Linear
            and not self.swaps
            and not any(p is not None and p.requires_grad for p in own)
        )

    def _onto(self, q: Placed, total: Tensor, x: Tensor, y: Tensor) -> Tensor:
        rows = self.switch.rows.get(q.piece)
        if rows is None:
            return q.form.onto(total, x, y, q.scale, q.state)
        q.state.product = False
        return total.index_copy(0, rows, q.form.onto(total[rows], x[rows], y[rows], q.scale, q.state))

    def _swap_in(self) -> None:
        # The changed tensor takes the parameter's slot while forward runs; names and the parameter itself stay as they are.
        slots = self.module._parameters
        for q in self._on(self.swaps):
            change = q.form.delta(q.state)
            for part, value in change.items():  # pyright: ignore[reportAttributeAccessIssue]
                name = q.state.site.parameter if part == "weight" else part
                now = slots[name]
                value = (oriented(value, q.state.site) if part == "weight" else value) * q.scale
                self._swapped.append((name, now))
                slots[name] = value if now is None else now + value.to(now.dtype)  # pyright: ignore[reportArgumentType]

    def _swap_out(self) -> None:
        while self._swapped:
            name, parameter = self._swapped.pop()
            self.module._parameters[name] = parameter
