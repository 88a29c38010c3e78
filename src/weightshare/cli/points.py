"""``weightshare points``: train an equivariant network on points, test it, turn it."""

from dataclasses import fields
from typing import TYPE_CHECKING

from weightshare.cli.options import dashed
from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig

CONFIG = "weightshare.equivariant.config:PointsConfig"
EXTRA = "equivariant"
EXAMPLES = """
  weightshare points nbody --train-size 500 --epochs 40 --out runs/nbody
  weightshare points nbody --preset published --device cuda --out runs/nbody-published
  weightshare points rmd17_ethanol_train_01.npz --test rmd17_ethanol_test_01.npz --out runs/ethanol
  weightshare points silicon.extxyz --cutoff 5 --stress-weight 1 --dry-run
  weightshare points qm9 --target gap --train-size 5000 --out runs/gap
"""


def run(config: "PointsConfig") -> None:
    """Train on one data set and leave a run directory."""
    check(config)
    if config.data == "nbody":
        from weightshare.cli.points_nbody import nbody as story
    elif config.data == "qm9":
        from weightshare.cli.points_qm9 import qm9 as story
    else:
        from weightshare.cli.points_atoms import atoms as story
    story(config)


def check(config: "PointsConfig") -> None:
    """Refuse options that cannot be."""
    for name in ("hidden", "layers", "basis", "epochs", "batch_size"):
        if config.size(name) < 1:
            raise UserError(f"--{dashed(name)} is {config.size(name)}; give 1 or more.")
    if config.size("orientations") < (1 if config.data == "nbody" else 0):
        raise UserError(
            f"--orientations is {config.size('orientations')}; give 1 or more (0, positions alone, "
            "cannot take or give vectors, which nbody needs)."
        )
    for name in ("learning_rate", "clip"):
        if not config.size(name) > 0:
            raise UserError(f"--{dashed(name)} is {config.size(name)}; give a number above 0.")
    if not 0 <= config.size("ema") < 1:
        raise UserError(f"--ema is {config.size('ema')}; give 0 for none, or a decay below 1.")
    weights = ("energy_weight", "force_weight", "stress_weight")
    others = ("cutoff", "rotations", "weight_decay")
    for name in ("train_size", "valid_size", "test_size", *others, *weights):
        if config.size(name) < 0:
            raise UserError(f"--{dashed(name)} is {config.size(name)}; give 0 or more.")
    if not any(getattr(config, name) for name in weights):
        raise UserError("All weights of the loss are 0, so that nothing is learnt; give one above.")
    files = "files of structures"
    kind = config.data if config.data in ("nbody", "qm9") else files
    only = dict.fromkeys(("momentum", "signs", "scales"), "nbody") | {"target": "qm9"}
    only |= dict.fromkeys(("test", "cutoff", "unit", *weights), files)
    defaults = {field.name: field.default for field in fields(config)}
    for name, data in only.items():
        if getattr(config, name) != defaults[name] and data != kind:
            raise UserError(f"--{dashed(name)} is for {data}, not for {kind}; leave it out.")
    for name in ("signs", "scales"):
        if getattr(config, name) and not config.augment:
            raise UserError(f"--{name} is an augmentation; leave out --no-augment.")
