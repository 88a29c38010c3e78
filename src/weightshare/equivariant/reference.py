"""Weights of the published PyTorch Geometric implementation, taken over exactly."""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from weightshare.equivariant.basis import fold_duplicates
from weightshare.equivariant.ponita import Ponita
from weightshare.errors import UserError


def from_reference(
    weights: Mapping[str, Tensor],
    grid: Tensor | None,
    scalars: int,
    vectors: int = 0,
    scalars_out: int = 0,
    vectors_out: int = 0,
    level: Literal["node", "graph"] = "graph",
) -> Ponita:
    """The same function as the published model with this state dictionary.

    Args:
        weights: its ``state_dict()`` (load a ``.ckpt`` with ``torch.load(weights_only=True)``);
            prefixes such as ``model.`` are removed.
        grid: the orientations it was trained on, (N, d); None for the model on positions. The
            published checkpoint does not hold them: read them from the model before it is saved.
        scalars, vectors, scalars_out, vectors_out: channels; their sums must fit the weights.

    Raises:
        UserError: a tensor is missing, left over, or does not fit.
    """
    found = _without_prefix(weights)
    layers = 1 + max(
        (int(m[1]) for n in found if (m := re.match(r"interaction_layers\.(\d+)\.", n))), default=-1
    )
    if not layers:
        raise UserError("These are no weights of the published model: no interaction_layers.")
    hidden, columns = found["basis_fn.1.weight"].shape
    basis = found["basis_fn.3.weight"].shape[0]
    dim = 3 if grid is None else grid.shape[-1]
    inputs = 1 if grid is None else 2
    degree = next(
        (d for d in range(1, 12) if sum(inputs**k for k in range(1, d + 1)) == columns), None
    )
    if degree is None:
        raise UserError(f"{columns} features belong to no degree of {inputs} invariants.")
    read = [f"read_out_layers.{k}.weight" in found for k in range(layers)]
    scale = found.get("interaction_layers.0.layer_scale")
    radius = found.get("windowing_fn.r_max")
    model = Ponita(
        scalars,
        vectors,
        scalars_out=scalars_out,
        vectors_out=vectors_out,
        grid=grid,
        orientations=0,
        dim=dim,
        hidden=hidden,
        layers=layers,
        basis=basis,
        degree=degree,
        widening=found["interaction_layers.0.linear_1.weight"].shape[0] // hidden,
        invariants="reference",
        window_cutoff=None if radius is None else float(radius),
        layer_scale=None if scale is None else 1.0,
        multiple_readouts=all(read),
        level=level,
    ).to(found["basis_fn.1.weight"].dtype)
    names = _names(layers, read, grid is not None, scale is not None)
    ignored = {n for n in found if "callibrated" in n or n.startswith("windowing_fn.")}
    missing, extra = set(names.values()) - set(found), set(found) - set(names.values()) - ignored
    if missing or extra:
        raise UserError(
            f"The weights do not fit: missing {sorted(missing) or 'none'}, left over "
            f"{sorted(extra) or 'none'}."
        )
    state = model.state_dict()
    with torch.no_grad():
        for ours, theirs in names.items():
            given = found[theirs]
            if theirs == "basis_fn.1.weight":
                given = fold_duplicates(given, inputs, degree)
            if given.shape != state[ours].shape:
                raise UserError(
                    f"{theirs} has shape {tuple(given.shape)}, the network needs "
                    f"{tuple(state[ours].shape)}; check scalars, vectors and the grid."
                )
            state[ours].copy_(given)
    return model


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = next((name for name in weights if name.endswith("basis_fn.1.weight")
                  and "fiber" not in name), None)  # fmt: skip
    if first is None:
        raise UserError("These are no weights of the published model: no basis_fn.1.weight.")
    prefix = first.removesuffix("basis_fn.1.weight")
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _names(layers: int, read: list[bool], fibre: bool, scale: bool) -> dict[str, str]:
    """Our names -> theirs."""
    pairs = {"embed.weight": "x_embedder.weight"}
    bases = {"spatial": "basis_fn"} | ({"fibre": "fiber_basis_fn"} if fibre else {})
    for ours, theirs in bases.items():
        for layer, number in (("first", 1), ("second", 3)):
            for kind in ("weight", "bias"):
                pairs[f"functions.{ours}.{layer}.{kind}"] = f"{theirs}.{number}.{kind}"
    for k in range(layers):
        block, layer = f"blocks.{k}", f"interaction_layers.{k}"
        pairs[f"{block}.conv.spatial.weight"] = f"{layer}.conv.kernel.weight"
        if fibre:
            pairs[f"{block}.conv.fibre.weight"] = f"{layer}.conv.fiber_kernel.weight"
        pairs[f"{block}.conv.bias"] = f"{layer}.conv.bias"
        for ours, theirs in (("norm", "norm"), ("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
            for kind in ("weight", "bias"):
                pairs[f"{block}.{ours}.{kind}"] = f"{layer}.{theirs}.{kind}"
        if scale:
            pairs[f"{block}.layer_scale"] = f"{layer}.layer_scale"
        if read[k]:
            for kind in ("weight", "bias"):
                pairs[f"readouts.{k}.{kind}"] = f"read_out_layers.{k}.{kind}"
    return pairs
