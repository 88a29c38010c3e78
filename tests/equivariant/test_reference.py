"""Imported weights compute what the published model computes, written here from its equations."""

import math

import pytest
import torch
from equivariant.clouds import close
from torch.nn.functional import gelu, layer_norm, linear

from weightshare.equivariant import Ponita, circle, fibonacci, from_reference
from weightshare.errors import UserError

H, K, LAYERS, W = 6, 5, 2, 2


def published_weights(dim, inputs, outputs, window, scale):
    torch.manual_seed(dim)
    columns = {0: 3, 2: 14, 3: 14}[dim]
    shapes = {
        "basis_fn.1.weight": (H, columns), "basis_fn.1.bias": (H,),
        "basis_fn.3.weight": (K, H), "basis_fn.3.bias": (K,), "x_embedder.weight": (H, inputs),
    }  # fmt: skip
    if dim:
        shapes |= {"fiber_basis_fn.1.weight": (H, 3), "fiber_basis_fn.1.bias": (H,),
                   "fiber_basis_fn.3.weight": (K, H), "fiber_basis_fn.3.bias": (K,)}  # fmt: skip
    for k in range(LAYERS):
        layer = f"interaction_layers.{k}."
        shapes |= {
            layer + "conv.kernel.weight": (H, K), layer + "conv.bias": (H,),
            layer + "linear_1.weight": (W * H, H), layer + "linear_1.bias": (W * H,),
            layer + "linear_2.weight": (H, W * H), layer + "linear_2.bias": (H,),
            layer + "norm.weight": (H,), layer + "norm.bias": (H,),
            f"read_out_layers.{k}.weight": (outputs, H), f"read_out_layers.{k}.bias": (outputs,),
        }  # fmt: skip
        if dim:
            shapes[layer + "conv.fiber_kernel.weight"] = (H, K)
        if scale:
            shapes[layer + "layer_scale"] = (H,)
    weights = {"model." + n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    for k in range(LAYERS):
        weights[f"model.interaction_layers.{k}.conv.callibrated"] = torch.tensor(True)
    if window:
        weights["model.windowing_fn.p"] = torch.tensor(6.0)
        weights["model.windowing_fn.r_max"] = torch.tensor(window)
    return weights


def powers(x):
    """The published polynomial features: repeated outer products, duplicates kept."""
    found = [x]
    for _ in range(2):
        found.append(torch.einsum("...i,...j->...ij", found[-1], x).flatten(-2))
    return torch.cat(found, -1)


def published(w, grid, x, s, v, window):
    """Node read-outs of the published model, one edge after another."""
    w = {name.removeprefix("model."): t for name, t in w.items()}
    n = len(x)

    def basis(name, features):
        hidden = gelu(linear(features, w[f"{name}.1.weight"], w[f"{name}.1.bias"]))
        return gelu(linear(hidden, w[f"{name}.3.weight"], w[f"{name}.3.bias"]))

    o = torch.zeros(1, x.shape[1], dtype=x.dtype) if grid is None else grid
    field = s[:, None].expand(n, len(o), -1)
    if v is not None:
        field = torch.cat([field, torch.einsum("nvd,od->nov", v, o)], -1)
    field = linear(field, w["x_embedder.weight"])
    kernels = {}
    for i in range(n):
        for j in range(n):
            gap = x[j] - x[i]
            if grid is None:
                pair = gap.norm()[None, None]
            else:
                along = o @ gap
                rest = gap - along[:, None] * o
                turned = torch.stack([-o[:, 1], o[:, 0]], 1)
                across = rest.norm(dim=1) if o.shape[1] == 3 else turned @ gap
                pair = torch.stack([along, across], 1)
            kernels[i, j] = basis("basis_fn", powers(pair))
            if window:
                t = min(float(gap.norm()) / window, 1.0)
                kernels[i, j] = kernels[i, j] * (1 - 28 * t**6 + 48 * t**7 - 21 * t**8)
    if grid is not None:
        between = basis("fiber_basis_fn", powers((o @ o.T)[..., None]))
    said = 0
    for k in range(LAYERS):
        p = f"interaction_layers.{k}."
        first = torch.zeros_like(field)
        for (i, j), b in kernels.items():
            first[i] += linear(b, w[p + "conv.kernel.weight"]) * field[j]
        if grid is not None:
            turn = linear(between, w[p + "conv.fiber_kernel.weight"])
            first = torch.einsum("noc,opc->npc", first, turn) / len(o)
        y = first + w[p + "conv.bias"]
        y = layer_norm(y, (H,), w[p + "norm.weight"], w[p + "norm.bias"])
        y = gelu(linear(y, w[p + "linear_1.weight"], w[p + "linear_1.bias"]))
        y = linear(y, w[p + "linear_2.weight"], w[p + "linear_2.bias"])
        field = field + w.get(p + "layer_scale", 1.0) * y
        said = said + linear(field, w[f"read_out_layers.{k}.weight"],
                             w[f"read_out_layers.{k}.bias"])  # fmt: skip
    said = said / LAYERS
    return said[..., :1].mean(1), torch.einsum("no,od->nd", said[..., -1], o) / len(o)


@pytest.mark.parametrize("window", [None, 2.5])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_imported_weights_say_what_the_published_model_says(dim, window, scale):
    grid = {0: None, 2: circle(5), 3: fibonacci(7)}[dim]
    vectors = 1 if dim else 0
    weights = published_weights(dim, 2 + vectors, 1 + vectors, window, scale)
    torch.manual_seed(9)
    x = torch.randn(4, dim or 3, dtype=torch.float64)
    s = torch.randn(4, 2, dtype=torch.float64)
    v = torch.randn(4, 1, dim or 3, dtype=torch.float64) if dim else None
    model = from_reference(weights, grid, 2, vectors, 1, vectors, level="node")
    assert isinstance(model, Ponita)
    found = model(x, s, v, edges="full")
    scalars, turned = published(weights, grid, x, s, v, window)
    assert close(found.scalars, scalars, 1e-11)
    if dim:
        assert close(found.vectors[:, 0], turned, 1e-11)
    single = from_reference({n: t.float() if t.is_floating_point() else t
                             for n, t in weights.items()},
                            grid, 2, vectors, 1, vectors, level="node")  # fmt: skip
    said = single(x.float(), s.float(), None if v is None else v.float(), edges="full")
    assert close(said.scalars.double(), scalars, 1e-4)


def test_weights_that_do_not_fit_are_refused():
    weights = published_weights(3, 2, 1, None, False)
    grid = fibonacci(4)
    for change, said in (
        (lambda w: w.pop("model.x_embedder.weight"), "missing"),
        (lambda w: w.update({"model.other": torch.zeros(1)}), "left over"),
        (lambda w: w.clear(), "no weights"),
    ):
        broken = dict(weights)
        change(broken)
        with pytest.raises(UserError, match=said):
            from_reference(broken, grid, 2, scalars_out=1)
    with pytest.raises(UserError, match="shape"):
        from_reference(weights, grid, 3, scalars_out=1)
    assert math.isclose(float(from_reference(weights, grid, 2, scalars_out=1).grid.norm()), 2.0)
