"""Folded language models: uses at depths, one plan in, another plan out."""

import copy

import pytest
import torch
from small_models import FAMILIES, make, tokens
from transformers import AutoModelForCausalLM

from weightshare.audit import Suggestion, Unsharing, apply, audit
from weightshare.audit.folded import is_folded, unshared_plan
from weightshare.audit.unsharing import KINDS
from weightshare.errors import UserError
from weightshare.folding import Delta, FoldPlan, fold, unfold
from weightshare.folding.families import block_sizes
from weightshare.folding.modeling_folded import DeltaLinear
from weightshare.language import quiet
from weightshare.sharing import size, tie

every_family = pytest.mark.parametrize("folded", FAMILIES, indirect=True)
GROUPS = (("model.layers.1", "model.layers.3"), ("model.layers.2",))
HEAD = (("model.embed_tokens",), ("lm_head",))


def layers_of(model, batches, loss, per="layer"):
    found = audit(model, batches[:2], loss, per=per, suggestions=False, draws=1).findings
    return {f.layer.name: f.layer for f in found}


def blocks_layer(model, batches, loss):
    return layers_of(model, batches, loss)["model.layers.{1,2,3}"]


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def shake(model, seed=0):
    """Every parameter moves, as training moves it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_groups_and_the_tied_head_are_found(folded, batches, loss):
    found = audit(folded, batches, loss, suggestions=False)
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


@pytest.mark.parametrize("per", ["layer", "tensor"])
@every_family
def test_every_suggestion_is_a_new_plan(folded, batches, loss, per, tmp_path):
    """The oracle of all of them: plan, size, bits, training, files and the stock model agree."""
    offers = [
        Unsharing(kind, layer, GROUPS if "layers" in layer.name else HEAD, 2)
        for layer in layers_of(folded, batches, loss, per).values()
        if per == "layer"
        or any(part in name for name in layer.tensors for part in ("up_p", "bias"))
        for kind in KINDS
    ]
    offers = [offer for offer in offers if offer.added(folded)]
    assert {offer.kind for offer in offers} == set(KINDS)
    for offer in offers:
        model, before = copy.deepcopy(folded), logits(folded)
        expected = unshared_plan(model, offer)
        plan = apply(model, offer)
        # a plan, which JSON holds and the model knows
        assert isinstance(plan, FoldPlan) and plan == expected
        assert FoldPlan.from_dict(plan.to_dict()) == plan
        assert model.config.fold_plan == plan.to_dict()
        # its size is what was promised, in every count
        assert size(model).unique - size(folded).unique == offer.added(folded) > 0
        # nothing changes before the first step
        assert torch.equal(logits(model), before)
        shake(model)
        after = logits(model)
        assert not torch.allclose(after, before, atol=1e-3)
        # saved and loaded, and as an ordinary model
        folder = tmp_path / f"{offer.kind}-{len(list(tmp_path.iterdir()))}"
        with quiet():
            model.save_pretrained(folder, max_shard_size="40KB")
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), after)
        assert size(loaded).unique == size(model).unique
        stock = unfold(model)
        assert type(stock).__name__.startswith(("Llama", "Mistral", "Qwen"))
        assert torch.allclose(logits(stock), after, atol=1e-5)
        assert not any(".delta_" in name for name in stock.state_dict())


@every_family
def test_a_plan_with_deltas_folds_the_original_to_the_same_size(folded, batches, loss):
    for kind in ("scale", "low_rank"):
        plan = unshared_plan(
            folded, Unsharing(kind, blocks_layer(folded, batches, loss), GROUPS, 2)
        )
        original = make(folded.config.model_type.rpartition("_")[2], tie_word_embeddings=True)
        again = fold(original, plan)
        assert torch.equal(logits(again), logits(folded))
        assert block_sizes(original).total(plan) == size(again).unique > size(folded).unique


def test_unsharing_blocks_is_a_new_plan_in_original_block_numbers(folded, batches, loss):
    assert is_folded(folded)
    layer = blocks_layer(folded, batches, loss)
    plan = unshared_plan(folded, Unsharing("unshare", layer, GROUPS))
    assert plan.groups == ((0,), (1, 4), (3,), (5,))
    assert plan.removed == (2,) and plan.deltas == ()


def test_a_scale_and_a_low_rank_delta_are_the_equations(folded, batches, loss):
    name = "model.layers.1.mlp.up_proj.weight"
    layer = layers_of(folded, batches, loss, "tensor")[name]
    x = torch.randn(3, folded.get_parameter(name).shape[1])
    for kind in ("scale", "low_rank"):
        model = copy.deepcopy(folded)
        apply(model, Unsharing(kind, layer, GROUPS, 2))
        shake(model)
        path = name.replace("layers.1.", "layers.2.").removesuffix(".weight")
        module, shared = model.get_submodule(path), model.get_parameter(name)
        assert isinstance(module, DeltaLinear) and module.weight is shared
        expected = (
            x @ (shared * (1 + module.delta_unit * module.delta_scale)[:, None]).T
            if kind == "scale"
            else x @ shared.T + x @ module.delta_a.T @ module.delta_b.T
        )
        assert torch.allclose(module(x), expected, atol=1e-5)
        assert not isinstance(model.get_submodule(path.replace("2", "3")), DeltaLinear)


def test_uses_of_one_group_share_their_delta(folded, batches, loss):
    layer = blocks_layer(folded, batches, loss)
    groups = (("model.layers.2",), ("model.layers.1", "model.layers.3"))
    apply(folded, Unsharing("low_rank", layer, groups, 2))
    one, other = (folded.model.layers[i].mlp.up_proj for i in (1, 3))
    assert one.delta_a is other.delta_a and one.delta_b is other.delta_b
    assert type(folded.model.layers[2].mlp.up_proj) is torch.nn.Linear


def test_a_low_rank_delta_starts_on_the_measured_disagreement(folded, batches, loss):
    found = audit(folded, batches, loss, rank=2, draws=20)
    offer = next(
        s for s in found.suggestions
        if s.unsharing.kind == "low_rank" and "layers" in s.unsharing.layer.name
    )  # fmt: skip
    plan = apply(folded, offer)
    for delta in plan.deltas:
        place = plan.remaining.index(delta.blocks[0])
        module = folded.get_submodule(
            f"model.layers.{place}.{delta.parameter.removesuffix('.weight')}"
        )
        rows = offer.directions[f"model.layers.1.{delta.parameter}@1"]
        cosine = torch.nn.functional.cosine_similarity(module.delta_a, rows, dim=1)
        assert torch.allclose(cosine, torch.ones(2), atol=1e-5)
        size = float(module.delta_a.detach().square().mean()) * len(module.delta_a)
        assert size == pytest.approx(1, rel=1e-4)
        assert not module.delta_b.any()


def test_shared_norms_become_private_ones(batches, loss, tmp_path):
    plan = FoldPlan(4, groups=((0, 1, 2),), private=())
    folded = fold(make("qwen3", blocks=4), plan)
    layer = layers_of(folded, batches, loss)["model.layers.{0,1,2}"]
    groups = (("model.layers.0", "model.layers.2"), ("model.layers.1",))
    before, unsharing = logits(folded), Unsharing("scale", layer, groups)
    unique, added = size(folded).unique, unsharing.added(folded)
    plan = apply(folded, unsharing)
    kinds = {delta.parameter: delta.kind for delta in plan.deltas}
    assert kinds["input_layernorm.weight"] == kinds["self_attn.q_norm.weight"] == "own"
    assert kinds["mlp.up_proj.weight"] == "scale"
    assert torch.equal(logits(folded), before) and size(folded).unique - unique == added
    shake(folded)
    with quiet():
        folded.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(folded))
    assert torch.allclose(logits(unfold(folded)), logits(folded), atol=1e-5)


def test_the_tied_head_gets_a_delta_or_weights_of_its_own(folded, batches, loss):
    layer = layers_of(folded, batches, loss)["model.embed_tokens + lm_head"]
    before = logits(folded)
    for kind in KINDS:
        model = copy.deepcopy(folded)
        plan = apply(model, Unsharing(kind, layer, HEAD, 2))
        (delta,) = plan.deltas
        assert (delta.parameter, delta.blocks) == ("lm_head.weight", ())
        assert torch.equal(logits(model), before)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind != "unshare")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.1)
            for name, parameter in model.lm_head.named_parameters():
                if name != "weight":
                    parameter += 0.1
        stock = unfold(model)
        assert not stock.config.tie_word_embeddings
        assert torch.allclose(logits(stock), logits(model), atol=1e-5)


def test_a_second_audit_goes_on_where_the_first_ended(folded, batches, loss):
    """Deltas, then groups that cut them, then copies out of copies: bits stay what they were."""
    layer = blocks_layer(folded, batches, loss)
    groups = (("model.layers.1",), ("model.layers.2", "model.layers.3"))
    apply(folded, Unsharing("low_rank", layer, groups, 2))
    shake(folded)
    before = logits(folded)
    # all that the group shares, apart: deltas of two blocks become two deltas of one
    plan = apply(folded, Unsharing("unshare", layer, GROUPS))
    assert plan.groups == ((0,), (1, 4), (3,), (5,))
    assert {delta.blocks for delta in plan.deltas} == {(3,), (4,)}
    assert torch.equal(logits(folded), before)
    # what the delta's uses still share can be told apart by another audit
    apart = layers_of(folded, batches, loss, "tensor")
    assert all(len(layer.users) == 2 for layer in apart.values())
    (chosen,) = [x for x in apart.values() if any("down_proj.weight" in t for t in x.tensors)]
    one, other = chosen.users
    plan = apply(folded, Unsharing("unshare", chosen, ((one,), (other,))))
    assert Delta("mlp.down_proj.weight", (4,), "own") in plan.deltas
    assert torch.equal(logits(folded), before)
    with pytest.raises(UserError, match="already"):
        apply(folded, Unsharing("scale", chosen, ((one,), (other,))))


def test_a_delta_can_be_cut_but_has_no_delta(folded, batches, loss):
    layer = blocks_layer(folded, batches, loss)
    groups = (("model.layers.1",), ("model.layers.2", "model.layers.3"))
    apply(folded, Unsharing("low_rank", layer, groups, 2))
    shake(folded)
    before = logits(folded)
    deltas = layers_of(folded, batches, loss)["model.layers.{2,3}"]
    apart = (("model.layers.2",), ("model.layers.3",))
    with pytest.raises(UserError, match="itself a delta"):
        apply(folded, Unsharing("scale", deltas, apart))
    unique = size(folded).unique
    unsharing = Unsharing("unshare", deltas, apart)
    added = unsharing.added(folded)
    apply(folded, unsharing)
    assert size(folded).unique - unique == added
    assert torch.equal(logits(folded), before)


def test_what_is_no_fold_is_refused(folded, batches, loss):
    layer = blocks_layer(folded, batches, loss)
    with pytest.raises(UserError, match="was not folded"):
        unshared_plan(torch.nn.Linear(2, 2), Unsharing("unshare", layer, GROUPS))


def test_leaving_it_shared_returns_the_plan_it_has(folded, batches, loss):
    layer = blocks_layer(folded, batches, loss)
    plan = apply(folded, Suggestion(Unsharing("nothing", layer, (layer.users,)), added=0))
    assert plan.to_dict() == folded.config.fold_plan


def test_a_model_in_bfloat16_is_audited(batches, loss):
    model = fold(make("llama", blocks=3).bfloat16(), FoldPlan(3, groups=((0, 1, 2),)))
    found = audit(model, batches, loss)
    tried = [s for s in found.suggestions if s.unsharing.kind != "nothing"]
    assert len(tried) == 3 and all(s.predicted == s.predicted for s in tried)
    before = logits(model)
    for suggestion in tried:
        changed = copy.deepcopy(model)
        apply(changed, suggestion)
        assert torch.equal(logits(changed), before)


def test_a_frozen_model_is_refused(folded, batches, loss):
    with pytest.raises(UserError, match="frozen"):
        audit(folded.requires_grad_(False), batches, loss)
