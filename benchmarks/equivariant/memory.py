"""What the graph of energies and forces keeps until the loss is differentiated, by recomputation.

    python benchmarks/equivariant/memory.py [--quick]

Published size, molecules of 21 atoms. The bytes of every tensor that autograd saves, each storage
once, per further molecule; counted, not timed, and therefore the same on every device.
"""

import sys
import weakref
from functools import partial
from pathlib import Path

import torch
from speed import PUBLISHED, SMALL, molecules

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.equivariant import PonitaPotential


class Saved:
    """Stands for a saved tensor as long as the graph is alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept(recompute: str | None, graphs: int, size: dict) -> int:
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    model = PonitaPotential([1, 6, 8], recompute=recompute, **size)
    batch = molecules(graphs, 21)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        said = model(batch["numbers"], batch["positions"], create_graph=True)
    found = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage() for s in alive}
    assert said.forces.grad_fn is not None
    return sum(storage.nbytes() for storage in found.values())


def figures(recompute: str | None, size: dict) -> dict[str, float]:
    each = kept(recompute, 2, size) - kept(recompute, 1, size)
    return {"mb_per_molecule": each / 1e6, "gb_for_50": 50 * each / 1e9}


def main() -> None:
    table = Table("equivariant_memory", __doc__)
    size = SMALL if table.quick else PUBLISHED
    for recompute in (None, "messages", "basis"):
        name = f"{recompute} again" if recompute else "everything kept"
        table.row(name, partial(figures, recompute, size))
    table.show(["mb_per_molecule", "gb_for_50"])


if __name__ == "__main__":
    main()
