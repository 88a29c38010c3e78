"""Who sends the same as whom."""

import warnings
from collections.abc import Sequence

from weightshare.federated.vectors import Vector


def copies_among(
    names: Sequence[str], rows: Sequence[Vector], norms: Sequence[float], threshold: float
) -> list[tuple[str, ...]]:
    """Groups of participants whose updates have a cosine of at least ``threshold``, linked singly.

    Compared through sketches of 4,096 numbers (standard error of a cosine of .98: 0.0006).
    """
    if not threshold or len(names) < 2:
        return []
    import torch

    from weightshare.sharing.agreement import normalised
    from weightshare.sharing.products import inner_products
    from weightshare.sharing.sketch import CountSketch

    alive = [i for i, norm in enumerate(norms) if norm > 0]
    if len(alive) < 2:
        return []
    sketch = CountSketch()
    with warnings.catch_warnings():
        # Rows are read-only views of messages; torch warns of writing to them, which nobody does.
        warnings.simplefilter("ignore", UserWarning)
        kept = [sketch("update", torch.from_numpy(rows[i])) / norms[i] for i in alive]
    products = inner_products({"update": kept}, len(kept))["update"]
    near = normalised(products).numpy() >= threshold
    groups: list[set[int]] = []
    for i in range(len(alive)):
        touched = [g for g in groups if any(near[i, j] for j in g)]
        groups = [g for g in groups if g not in touched] + [{i}.union(*touched)]
    return sorted(tuple(sorted(names[alive[i]] for i in g)) for g in groups if len(g) > 1)
