"""What the network promises: symmetries, equal paths, windows, calibration, survival."""

import subprocess
import sys

import pytest
import torch
from equivariant.clouds import close, cloud, network

from weightshare.equivariant import (
    Ponita,
    circle,
    fibonacci,
    make_grid,
    platonic,
    quadrature_weights,
    random_rotations,
    repulsion,
    rotation_group,
    symmetries,
    symmetrise,
)
from weightshare.errors import UserError

MODES = ("reference", "smooth", "complete")
KINDS = {
    "sphere": {},
    "sphere, reference": {"invariants": "reference"},
    "sphere, cutoff": {"window_cutoff": 2.5},
    "sphere, full": {"convolution": "full", "orientations": 6},
    "sphere, full complete": {
        "convolution": "full", "orientations": 6, "invariants": "complete",
    },
    "sphere, chiral": {
        "convolution": "full", "orientations": 6, "invariants": "complete", "chiral": True,
    },
    "circle": {"dim": 2, "orientations": 5},
    "circle, complete": {"dim": 2, "orientations": 5, "invariants": "complete"},
    "circle, full": {"dim": 2, "orientations": 5, "invariants": "complete", "convolution": "full"},
    "rotations": {"grid": rotation_group("tetrahedron")},
    "positions": {"orientations": 0, "vectors": 0, "vectors_out": 0},
}  # fmt: skip


def setup(kind, points=7):
    options = KINDS[kind]
    model = network(**options)
    positions, scalars, vectors = cloud(points, options.get("dim", 3))
    return model, positions, scalars, (None if kind == "positions" else vectors)


def turn(rotation, positions, vectors):
    return positions @ rotation.T, None if vectors is None else vectors @ rotation.T


def any_rotation(dim, reflected=False):
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    rotation = rotation * torch.linalg.det(rotation) if dim % 2 else rotation
    if torch.linalg.det(rotation) < 0:
        rotation = torch.cat([-rotation[:1], rotation[1:]])
    return torch.cat([-rotation[:1], rotation[1:]]) if reflected else rotation


@pytest.mark.parametrize("kind", KINDS)
def test_translations_and_permutations_are_exact(kind):
    model, x, s, v = setup(kind)
    found = model(x, s, v, edges="full")
    moved = model(x + 5.0, s, v, edges="full")
    assert close(moved.scalars, found.scalars) and close(moved.vectors, found.vectors)
    order = torch.randperm(len(x))
    model.level = "node"
    there = model(x, s, v, edges="full")
    mixed = model(x[order], s[order], None if v is None else v[order], edges="full")
    assert close(mixed.scalars, there.scalars[order])
    assert close(mixed.vectors, there.vectors[order])


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_input_and_grid_together_is_exact(kind):
    model, x, s, v = setup(kind)
    torch.manual_seed(1)
    before = model(x, s, v, edges="full")
    rotation = any_rotation(model.dim)
    if model.grid is not None:
        g = model.grid
        model.grid.copy_(g @ rotation.T if g.ndim == 2 else rotation @ g)
    x, v = turn(rotation, x, v)
    after = model(x, s, v, edges="full")
    assert close(after.scalars, before.scalars)
    assert close(after.vectors, before.vectors @ rotation.T)


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("sphere", True), ("sphere, full complete", True), ("positions", True),
        ("sphere, chiral", False), ("circle", False), ("rotations", False),
    ],
)  # fmt: skip
def test_reflections_count_on_the_sphere_and_only_there(kind, same):
    model, x, s, v = setup(kind)
    torch.manual_seed(1)
    before = model(x, s, v, edges="full")
    mirror = any_rotation(model.dim, reflected=True)
    if model.grid is not None:
        g = model.grid
        # A mirrored frame is no rotation; the grid of rotations stays where it is.
        model.grid.copy_(g @ mirror.T if g.ndim == 2 else g)
    if kind == "rotations":
        mirror = -torch.eye(3, dtype=torch.float64)
    x, v = turn(mirror, x, v)
    after = model(x, s, v, edges="full")
    assert close(after.scalars, before.scalars) == same
    if not same:
        change = (after.scalars - before.scalars).norm() / before.scalars.norm()
        assert change > 1e-5


@pytest.mark.parametrize(
    "grid", [platonic(4), platonic(8), platonic(12), platonic(20), circle(5), repulsion(5)]
)
def test_every_grid_is_exact_under_its_own_group(grid):
    model = network(grid=grid, dim=grid.shape[1], layers=1)
    x, s, v = cloud(5, grid.shape[1])
    before = model(x, s, v, edges="full")
    group = symmetries(grid, reflections=grid.shape[1] == 3)
    assert len(group) >= 2
    for rotation in group:
        after = model(x @ rotation.T, s, v @ rotation.T, edges="full")
        assert close(after.scalars, before.scalars, 1e-6 if len(grid) == 5 else 1e-11)
        assert close(after.vectors, before.vectors @ rotation.T, 1e-6 if len(grid) == 5 else 1e-11)


def test_a_rotation_grid_is_exact_under_its_group():
    group = rotation_group("tetrahedron")
    model = network(grid=group, tensors=1, tensors_out=1)
    x, s, v = cloud(5)
    t = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    before = model(x, s, v, t, edges="full")
    for rotation in group:
        turned = rotation @ t @ rotation.T
        after = model(x @ rotation.T, s, v @ rotation.T, turned, edges="full")
        assert close(after.scalars, before.scalars)
        assert close(after.vectors, before.vectors @ rotation.T)
        assert close(after.tensors, rotation @ before.tensors @ rotation.T)


def test_the_error_under_other_rotations_falls_with_the_number_of_orientations():
    x, s, v = cloud(9)
    errors = []
    for n in (8, 32, 128):
        model = network(grid=fibonacci(n), hidden=16)
        before = model(x, s, v, edges="full").scalars
        turns = random_rotations(6, generator=torch.Generator().manual_seed(0)).double()
        after = torch.stack([model(x @ r.T, s, v @ r.T, edges="full").scalars for r in turns])
        errors.append(float((after - before).norm(dim=(-1, -2)).mean() / before.norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [None, "messages", "basis"])
def test_dense_and_segment_paths_give_equal_numbers_and_gradients(kind, recompute):
    model, x, s, v = setup(kind, 8)
    model.functions.recompute = recompute
    x = x.requires_grad_()
    batch = torch.arange(2).repeat_interleave(4)
    edges = torch.tensor([[i, j] for i in range(8) for j in range(8) if i // 4 == j // 4]).T
    stacked = [None if t is None else t.unflatten(0, (2, 4)) for t in (x, s, v)]
    results = [
        model(*stacked),
        model(x, s, v, edges="full", batch=batch),
        model(x, s, v, edges=edges, batch=batch),
        model(x, s, v, edges=edges[:, torch.randperm(edges.shape[1])], batch=batch, graphs=2),
    ]
    slopes = [torch.autograd.grad(r.scalars.square().sum(), x)[0] for r in results]
    for result, slope in zip(results[1:], slopes[1:], strict=True):
        assert close(result.scalars, results[0].scalars)
        assert close(result.vectors, results[0].vectors)
        assert close(slope, slopes[0])


@pytest.mark.parametrize("kind", ["positions", "circle, complete", "circle, full", "rotations"])
@pytest.mark.parametrize("cutoff", [None, 2.5])
def test_second_derivatives_are_right_in_every_space(kind, cutoff):
    options = KINDS[kind] | {"layers": 1, "hidden": 3, "basis": 3, "window_cutoff": cutoff}
    model = network(**options)
    x, s, v = cloud(2, options.get("dim", 3))
    v = None if kind == "positions" else v
    x = x.requires_grad_()

    def scalars(x):
        return model(x, s, v, edges="full").scalars[0, 0]

    assert torch.autograd.gradcheck(scalars, (x,))
    assert torch.autograd.gradgradcheck(scalars, (x,))


def test_padding_may_hold_anything():
    model, x, s, v = setup("sphere")
    alone = model(x[None], s[None], v[None])
    poison = [
        torch.cat([t[None], torch.full_like(t[None, :3], float("nan"))], 1) for t in (x, s, v)
    ]
    mask = torch.arange(10)[None] < 7
    padded = model(*poison, mask=mask)
    assert close(padded.scalars, alone.scalars) and close(padded.vectors, alone.vectors)
    model.level = "node"
    assert model(*poison, mask=mask).scalars[0, 7:].abs().max() == 0
    x = poison[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x, *poison[1:], mask=mask).scalars.sum(), x)
    assert torch.isfinite(slope).all() and slope[0, 7:].abs().max() == 0


def test_graphs_do_not_see_each_other_and_may_be_empty():
    model, x, s, v = setup("sphere")
    alone = [model(x[part], s[part], v[part], edges="full") for part in (slice(3), slice(3, 7))]
    batch = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    both = model(x, s, v, edges="full", batch=batch, graphs=4)
    assert close(both.scalars[0:1], alone[0].scalars) and close(both.scalars[2:3], alone[1].scalars)
    assert both.scalars[[1, 3]].abs().max() == 0
    nothing = model(x[:0], s[:0], v[:0], edges="full")
    assert nothing.scalars.shape == (1, 2) and nothing.scalars.abs().max() == 0


def test_an_isolated_last_point_and_an_empty_edge_list_are_defined():
    for loops in (True, False):
        model = network(self_loops=loops, level="node")
        x, s, v = cloud(4)
        edges = torch.tensor([[0, 1], [1, 0]])
        found = model(x, s, v, edges=edges)
        assert found.scalars.shape == (4, 2) and torch.isfinite(found.scalars).all()
        alone = model(x[3:], s[3:], v[3:], edges=edges[:, :0])
        assert close(found.scalars[3:], alone.scalars)


def test_self_loops_are_added_once_whether_given_or_not():
    model = network()
    x, s, v = cloud(3)
    edges = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    given, without = model(x, s, v, edges=edges), model(x, s, v, edges=edges[:, :3])
    assert close(given.scalars, without.scalars, 0)
    model.self_loops = False
    assert not close(model(x, s, v, edges=edges[:, :3]).scalars, without.scalars, 1e-3)


@pytest.mark.parametrize("recompute", [None, "messages", "basis"])
def test_without_self_loops_the_dense_path_has_none_either(recompute):
    model = network(self_loops=False, recompute=recompute)
    x, s, v = cloud()
    few = network(self_loops=False)
    few.load_state_dict(model.state_dict())
    loose = torch.tensor([(a, b) for a in range(7) for b in range(7) if a != b]).T
    wanted = few(x, s, v, edges=loose).scalars
    assert close(model(x, s, v, edges="full").scalars, wanted)
    assert close(model(x[None], s[None], v[None]).scalars, wanted)
    pad = torch.nn.functional.pad
    wide = pad(x, (0, 0, 0, 3))[None], pad(s, (0, 0, 0, 3))[None], pad(v, (0, 0, 0, 0, 0, 3))[None]
    assert close(model(*wide, mask=torch.arange(10)[None] < 7).scalars, wanted)


def test_an_edge_at_the_cutoff_comes_and_goes_without_a_jump():
    model = network(cutoff=2.0, self_loops=True)
    s, v = cloud(2)[1:]

    def at(distance):
        x = torch.tensor([[0.0, 0, 0], [distance, 0.3, 0]], dtype=torch.float64)
        return model(x, s, v).scalars

    edge = (4 - 0.09) ** 0.5
    near = (at(edge - 1e-4) - at(edge + 1e-4)).abs().max()
    assert 0 <= near < 1e-9
    assert (at(1.0) - at(edge + 1e-4)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "positions"])
def test_lifting_and_reading_a_vector_is_a_third_of_it(kind):
    from weightshare.equivariant import lift, read

    grid = setup(kind)[0].grid
    d = grid.shape[-1]
    v = torch.randn(4, 2, d, dtype=torch.float64)
    weights = torch.full((len(grid),), 1 / len(grid), dtype=torch.float64)
    found = read(grid, weights, lift(grid, vectors=v), 0, 2, 0).vectors
    assert close(found, v if grid.ndim == 3 else v / d, 1e-12)
    t = torch.randn(4, 1, d, d, dtype=torch.float64)
    t = t + t.mT
    t = t - torch.eye(d) * t.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / d
    if d == 2 or len(grid) >= 12:
        found = read(grid, weights, lift(grid, tensors=t), 0, 0, 1).tensors
        share = 1.0 if grid.ndim == 3 else {2: 1 / 4, 3: 2 / 15}[d]
        assert close(found, share * t, 1e-11)


def test_the_separable_convolution_is_the_full_one_with_the_product_kernel():
    from weightshare.equivariant.convolution import SeparableConv
    from weightshare.equivariant.pairs import dense_pairs

    model = network(layers=1)
    conv = model.blocks[0].conv
    assert isinstance(conv, SeparableConv)
    x = cloud(4)[0][None]
    field = torch.randn(1, 4, 12, 8, dtype=torch.float64)
    kernels = model.functions(dense_pairs(x), model.grid, model.weights)
    found = conv(field, kernels)
    ks, kf = conv.spatial(kernels.spatial), conv.fibre(kernels.fibre)
    wanted = torch.zeros_like(field)
    for i in range(4):
        for p in range(12):
            for j in range(4):
                for o in range(12):
                    wanted[0, i, p] += ks[0, i, j, o] * kf[o, p] * field[0, j, o] / 12
    assert close(found, wanted + conv.bias, 1e-12)


def test_the_kernel_of_an_edge_backwards_is_the_one_at_the_antipode():
    from weightshare.equivariant.pairs import dense_pairs

    model = network()
    pairs = dense_pairs(cloud(4)[0][None])
    basis = model.functions.evaluate(pairs, model.grid)
    opposite = (model.grid @ model.grid.T).argmin(1)
    assert close(basis.transpose(1, 2), basis[..., opposite, :], 1e-12)


@pytest.mark.parametrize("kind", ["sphere", "sphere, full", "positions"])
def test_calibration_keeps_the_spread_is_idempotent_and_happens_on_request_only(kind):
    model, x, s, v = setup(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    model(x, s, v, edges="full")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    spreads = []
    model.calibrate_(x, s, v, edges="full")
    for block in model.blocks:
        block.conv.register_forward_hook(
            lambda conv, given, out: spreads.append((given[0].std(), (out - conv.bias).std()))
        )
    model(x, s, v, edges="full")
    assert len(spreads) == 2 and all(abs(a - b) < 1e-6 * a for a, b in spreads)
    once = {name: p.clone() for name, p in model.named_parameters()}
    model.calibrate_(x, s, v, edges="full")
    assert all(close(p, once[name], 1e-9) for name, p in model.named_parameters())


def test_calibration_does_not_see_padding():
    x, s, v = (t[None] for t in cloud())
    bare, padded = network(), network()
    padded.load_state_dict(bare.state_dict())
    bare.calibrate_(x, s, v)
    wide = [torch.cat([t, torch.full_like(t, 9.0)], 1) for t in (x, s, v)]
    padded.calibrate_(*wide, mask=torch.arange(14)[None] < 7)
    for one, other in zip(bare.parameters(), padded.parameters(), strict=True):
        assert close(one, other)


def test_calibrating_on_zeros_leaves_finite_weights():
    model, x, s, v = setup("sphere")
    model.calibrate_(x, 0 * s, 0 * v, edges="full")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_sizes_are_the_published_ones_but_for_folded_columns():
    for orientations, published in ((20, 1_058_437), (0, 859_653)):
        model = Ponita(9, scalars_out=1, orientations=orientations)
        folded = (14 - 9) * 128 if orientations else 0
        assert sum(p.numel() for p in model.parameters()) + folded == published


def test_a_saved_network_says_the_same_in_another_process_with_another_seed(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = Ponita(1, 1, scalars_out=1, grid=repulsion(9), hidden=8, layers=2, basis=8)
    x, s, v = (t.float() for t in cloud(5, scalars=1))
    save_file(
        {**model.state_dict(), "x": x, "s": s, "v": v, "y": model(x, s, v, edges="full").scalars},
        tmp_path / "net.safetensors",
    )
    code = f"""
import torch
from safetensors.torch import load_file
from weightshare.equivariant import Ponita, fibonacci
torch.manual_seed(99)
kept = load_file({str(tmp_path / "net.safetensors")!r})
x, s, v, y = (kept.pop(name) for name in "xsvy")
model = Ponita(1, 1, scalars_out=1, grid=fibonacci(9), hidden=8, layers=2, basis=8)
model.load_state_dict(kept)
assert torch.equal(model(x, s, v, edges="full").scalars, y)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float32_keeps_the_symmetries_to_its_own_precision():
    model = network().float()
    x, s, v = (t.float() for t in cloud())
    rotation = symmetries(platonic(12))[17].float()
    before = model(x, s, v, edges="full")
    after = model(x @ rotation.T, s, v @ rotation.T, edges="full")
    assert close(after.scalars, before.scalars, 1e-4)


def test_a_random_grid_averages_to_invariance():
    model = network(random_grid=True, grid=make_grid(12))
    x, s, v = cloud()
    torch.manual_seed(0)
    draws = torch.stack([model(x, s, v, edges="full").scalars for _ in range(30)])
    assert draws.std(0).min() > 0
    rotation = any_rotation(3)
    turned = [model(x @ rotation.T, s, v @ rotation.T, edges="full").scalars for _ in range(30)]
    distance = (torch.stack(turned).mean(0) - draws.mean(0)).abs()
    assert (distance < 5 * draws.std(0) / 30**0.5 + 1e-12).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positions": torch.zeros(7, 2)}, "positions have shape"),
        ({"scalars": torch.zeros(7, 3)}, "scalars"),
        ({"vectors": None}, "vectors"),
        ({"edges": None}, "No edges"),
        ({"edges": torch.zeros(3, 4, dtype=torch.int64)}, "edges have shape"),
        ({"edges": torch.full((2, 1), 7)}, "edges name points"),
        ({"edges": torch.zeros(2, 3)}, "int64"),
        ({"edges": "all"}, "'all'"),
        ({"batch": torch.zeros(6, dtype=torch.int64)}, "batch has shape"),
        ({"positions": torch.full((7, 3), float("nan"))}, "not finite"),
        ({"offsets": torch.zeros(5, 3), "edges": torch.zeros(2, 1, dtype=torch.int64)}, "offsets"),
        ({"offsets": torch.zeros(5, 3)}, "belong to edges"),
        ({"batch": torch.zeros(7)}, "int64"),
        ({"batch": torch.arange(7) - 1}, "names the graphs -1 to 5"),
        ({"batch": torch.arange(7), "graphs": 5}, "use 0 to 5 - 1"),
        ({"scalars": torch.zeros(7, 2, dtype=torch.float64)}, "scalars are torch.float64"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(change, said):
    x, s, v = (t.float() for t in cloud())
    given = {"positions": x, "scalars": s, "vectors": v, "edges": "full"} | change
    with pytest.raises(UserError, match=said) as caught:
        network().float()(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"scalars": 1}, {"scalars_out": 1}, {"scalars": 1, "vectors_out": 1, "orientations": 0},
        {"scalars": 1, "scalars_out": 1, "chiral": True},
        {"scalars": 1, "scalars_out": 1, "invariants": "all"},
        {"scalars": 1, "scalars_out": 1, "grid": 2 * platonic(6)},
        {"scalars": 1, "scalars_out": 1, "grid": torch.zeros(4, 5)},
        {"scalars": 1, "scalars_out": 1, "convolution": "full", "orientations": 0},
        *({"scalars": 1, "scalars_out": 1, "hidden": 8, **wrong} for wrong in (
            {"orientations": -1}, {"cutoff": 0.0}, {"cutoff": -1.0}, {"cutoff": float("nan")},
            {"window_cutoff": 0.0}, {"length": 0.0}, {"degree": 0}, {"widening": 0},
            {"dim": 2, "grid": rotation_group("tetrahedron")},
            {"grid": -rotation_group("tetrahedron")},
            {"grid": torch.cat([platonic(6), platonic(6)]), "quadrature": True},
        )),
    ],
)  # fmt: skip
def test_impossible_networks_are_refused(options):
    with pytest.raises(UserError):
        Ponita(**options)


def plain(model):
    """The same network that evaluates every orientation, opposite or not."""
    model._order = (model.grid, model.grid._version, None)
    return model


@pytest.mark.parametrize("recompute", [None, "messages", "basis"])
@pytest.mark.parametrize("options", [
    {"orientations": 12}, {"orientations": 20, "invariants": "reference"},
    {"dim": 2, "orientations": 6, "invariants": "complete"}, {"orientations": 8, "cutoff": 2.0},
    {"orientations": 12, "quadrature": True},
])  # fmt: skip
def test_half_of_an_antipodal_grid_is_enough(options, recompute):
    dim = options.get("dim", 3)
    half, whole = network(**options, recompute=recompute), plain(network(**options))
    assert half._antipodal_order() is not None
    clouds = zip(cloud(6, dim, seed=1), cloud(6, dim, seed=2), strict=True)
    data = [torch.stack(pair) for pair in clouds]
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    for one, other in zip(half(*data, mask=mask), whole(*data, mask=mask), strict=True):
        assert close(one, other)
    flat, batch = [x.flatten(0, 1) for x in data], torch.arange(2).repeat_interleave(6)
    edges = torch.tensor([(a, b) for a in range(6) for b in range(6) if a - b in (1, -1, 3, -3)]).T
    given = {"edges": edges, "offsets": (edges[:1] - edges[1:]).T * torch.ones(dim).double()}
    for how in (given | {"mutual": True}, {"edges": "full", "batch": batch}, given):
        short = [x[:6] for x in flat] if "offsets" in how else flat
        for one, other in zip(half(*short, **how), whole(*short, **how), strict=True):
            assert close(one, other)


def test_on_another_grid_the_areas_are_those_of_the_other_grid():
    model = network(grid=fibonacci(17), quadrature=True).regridded(fibonacci(33))
    assert torch.equal(model.weights, quadrature_weights(fibonacci(33)))


def test_rotations_to_average_over_are_looked_at():
    model = network(dim=2, orientations=5)
    x, s, v = cloud(7, 2)
    for wrong in (0, torch.eye(2)):
        with pytest.raises(UserError, match="rotations"):
            symmetrise(model, wrong)
    with pytest.raises(UserError, match="as many dimensions"):
        symmetrise(model, 4)(x, s, v, edges="full")
    assert close(
        symmetrise(model, torch.eye(2)[None])(x, s, v, edges="full").scalars,
        model(x, s, v, edges="full").scalars,
    )


def test_a_grid_that_is_replaced_or_changed_is_looked_at_again():
    model = network(orientations=12)
    assert model._antipodal_order() is not None
    model.grid[0] = torch.tensor([0.0, 0.6, 0.8])
    assert model._antipodal_order() is None
    model.grid = fibonacci(12)
    assert model._antipodal_order() is None
    model.grid = circle(12)
    order = model._antipodal_order()
    first, second = model.grid[order].chunk(2)
    assert close(first, -second)
