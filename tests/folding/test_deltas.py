"""What uses have of their own on top of a shared weight: in plans, in models, in cures."""

from dataclasses import replace

import pytest
import torch
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.folding import CureConfig, Delta, FoldPlan, cure, fold, replan, unfold
from weightshare.folding.families import block_sizes
from weightshare.folding.lora import SharedLora

PLAN = FoldPlan(6, removed=(0,), groups=((1, 2, 3), (4, 5)))
DELTAS = (
    Delta("self_attn.q_proj.weight", (5,), "scale"),
    Delta("mlp.up_proj.weight", (2, 3), "low_rank", 2),
    Delta("mlp.down_proj.weight", (2,), "own"),
)
FULL = replace(PLAN, deltas=DELTAS)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def columns(ids):
    return {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}


def test_a_plan_with_deltas_survives_json_in_any_order(tmp_path):
    shuffled = replace(PLAN, deltas=(DELTAS[2], replace(DELTAS[1], blocks=(3, 2)), DELTAS[0]))
    assert shuffled == FULL
    FULL.save(tmp_path / "plan.json")
    assert FoldPlan.load(tmp_path / "plan.json") == FULL
    old = {key: value for key, value in PLAN.to_dict().items() if key != "deltas"}
    assert FoldPlan.from_dict(old) == PLAN  # a plan from before there were deltas


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (Delta("mlp.up_proj.weight", (2, 4), "own"), "spans several groups"),
        (Delta("mlp.up_proj.weight", (0,), "own"), "spans several groups"),
        (Delta("mlp.up_proj.weight", (), "own"), "names no block"),
        (Delta("mlp.up_proj.weight", (2,), "copy"), "one of own, scale"),
        (Delta("mlp.up_proj.weight", (2,), "low_rank"), "has rank 0"),
        (Delta("mlp.up_proj.weight", (2,), "own", 3), "has rank 3"),
        (Delta("input_layernorm.weight", (2,), "own"), "to itself"),
        (Delta("mlp.down_proj.weight", (2, 3), "own"), "at most one"),
        (Delta("mlp.up_proj.weight", (3,), "scale"), "at most one"),
        (Delta("mlp.down_proj.weight", (1, 3), "own"), "leaves no block"),
    ],
)
def test_deltas_without_a_meaning_are_refused(delta, message):
    with pytest.raises(UserError, match=message):
        replace(FULL, deltas=(*DELTAS, delta))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"deltas": [{"parameter": "x"}]}, "cannot be read"),
        ({"deltas": [{"parameter": "x", "blocks": 3, "kind": "own"}]}, "cannot be read"),
        ({"deltas": [{"parameter": "x", "blocks": [1], "kind": "own", "b": 1}]}, "cannot be read"),
    ],
)
def test_files_with_broken_deltas_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        FoldPlan.from_dict({**PLAN.to_dict(), **content})


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (Delta("mlp.gate.weight", (2,), "own"), "does not share"),
        (Delta("self_attn.q_proj.bias", (2,), "scale"), "is a vector"),
    ],
)
def test_deltas_of_what_a_model_does_not_have_are_refused(delta, message):
    with pytest.raises(UserError, match=message):
        fold(make("qwen2"), replace(PLAN, deltas=(delta,)))
    head = replace(PLAN, deltas=(Delta("lm_head.weight", (), "scale"),))
    with pytest.raises(UserError, match="does not share"):
        fold(make("llama", tie_word_embeddings=False), head)


def test_deltas_are_counted_and_change_nothing_at_first(model):
    plain, full = fold(model, PLAN), fold(model, FULL)
    assert torch.equal(logits(plain), logits(full))
    sizes = block_sizes(model)
    added = sum(
        parameter.numel() for name, parameter in full.named_parameters() if ".delta_" in name
    )
    assert full.num_parameters() == sizes.total(FULL)
    own = model.model.layers[0].mlp.down_proj.weight.numel()
    assert sizes.total(FULL) - sizes.total(PLAN) == added + own


def test_replanning_keeps_the_parameters_that_stay():
    folded = fold(make("llama"), PLAN)
    known = dict(folded.named_parameters())
    replan(folded, FULL)
    assert all(folded.get_parameter(name) is parameter for name, parameter in known.items())
    replan(folded, FULL)
    assert torch.equal(logits(folded), logits(fold(make("llama"), FULL)))


def test_replanning_a_model_of_another_class_is_refused():
    with pytest.raises(UserError, match="does not know as folded"):
        replan(make("llama"), FULL)


def test_a_plan_of_deltas_alone_is_still_a_fold():
    plan = FoldPlan(6, deltas=(Delta("mlp.up_proj.weight", (2,), "low_rank", 1),))
    model = make("llama")
    assert type(fold(model, plan)).__name__.startswith("Folded")
    assert torch.equal(logits(fold(model, plan)), logits(model))


@pytest.mark.parametrize("trainable", ["all", "norms", "lora"])
def test_a_cure_trains_what_uses_have_of_their_own(trainable):
    teacher = make("llama")
    student = fold(teacher, FULL)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    config = CureConfig(steps=3, batch_size=2, trainable=trainable, learning_rate=1e-2)
    cure(student, teacher, columns(tokens(6)), config=config, progress=False)
    for name, parameter in student.named_parameters():
        if ".delta_" in name and not name.endswith("delta_a"):
            assert not torch.equal(parameter, before[name]), name
    layers = student.model.layers
    assert layers[1].mlp.up_proj.delta_a is layers[2].mlp.up_proj.delta_a
    assert torch.allclose(logits(unfold(student)), logits(student), atol=1e-5)


def test_merging_shared_lora_is_exact_beside_scales_and_deltas():
    student = fold(make("qwen2"), FULL)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".delta_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    lora = SharedLora(student, rank=2)
    with torch.no_grad():
        for up in lora.up:
            up.normal_(0, 0.1)
    hooked = logits(student)
    lora.merge()
    assert torch.allclose(logits(student), hooked, atol=2e-5)


def test_generation_with_a_cache_equals_generation_without():
    student = fold(make("qwen3"), FULL)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".delta_" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    ids = tokens(2, 9)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    plain = student.generate(ids, use_cache=False, **options)
    assert torch.equal(student.generate(ids, **options), plain)
