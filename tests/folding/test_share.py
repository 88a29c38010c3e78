"""Removing, sharing and unfolding: identities that hold to the bit."""

import copy
import pickle

import pytest
import torch
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.folding import FoldPlan, fold, unfold
from weightshare.folding.blocks import BlockLosses
from weightshare.folding.families import block_sizes
from weightshare.sharing import find_shared, size, tie

PAIRS = FoldPlan(6, removed=(4,), groups=((1, 2), (3, 5)))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_the_identity_plan_is_the_model_bit_for_bit(model):
    folded = fold(model, FoldPlan(6))
    assert type(folded) is type(model)
    assert torch.equal(logits(folded, tokens()), logits(model, tokens()))


def test_groups_of_one_are_the_model_bit_for_bit(model):
    plan = FoldPlan(6, groups=tuple((block,) for block in range(6)))
    assert torch.equal(logits(fold(model, plan), tokens()), logits(model, tokens()))


def test_folding_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    fold(model, PAIRS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("removed", [(0,), (5,), (0, 1, 3), (1, 2, 3, 4, 5)])
def test_removal_equals_running_the_other_blocks(model, removed):
    ids = tokens()
    kept = [block for block in range(6) if block not in removed]
    losses = BlockLosses(model, ids)
    shorter = fold(model, FoldPlan(6, removed=removed))
    assert len(shorter.model.layers) == shorter.config.num_hidden_layers == len(kept)
    assert [layer.self_attn.layer_idx for layer in shorter.model.layers] == list(range(len(kept)))
    labels = ids.clone()
    with torch.no_grad():
        loss = shorter(ids, labels=labels).loss
    assert losses.of(kept) == pytest.approx(float(loss), abs=1e-5)


def test_sharing_blocks_that_are_equal_already_changes_nothing_but_the_size(model):
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            model.model.layers[2].get_parameter(name).copy_(parameter)
    folded = fold(model, FoldPlan(6, groups=((1, 2),)))
    assert torch.equal(logits(folded, tokens()), logits(model, tokens()))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, folded))
    assert before - after == block_sizes(model).shared


def test_parameter_counts_agree_everywhere(model):
    folded = fold(model, PAIRS)
    counted = sum(parameter.numel() for parameter in folded.parameters())
    assert counted == block_sizes(model).total(PAIRS) == folded.num_parameters()
    assert counted == size(folded).unique
    stored = {p.data_ptr(): p.nbytes for p in folded.state_dict().values()}
    assert sum(stored.values()) == size(folded).bytes == 4 * counted


def test_ties_are_those_that_sharing_would_make(model):
    """The modeling file cannot import the library; both must mean the same by a plan."""
    folded = fold(model, PAIRS)
    plain = unfold(folded)
    groups: dict[str, list[str]] = {}
    for use, source in folded.block_ties.items():
        groups.setdefault(source, [source]).append(use)
    tie(plain, groups.values())
    found = {
        frozenset(str(use).split(" ")[0] for use in shared.uses) for shared in find_shared(plain)
    }
    expected = {
        frozenset(str(use).split(" ")[0] for use in shared.uses) for shared in find_shared(folded)
    }
    assert found == expected
    assert torch.equal(logits(plain, tokens()), logits(folded, tokens()))


def test_norms_are_private_and_matrices_are_shared(model):
    folded = fold(model, PAIRS)
    first, second = folded.model.layers[1], folded.model.layers[2]
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert first.input_layernorm.weight is not second.input_layernorm.weight
    with torch.no_grad():
        first.input_layernorm.weight.fill_(0.5)
    assert not torch.equal(first.input_layernorm.weight, second.input_layernorm.weight)


def test_more_can_be_kept_private(model):
    folded = fold(model, FoldPlan(6, groups=((1, 2),), private=("norm", "mlp.down_proj")))
    first, second = folded.model.layers[1], folded.model.layers[2]
    assert first.mlp.down_proj.weight is not second.mlp.down_proj.weight
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight


def test_the_gradient_of_a_shared_tensor_is_the_sum_over_its_uses(model):
    folded = fold(model, PAIRS).double()
    plain = unfold(folded)
    ids = tokens()
    folded(ids, labels=ids).loss.backward()
    plain(ids, labels=ids).loss.backward()
    for use, source in folded.block_ties.items():
        uses = [use, *(u for u, s in folded.block_ties.items() if s == source and u != use), source]
        total = sum(plain.get_parameter(name).grad for name in uses)
        assert torch.allclose(folded.get_parameter(source).grad, total, rtol=1e-12, atol=1e-14)


def one_storage_per_group(model):
    return all(
        model.get_parameter(use) is model.get_parameter(source)
        for use, source in model.block_ties.items()
    )


def test_ties_survive_what_people_do_to_models(model):
    folded = fold(model, PAIRS)
    ids = tokens()
    optimizer = torch.optim.AdamW(folded.parameters(), lr=1e-3)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            folded(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert one_storage_per_group(folded)
    assert one_storage_per_group(copy.deepcopy(folded))
    assert one_storage_per_group(folded.to(torch.bfloat16))
    assert one_storage_per_group(folded.float())
    assert one_storage_per_group(pickle.loads(pickle.dumps(folded)))
    folded.load_state_dict(fold(model, PAIRS).state_dict())
    assert one_storage_per_group(folded)


def test_ties_lost_by_assigning_come_back_with_tie_weights(model):
    folded = fold(model, PAIRS)
    state = {name: value.clone() for name, value in folded.state_dict().items()}
    folded.load_state_dict(state, assign=True)
    folded.tie_weights()
    assert one_storage_per_group(folded)
    folded.to_empty(device="cpu")
    folded.tie_weights()
    assert one_storage_per_group(folded)


def test_unfolding_gives_the_stock_class_with_equal_logits(model):
    folded = fold(model, PAIRS)
    plain = unfold(folded)
    assert type(plain) is type(model)
    assert torch.equal(logits(plain, tokens()), logits(folded, tokens()))
    assert not find_shared(plain) or model.config.tie_word_embeddings


def test_folding_twice_is_refused_with_a_message(model):
    with pytest.raises(UserError, match="folded already"):
        fold(fold(model, PAIRS), PAIRS)


def test_a_no_op_block_can_go_without_a_trace(model):
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    shorter = fold(model, FoldPlan(6, removed=(3,)))
    # Qwen2's blocks 0-1 attend fully and 2-5 in a window, whichever block is removed.
    assert torch.equal(logits(shorter, tokens()), logits(model, tokens()))


def test_every_representative_gives_the_model_where_blocks_are_equal(model):
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            model.model.layers[2].get_parameter(name).copy_(parameter)
    for name in ("first", "last", "best", "mean"):
        plan = FoldPlan(6, groups=((1, 2),), representative=name)
        assert torch.equal(logits(fold(model, plan, tokens()), tokens()), logits(model, tokens()))
    plan = FoldPlan(6, groups=((1, 2),), representative="whitened")
    close = logits(fold(model, plan, tokens()), tokens())
    assert torch.allclose(close, logits(model, tokens()), atol=1e-4)


def test_whitened_weights_have_the_least_output_error():
    """No other matrix does better on the activations that it was fitted to."""
    model = make("qwen2", use_sliding_window=False)
    ids = tokens(8, 30)
    plan = FoldPlan(6, groups=((1, 2),), representative="whitened")
    folded = fold(model, plan, ids)
    inputs = {}
    handles = [
        model.model.layers[b].self_attn.q_proj.register_forward_pre_hook(
            lambda _m, args, b=b: inputs.__setitem__(b, args[0].flatten(0, 1))
        )
        for b in (1, 2)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()

    def error(weight, bias):
        total = 0.0
        for b in (1, 2):
            layer = model.model.layers[b].self_attn.q_proj
            total += (layer(inputs[b]) - inputs[b] @ weight.T - bias).square().sum().item()
        return total

    best = folded.model.layers[1].self_attn.q_proj
    least = error(best.weight, best.bias)
    for other in (1, 2):
        layer = model.model.layers[other].self_attn.q_proj
        assert least < error(layer.weight, layer.bias)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        step = 0.03 * torch.randn(best.weight.shape, generator=generator)
        assert least < error(best.weight + step, best.bias)


def test_meta_construction_draws_no_random_numbers(model):
    state = torch.get_rng_state()
    fold(model, PAIRS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_keeps_the_dtype(dtype):
    model = make("llama").to(dtype)
    folded = fold(model, PAIRS)
    assert folded.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in folded.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_fold_alike(tied):
    model = make("llama", tie_word_embeddings=tied)
    folded = fold(model, PAIRS)
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) is tied
    assert folded.num_parameters() == block_sizes(model).total(PAIRS)
    assert torch.equal(logits(unfold(folded), tokens()), logits(folded, tokens()))
