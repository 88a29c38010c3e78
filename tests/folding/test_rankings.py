"""Rankings: exact where they can be, equal to the naive way where they are fast."""

import itertools

import pytest
import torch
from small_models import make, own_text, tokens

from weightshare.errors import UserError
from weightshare.folding import RANKINGS, FoldPlan, GateConfig, fold, rank
from weightshare.folding.blocks import BlockLosses
from weightshare.folding.influence import angular_spans, block_influence, hidden_cosines
from weightshare.folding.search import exhaustive, greedy, one_shot, swaps
from weightshare.language import evaluating

QUICK = GateConfig(steps=30, seeds=2, sequences=4)


def loss_without(model, ids, removed):
    shorter = fold(model, FoldPlan(len(model.model.layers), removed=tuple(removed)))
    with torch.no_grad():
        return float(shorter(ids, labels=ids).loss)


def test_block_influence_equals_the_hidden_states_of_transformers(model):
    ids = tokens()
    found = block_influence(BlockLosses(model, ids, batch_size=2))
    with evaluating(model):
        states = model.model(ids, output_hidden_states=True).hidden_states
    # The last state transformers returns is normed; compare those before it.
    for block in range(len(found) - 1):
        cosine = torch.nn.functional.cosine_similarity(states[block], states[block + 1], dim=-1)
        assert found[block] == pytest.approx(1 - float(cosine.mean()), abs=1e-6)


def test_cosines_of_neighbours_are_block_influence(model):
    losses = BlockLosses(model, tokens(), batch_size=2)
    cosines = hidden_cosines(losses)
    assert torch.allclose(cosines, cosines.T) and torch.allclose(
        cosines.diagonal(), torch.ones(7, dtype=torch.float64)
    )
    expected = [1 - float(cosines[block, block + 1]) for block in range(6)]
    assert block_influence(losses) == pytest.approx(expected, abs=1e-6)
    assert len(angular_spans(cosines, 2)) == 5


def test_leave_one_out_equals_models_that_were_really_shortened(model):
    ids = tokens()
    found = one_shot(BlockLosses(model, ids, batch_size=2))
    for block, loss in found.items():
        assert loss == pytest.approx(loss_without(model, ids, [block]), abs=1e-5)


def test_greedy_equals_greedy_without_caching():
    model, ids = make("qwen2"), tokens()
    order, path = greedy(BlockLosses(model, ids), 3)
    removed: list[int] = []
    for block, loss in zip(order, path, strict=True):
        costs = {b: loss_without(model, ids, [*removed, b]) for b in range(6) if b not in removed}
        assert block == min(costs, key=costs.__getitem__)
        assert loss == pytest.approx(costs[block], abs=1e-5)
        removed.append(block)


def test_exhaustive_equals_every_subset_one_by_one():
    model, ids = make("llama", blocks=5), tokens()
    losses = BlockLosses(model, ids)
    table = exhaustive(losses, 2)
    assert set(table) == set(itertools.combinations(range(5), 2))
    for subset, loss in table.items():
        assert loss == pytest.approx(loss_without(model, ids, subset), abs=1e-5)
    # Sharing the front of the network: far fewer block runs than 10 subsets of 3 blocks.
    assert losses.block_runs < 10 * 3


def test_exhaustive_refuses_what_would_take_days():
    class Many(BlockLosses):
        def __init__(self):
            self.blocks = 60

    with pytest.raises(UserError, match="use greedy"):
        exhaustive(Many(), 10)


def test_swaps_end_where_no_exchange_helps():
    model, ids = make("llama"), tokens()
    losses = BlockLosses(model, ids)
    chosen, loss, _ = swaps(losses, [4, 5])
    table = exhaustive(losses, 2)
    assert loss == pytest.approx(table[tuple(sorted(chosen))], abs=1e-6)
    for out, into in itertools.product(chosen, set(range(6)) - set(chosen)):
        assert table[tuple(sorted({*chosen, into} - {out}))] >= loss - 1e-6


@pytest.mark.parametrize("method", RANKINGS)
def test_a_no_op_block_goes_first_and_protected_blocks_stay(method):
    model = make("llama")
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    found = rank(model, own_text(model), method, remove=1, protect=(0,), gates=QUICK)
    assert sorted(found.order) == list(range(6)) and len(found.scores) == 6
    assert found.order[0] != 0
    if method != "random":
        assert found.order[0] == 3
    assert found.metadata["block_runs"] >= 0


@pytest.mark.parametrize("method", RANKINGS)
def test_a_ranking_leaves_the_model_and_the_random_streams_as_they_were(method):
    model = make("llama", blocks=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rank(model, tokens(), method, remove=1, gates=QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training and model.model.layers[0].training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", RANKINGS)
def test_the_same_seed_gives_the_same_ranking(method):
    model, ids = make("llama", blocks=4), tokens()
    one, two = (rank(model, ids, method, remove=2, seed=3, gates=QUICK) for _ in range(2))
    assert one.order == two.order and one.scores == two.scores


def test_a_memo_is_asked_before_anything_is_computed():
    model, ids, kept = make("llama", blocks=4), tokens(), {}
    runs = []

    def memo(key, compute):
        if key not in kept:
            runs.append(key)
            kept[key] = compute()
        return kept[key]

    first = rank(model, ids, "gates", remove=1, gates=QUICK, refine="swaps", memo=memo)
    done = len(runs)
    again = rank(model, ids, "gates", remove=1, gates=QUICK, refine="swaps", memo=memo)
    assert len(runs) == done > 2
    assert again.order == first.order and again.scores == first.scores


def test_wrong_requests_are_refused():
    model, ids = make("llama", blocks=4), tokens()
    with pytest.raises(UserError, match="not known"):
        rank(model, ids, "magic", remove=1)
    with pytest.raises(UserError, match="at least one block"):
        rank(model, ids, "random", remove=4)
    with pytest.raises(UserError, match="refinement"):
        rank(model, ids, "random", remove=1, refine="twice")
