"""A larger Llama that says what a smaller one says: twice as wide, and deeper."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

NOISE = 0.1
"""Size of the noise that tells the two halves apart, as a share of a matrix's own."""


@torch.no_grad()
def grow(model: Any, layers: int = 0, noise: float = NOISE, seed: int = 0) -> Any:
    """A new model twice as wide (hidden, heads, feed-forward) and ``layers`` layers deeper, with the same logits.

    The hidden state holds every coordinate twice, so norms and their gains stay; a matrix W becomes [[W, W], [W, W]] / 2, and
    heads stand twice. Noise N is added to the left half of the columns and taken off the right half, which a state of two
    equal halves does not feel, and which makes their gradients differ. New layers are copies of those they follow whose
    output projections are zero, spread evenly. After Net2Net (Chen et al. 2016, arXiv 1511.05641) and LEMON (Wang et al.
    2024, arXiv 2310.07999); the antisymmetric noise is our reading of the latter's unequal splits.

    model: LlamaForCausalLM, fp32, untied; left as it is. noise: standard deviation, as a share of that of the grown matrix.
    """
    old = model.config
    config = copy.deepcopy(old)
    config.update(
        {
            "hidden_size": 2 * old.hidden_size,
            "num_attention_heads": 2 * old.num_attention_heads,
            "num_key_value_heads": 2 * old.num_key_value_heads,
            "intermediate_size": 2 * old.intermediate_size,
            "num_hidden_layers": old.num_hidden_layers + layers,
            "head_dim": old.hidden_size // old.num_attention_heads,
        }
    )
    large = type(model)(config).float()  # every number of the fresh draw is replaced
    g = torch.Generator().manual_seed(seed)
    order = source_layers(old.num_hidden_layers, layers)
    small = dict(model.named_parameters())
    for name, p in large.named_parameters():
        is_new = False
        if ".layers." in name:
            front, _, rest = name.partition(".layers.")
            index, _, rest = rest.partition(".")
            source, is_new = order[int(index)]
            name = f"{front}.layers.{source}.{rest}"
        if is_new and name.endswith(("o_proj.weight", "down_proj.weight")):
            p.zero_()
        elif name.endswith("embed_tokens.weight"):
            p.copy_(small[name].repeat(1, 2))
        else:
            p.copy_(wider(small[name], p.shape[0], noise, g))
    return large


def wider(w: Tensor, rows: int, noise: float, g: torch.Generator) -> Tensor:
    """A gain or a matrix for states that hold everything twice; ``rows`` of the result: the head keeps its own."""
    if w.dim() == 1:
        return w.repeat(2)
    half = w.repeat(rows // w.shape[0], 1) / 2
    apart = torch.randn(half.shape, generator=g) * (noise * half.std())
    return torch.cat([half + apart, half - apart], 1)


def source_layers(count: int, more: int) -> list[tuple[int, bool]]:
    """For every layer of the deeper model (the layer it is taken from, whether it is a new one after it)."""
    after = [-(-(k + 1) * count // more) - 1 for k in range(more)]
    out: list[tuple[int, bool]] = []
    for layer in range(count):
        out.append((layer, False))
        out += [(layer, True)] * after.count(layer)
    return out
