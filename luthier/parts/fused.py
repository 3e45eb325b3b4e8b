"""Elementwise chains of a transformer block in fewer passes over memory, with less kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_kernel(x: Tensor, w: Tensor) -> bool:
    """Whether the library has the whole norm as one kernel, forwards and backwards: on CUDA, for one type."""
    return x.device.type == "cuda" and x.dtype == w.dtype


class _RMSNorm(torch.autograd.Function):
    """y = w · x / rms(x). Kept: x, w and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        if one_kernel(x, w):
            out, inverse = torch.ops.aten._fused_rms_norm(x, list(w.shape), w, eps)
            ctx.save_for_backward(x, w, inverse)
            return out
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, inverse)
        return (x * inverse).to(x.dtype).mul_(w) if x.dtype == w.dtype else w * (x * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, w, inverse = ctx.saved_tensors
        if one_kernel(x, w):
            wanted = list(ctx.needs_input_grad[:2])
            grad = grad.to(x.dtype).contiguous()
            return *torch.ops.aten._fused_rms_norm_backward(grad, x, list(w.shape), inverse, w, wanted), None
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = (grad * x * inverse).flatten(0, -2).sum(0).to(w.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_w, None
        # The library's kernel of layer norms takes any mean: with 0 all that is left over is the mean of the gradient.
        # A processor's takes float32 beside narrow rows, a device's only their own type.
        width, gain = x.shape[-1], w.float() if x.device.type == "cpu" else w.to(x.dtype)
        out, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype), x, [width], torch.zeros_like(inverse), inverse, gain, None, [True, False, False]
        )
        return out.add_((grad @ w.to(grad.dtype)).unsqueeze(-1) * inverse / width), grad_w, None


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) · up. Kept: gate and up; silu is worked out again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        grad_up = torch.nn.functional.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        return grad_gate, grad_up


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """w · x / sqrt(mean(x²) + eps) over the last dimension; statistics in float32. Shapes [..., d] and [d].

    On a processor x / rms(x) is rounded to x's type before w multiplies it, on CUDA only the product is.
    """
    return _RMSNorm.apply(x, w, eps)  # pyright: ignore[reportReturnType]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]
