"""Several short rows in one long one."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the lengths, in bins that hold at most `capacity`: longest first, each into the first bin with room.

    A tree over the bins' free space finds that bin in O(log n). Lengths above the capacity are a mistake of the caller.
    """
    size = 1
    while size < max(1, len(lengths)):
        size *= 2
    free = [capacity] * (2 * size)
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        assert need <= capacity, f"row of {need} tokens for bins of {capacity}"
        node = 1
        while node < size:
            node = 2 * node if free[2 * node] >= need else 2 * node + 1
        if node - size == len(bins):
            bins.append([])
        bins[node - size].append(index)
        free[node] -= need
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins
