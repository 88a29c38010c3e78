"""Plans: what they may say, what they count, and how a size becomes one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.folding import BlockSizes, FoldPlan, fold, plan
from weightshare.folding.blocks import BlockLosses
from weightshare.folding.families import block_sizes
from weightshare.folding.gradients import gradient_distances
from weightshare.folding.planner import budget, replacement_costs
from weightshare.folding.plans import count_removed, merge_adjacent

SIZES = BlockSizes(blocks=12, shared=1000, private=10, other=500)


@given(st.data())
def test_a_plan_survives_json(data):
    blocks = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(blocks)))
    cut = data.draw(st.integers(0, blocks - 1))
    rest, groups = order[cut:], []
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        groups.append(tuple(rest[:size]))
        rest = rest[size:]
    chosen = tuple(data.draw(st.sampled_from(group)) for group in groups)
    made = FoldPlan(blocks, tuple(order[:cut]), tuple(groups), "best", chosen)
    again = FoldPlan.from_dict(made.to_dict())
    assert again == made
    assert sorted([*made.removed, *made.remaining]) == list(range(blocks))
    assert all(b in g for b, g in zip(made.representatives, made.groups, strict=True))


def test_blocks_named_nowhere_stand_alone():
    made = FoldPlan(5, removed=(1,), groups=((2, 4),))
    assert made.groups == ((0,), (2, 4), (3,))
    assert made.unique_blocks == 3 and made.remaining == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"removed": (7,)}, "names block 7"),
        ({"removed": (-1,)}, "names block -1"),
        ({"removed": (1,), "groups": ((1, 2),)}, "block 1 more than once"),
        ({"groups": ((1, 2), (2, 3))}, "block 2 more than once"),
        ({"removed": (0, 1, 2, 3, 4)}, "removes all 5"),
        ({"representative": "median"}, "not known"),
        ({"groups": ((1, 2),), "representatives": (3,)}, "do not fit"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        FoldPlan(5, **arguments)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"blocks": "x"}', '{"blocks": 3, "removed": 5}', '{"blocks": 3, "what": 1}'],
)
def test_files_that_hold_no_plan_are_refused(tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(UserError):
        FoldPlan.load(file)
    with pytest.raises(UserError, match="cannot be read"):
        FoldPlan.load(tmp_path / "none.json")


@given(st.integers(2, 40), st.floats(0, 0.999))
def test_the_number_removed_is_the_rounded_target_for_every_fraction(blocks, fraction):
    if int(fraction * blocks + 0.5) >= blocks:
        with pytest.raises(UserError):
            count_removed(fraction, blocks)
    else:
        assert abs(count_removed(fraction, blocks) - fraction * blocks) <= 0.5


@pytest.mark.parametrize("fraction", [1.0, 1.2, -0.1, float("nan")])
def test_fractions_outside_0_to_1_are_refused(fraction):
    with pytest.raises(UserError, match="fraction"):
        count_removed(fraction, 12)


def test_half_a_block_is_rounded_up_where_python_rounds_to_even():
    assert count_removed(0.25, 10) == 3
    assert round(2.5) == 2


@given(st.integers(1, 12))
def test_targets_are_met_by_the_largest_model_that_fits(unique):
    target = SIZES.other + unique * SIZES.shared + 12 * SIZES.private
    if target >= SIZES.total():
        return
    wanted = budget(SIZES, target_params=target)
    uses = 12 - wanted.removals
    total = SIZES.other + (uses - wanted.merges) * SIZES.shared + uses * SIZES.private
    assert total <= target < total + SIZES.shared


def test_targets_out_of_reach_are_refused():
    with pytest.raises(UserError, match="cannot be reached"):
        budget(SIZES, target_params=1000)
    with pytest.raises(UserError, match="no more than"):
        budget(SIZES, target_params=SIZES.total())
    with pytest.raises(UserError, match="group size"):
        budget(SIZES, share=13)


def test_merging_in_the_middle_spares_the_ends():
    assert merge_adjacent(range(10), 3, 2, 2) == [[2, 3], [4, 5], [6, 7]]
    assert merge_adjacent(range(10), 3, 3, 2) == [[2, 3, 4], [5, 6]]
    with pytest.raises(UserError, match="3 sets of weights"):
        merge_adjacent(range(10), 4, 2, 2)


def test_target_params_is_what_the_folded_model_has():
    model = make("llama", blocks=10)
    for target in (35_000, 45_000, 60_000):
        made = plan(model, list(range(4, 10)), target_params=target)
        counted = sum(p.numel() for p in fold(model, made).parameters())
        assert counted == block_sizes(model).total(made) <= target
        assert counted + block_sizes(model).shared > target


def test_protected_blocks_are_neither_removed_nor_shared():
    model = make("llama", blocks=8)
    made = plan(model, range(8), remove=0.25, share=2, protect=(0, 4))
    assert made.removed == (1, 2)
    assert (0,) in made.groups and (4,) in made.groups


def test_distances_find_the_pair_that_is_equal():
    model = make("llama", blocks=5)
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            model.model.layers[3].get_parameter(name).copy_(parameter)
    losses = BlockLosses(model, tokens())
    cost = replacement_costs(losses, range(5), 2)
    assert cost[2, 3] == pytest.approx(0, abs=1e-6)
    made = plan(
        model, target_params=block_sizes(model).total() - 100, grouping="distance", losses=losses
    )
    assert made.shared_groups == ((2, 3),)
    every = plan(model, share=2, grouping="distance", losses=losses)
    assert (2, 3) in every.groups and every.unique_blocks == 3


def test_gradients_of_equal_blocks_in_a_row_agree_most():
    """Twins whose second does nothing to what the first reads: equal inputs, equal gradients."""
    model = make("llama", blocks=5)
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            model.model.layers[3].get_parameter(name).copy_(parameter)
        for block in (2, 3):
            model.model.layers[block].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[block].mlp.down_proj.weight.mul_(1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.requires_grad_(False)
    losses = BlockLosses(model, tokens(8))
    distance = gradient_distances(losses, range(5))
    assert torch.allclose(distance, distance.T)
    pairs = {(i, i + 1): float(distance[i, i + 1]) for i in range(4)}
    assert min(pairs, key=pairs.__getitem__) == (2, 3)
    made = plan(
        model,
        target_params=block_sizes(model).total() - 100,
        grouping="agreement",
        losses=losses,
    )
    assert made.shared_groups == ((2, 3),)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_groupings_that_cannot_be_are_refused():
    model = make("llama", blocks=5)
    with pytest.raises(UserError, match="not known"):
        plan(model, share=2, grouping="alphabetical")
    with pytest.raises(UserError, match="needs calibration"):
        plan(model, share=2, grouping="agreement")
