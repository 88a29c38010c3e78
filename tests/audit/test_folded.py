"""Folded language models: uses at depths, one plan in, another plan out."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from weightshare.audit import Unsharing, apply, audit
from weightshare.audit.folded import is_folded, record, unshared_plan
from weightshare.errors import UserError
from weightshare.folding import FoldPlan, fold
from weightshare.sharing import size, tie


@pytest.fixture(scope="module")
def folded():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return fold(LlamaForCausalLM(config), FoldPlan(5, removed=(2,), groups=((1, 3, 4),)))


def loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def batches(n=6):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(40, (4, 12), generator=g) for _ in range(n)]


def test_groups_and_the_tied_head_are_found(folded):
    found = audit(folded, batches(), loss)
    assert {f.layer.name for f in found.findings} == {
        "model.layers.{1,2,3}",
        "model.embed_tokens + lm_head",
    }
    group = next(f for f in found.findings if "layers" in f.layer.name)
    assert len(group.layer.tensors) == 7
    assert found.saved == size(folded).saved


def test_the_fold_is_what_tie_would_make(folded):
    live = copy.deepcopy(folded)
    names = sorted({n.split(".", 3)[3] for n in folded.block_ties})
    tie(live, [[f"model.layers.{i}.{n}" for i in (1, 2, 3)] for n in names])
    assert size(live).unique == size(folded).unique


def split_blocks(model, groups):
    layers = audit(model, batches(2), loss, suggestions=False).findings
    layer = next(f.layer for f in layers if "layers" in f.layer.name)
    return Unsharing("unshare", layer, tuple(tuple(f"model.layers.{i}" for i in g) for g in groups))


def test_unsharing_blocks_is_a_new_plan_in_original_block_numbers(folded):
    assert is_folded(folded)
    plan = unshared_plan(folded, split_blocks(folded, ((1, 3), (2,))))
    assert plan.groups == ((0,), (1, 4), (3,))
    assert plan.removed == (2,)


def test_an_unshared_fold_is_bit_exact_saves_and_loads(folded, tmp_path):
    model = copy.deepcopy(folded)
    chosen = split_blocks(model, ((1, 3), (2,)))
    plan = unshared_plan(model, chosen)
    before = model(batches()[0]).logits
    apply(model, chosen)
    record(model, plan)
    assert torch.equal(model(batches()[0]).logits, before)
    layers = model.model.layers
    with torch.no_grad():
        layers[2].mlp.up_proj.weight += 1
    assert layers[1].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(batches()[0]).logits, model(batches()[0]).logits)
    assert size(loaded).unique == size(model).unique


def test_what_a_plan_cannot_say_is_refused(folded):
    chosen = split_blocks(folded, ((1, 3), (2,)))
    with pytest.raises(UserError, match="low_rank"):
        unshared_plan(folded, Unsharing("low_rank", chosen.layer, chosen.groups, 2))
    per_tensor = audit(folded, batches(2), loss, per="tensor", suggestions=False).findings
    layer = next(f.layer for f in per_tensor if "q_proj" in f.layer.name)
    with pytest.raises(UserError, match="per layer"):
        unshared_plan(folded, Unsharing("unshare", layer, chosen.groups))
    head = next(f.layer for f in per_tensor if "embed" in f.layer.name)
    with pytest.raises(UserError, match="not a group of blocks"):
        unshared_plan(folded, Unsharing("unshare", head, (head.users[:1], head.users[1:])))
    with pytest.raises(UserError, match="was not folded"):
        unshared_plan(torch.nn.Linear(2, 2), chosen)


def test_a_model_in_bfloat16_is_audited():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = fold(LlamaForCausalLM(config).bfloat16(), FoldPlan(3, groups=((0, 1, 2),)))
    found = audit(model, batches(), loss)
    tried = [s for s in found.suggestions if s.unsharing.kind != "nothing"]
    assert len(tried) == 3 and all(s.predicted == s.predicted for s in tried)
    before = model(batches()[0]).logits
    for suggestion in tried:
        changed = apply(copy.deepcopy(model), suggestion)
        assert torch.equal(changed(batches()[0]).logits, before)


def test_a_frozen_model_is_refused(folded):
    model = copy.deepcopy(folded).requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        audit(model, batches(2), loss)
