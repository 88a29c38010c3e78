"""PONITA: equivariant networks on point clouds by weight sharing over positions and orientations.

After "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in Position-Orientation
Space" (ICLR 2024, arXiv 2310.02970), with complete and smooth invariants, exact grids, and a
potential with forces and stress.
"""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "grids": [
            "circle",
            "fibonacci",
            "make_grid",
            "platonic",
            "quadrature_weights",
            "random_rotations",
            "repulsion",
            "rotation_group",
            "spread_rotations",
            "symmetries",
        ],
        "invariants": [
            "fibre_invariants",
            "full_invariants",
            "pair_invariants",
            "spatial_invariants",
            "window",
        ],
        "fields": ["Readout", "lift", "read"],
        "convolution": ["ConvNextBlock", "FullConv", "SeparableConv"],
        "neighbours": ["Neighbours", "neighbour_list", "radius_edges"],
        "ponita": ["Ponita"],
        "point_cloud": ["LiftedCloud", "PonitaPoints", "lift_bonds"],
        "geometric": ["PonitaConv", "PonitaGraph", "RadiusEdges", "RandomRotation"],
        "irreps": ["from_irreps", "to_irreps"],
        "qm9": ["QM9", "load_qm9"],
        "reference": ["from_reference"],
        "symmetrised": ["Symmetrised", "symmetrise"],
        "potential": ["PonitaPotential", "Prediction", "hessian"],
        "calculator": ["PonitaCalculator"],
        "structures": [
            "Structure",
            "collate",
            "pad_molecules",
            "read_structures",
            "stack_molecules",
        ],
        "nbody": ["NBody", "make_nbody"],
        "dynamics": ["DynamicsTask"],
        "potential_task": ["PotentialTask"],
        "property_task": ["PropertyTask"],
        "augment": ["RotatedUpdate"],
    },
)
