"""One-to-one matching of two sets of equal size."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(similarity: Tensor) -> Tensor:
    """The column of each row, [n] integers, such that the sum of similarity [n, n] over the pairs is largest.

    Shortest augmenting paths (Jonker and Volgenant 1987) in float64, each path's search a few operations over all
    columns: seconds for a thousand. Raises ValueError for a matrix that is not square or not finite.
    """
    n = similarity.shape[0]
    if similarity.shape != (n, n) or not torch.isfinite(similarity).all():
        raise ValueError(f"similarity must be square and finite, got {tuple(similarity.shape)}")
    cost = -similarity.double()
    rows, columns = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    row_of = torch.full((n,), -1, dtype=torch.long)
    for start in range(n):
        row, reach = start, torch.full((n,), torch.inf, dtype=torch.float64)
        before, done = torch.full((n,), -1, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        seen, least = [], 0.0
        while True:
            found = least + cost[row] - rows[row] - columns
            nearer = ~done & (found < reach)
            reach[nearer], before[nearer] = found[nearer], row
            at = int(torch.where(done, torch.inf, reach).argmin())
            least = float(reach[at])
            done[at] = True
            if row_of[at] < 0:
                break
            seen.append(at)
            row = int(row_of[at])
        rows[start] += least
        for column in seen:
            rows[row_of[column]] += least - reach[column]
            columns[column] -= least - reach[column]
        while at >= 0:  # back along the path: every row takes the column that reached it
            row = int(before[at])
            held = (row_of == row).nonzero()
            row_of[at] = row
            at = int(held[0, 0]) if row != start and len(held) else -1
    out = torch.empty(n, dtype=torch.long)
    out[row_of] = torch.arange(n)
    return out
