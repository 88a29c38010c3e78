"""MACE (package mace-torch) on the same batches: a potential of the usual size for molecules."""

from typing import Any

import torch
from torch import nn

from weightshare.equivariant import PotentialTask, Prediction
from weightshare.equivariant.pairs import full_edges


class Mace(nn.Module):
    """Two layers of 128 channels with l <= 1, harmonics up to l = 3, correlation 3, radius 5 Å."""

    def __init__(self) -> None:
        super().__init__()
        import numpy as np
        from e3nn import o3
        from mace import modules

        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.species = torch.tensor([1, 6, 8])
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
        self.model = modules.MACE(
            r_max=5.0, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block,
            interaction_cls_first=block, num_interactions=2, num_elements=3,
            hidden_irreps=o3.Irreps("128x0e + 128x1o"), MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.zeros(3), avg_num_neighbors=8.0, atomic_numbers=[1, 6, 8],
            correlation=3, gate=nn.functional.silu,
        )  # fmt: skip


class MaceTask(PotentialTask):
    """The task of a potential, with MACE in its place."""

    def predict(self, batch: dict[str, torch.Tensor], create_graph: bool = False) -> Any:
        graphs, n, _ = batch["positions"].shape
        x = batch["positions"].flatten(0, 1)
        graph = torch.arange(graphs, device=x.device).repeat_interleave(n)
        edges = full_edges(graph)
        shifts = x.new_zeros(edges.shape[1], 3)
        species = self.potential.species.to(x.device)
        said = self.potential.model(
            {
                "positions": x, "batch": graph, "edge_index": edges, "shifts": shifts,
                "node_attrs": (batch["numbers"].flatten()[:, None] == species).to(x),
                "unit_shifts": shifts, "cell": x.new_zeros(3 * graphs, 3),
                "ptr": torch.arange(0, graphs * n + 1, n, device=x.device),
            },
            training=create_graph,
            compute_force=True,
        )  # fmt: skip
        return Prediction(said["energy"], said["forces"].view(graphs, n, 3), None, said["energy"])
