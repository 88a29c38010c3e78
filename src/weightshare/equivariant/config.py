"""Settings of ``weightshare points``. Standard library only: ``--help`` reads this file."""

from dataclasses import dataclass
from typing import Any, Literal

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "nbody": {
            "orientations": 8, "hidden": 32, "basis": 32, "layers": 3, "epochs": 100,
            "batch_size": 100, "learning_rate": 3e-3, "ema": 0.99,
            "warmup_epochs": 3, "weight_decay": 1e-10,
        },
        "atoms": {
            "orientations": 6, "hidden": 32, "basis": 32, "layers": 3, "epochs": 40,
            "batch_size": 10, "learning_rate": 3e-3, "ema": 0.99,
            "warmup_epochs": 3, "weight_decay": 1e-10,
        },
        "qm9": {
            "orientations": 6, "hidden": 32, "basis": 32, "layers": 3, "epochs": 10,
            "batch_size": 96, "learning_rate": 3e-3, "ema": 0.99,
            "warmup_epochs": 3, "weight_decay": 1e-10,
        },
    },
    "published": {
        "nbody": {
            "orientations": 16, "hidden": 128, "basis": 256, "layers": 5, "epochs": 10000,
            "batch_size": 100, "learning_rate": 1e-3, "ema": 0.0,
            "warmup_epochs": 10, "weight_decay": 1e-10,
        },
        "atoms": {
            "orientations": 20, "hidden": 128, "basis": 256, "layers": 5, "epochs": 5000,
            "batch_size": 5, "learning_rate": 5e-4, "ema": 0.99,
            "warmup_epochs": 100, "weight_decay": 1e-16,
        },
        "qm9": {
            "orientations": 16, "hidden": 256, "basis": 256, "layers": 9, "epochs": 1000,
            "batch_size": 96, "learning_rate": 5e-4, "ema": 0.99,
            "warmup_epochs": 10, "weight_decay": 1e-10,
        },
    },
}  # fmt: skip
"""Sizes of ``--preset``; published: the reference's settings for N-body, rMD17 and QM9."""


@dataclass
class PointsConfig:
    """Train an equivariant network on points: the N-body task, a potential, or QM9.

    Args:
        data: nbody, qm9, or a file of structures with energies and forces (.npz of rMD17, MD17 or
            sGDML; extended XYZ).
        test: a second file to test on; by default structures of data that are not trained on.
        preset: small trains in CPU minutes, published has the paper's sizes. Options given beside
            it win.
        orientations: directions of the grid; 0 for positions alone.
        hidden: channels.
        layers: convolution blocks.
        basis: basis functions of the kernels.
        invariants: smooth, complete, or reference (as published: forces jump).
        epochs: passes over the training set.
        batch_size: examples per step.
        learning_rate: peak; warm-up, then cosine to zero.
        ema: decay of the averaged weights that are evaluated and kept; 0 for none.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        augment: rotate every training example at random.
        momentum: nbody: conserve momentum exactly (the published network learns it).
        signs: nbody: flip all charges of half of the training examples, and average the test over
            both signs; only products act.
        scales: nbody: change the unit of length of every training example at random; for networks
            that learn the training set by heart.
        target: qm9: the property to learn: mu, alpha, homo, lumo, gap, r2, zpve, u0, u, h, g or
            cv.
        train_size: examples to train on; 0 for 3000 trajectories, 110000 molecules of QM9, or all
            structures but those held out.
        valid_size: examples to watch during training.
        test_size: examples to test on, where no test file is given.
        energy_weight: of the energy error beside the force error (1/500 is published for rMD17).
        force_weight: of the force error.
        stress_weight: of the stress error, for periodic structures with a stress.
        cutoff: radius in angstrom within which atoms see each other; 0 connects all atoms of a
            molecule. Periodic structures need one.
        unit: of the energies in the file: eV, kcal/mol, Hartree, meV, or auto.
        rotations: rotated copies the test averages over, besides the plain test.
        out: the run directory.
        resume: go on with a run that was interrupted.
        dry_run: print sizes and time and stop.
        seed: of everything random.
        device: cpu, cuda, cuda:1, or auto.
    """

    data: str
    test: str | None = None
    preset: Literal["small", "published"] = "small"
    orientations: int | None = None
    hidden: int | None = None
    layers: int | None = None
    basis: int | None = None
    invariants: Literal["smooth", "complete", "reference"] = "smooth"
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema: float | None = None
    weight_decay: float | None = None
    clip: float = 0.5
    augment: bool = True
    momentum: bool = False
    signs: bool = False
    scales: bool = False
    target: str = "u0"
    train_size: int = 0
    valid_size: int = 0
    test_size: int = 0
    energy_weight: float = 1 / 500
    force_weight: float = 1.0
    stress_weight: float = 0.0
    cutoff: float = 0.0
    unit: str = "auto"
    rotations: int = 5
    out: str = "runs/points"
    resume: bool = False
    dry_run: bool = False
    seed: int = 0
    device: str = "auto"

    def size(self, name: str) -> Any:
        """An option, or its preset; ``warmup_epochs`` has only the latter."""
        given = getattr(self, name, None)
        kind = self.data if self.data in ("nbody", "qm9") else "atoms"
        return PRESETS[self.preset][kind][name] if given is None else given
