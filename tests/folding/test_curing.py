"""The cure: what it trains, what it leaves alone, and losses that are right under padding."""

import copy

import pytest
import torch
from small_models import make, tokens

from weightshare.errors import UserError
from weightshare.folding import CureConfig, FoldPlan, cure, fold
from weightshare.folding.curing import CureTask, depths_of
from weightshare.folding.lora import SharedLora
from weightshare.training import GradientUpdate, LoopConfig, total

PLAN = FoldPlan(6, removed=(4,), groups=((1, 2), (3, 5)))


def columns(ids, **more):
    return {"input_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool), **more}


def pair(family="llama", plan=PLAN):
    teacher = make(family)
    return fold(teacher, plan), teacher


def test_the_teacher_is_left_alone(model):
    student = fold(model, PLAN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cure(student, model, columns(tokens(6)), config=CureConfig(steps=3), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    teacher = make("llama").double()
    student = copy.deepcopy(teacher)
    config = CureConfig(cross_entropy=0.0)
    task = CureTask(student, teacher, config, depths_of(student, teacher))
    losses = task(columns(tokens()))
    assert losses["kl"].sum.item() == pytest.approx(0, abs=1e-6)
    assert losses["tail1"].sum.item() == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(total(losses), list(student.parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-12


def test_padding_changes_none_of_the_three_losses(family):
    student, teacher = pair(family)
    ids = tokens(2, 12)
    task = CureTask(student, teacher, CureConfig(tail_blocks=2), depths_of(student, teacher))
    plain = task(columns(ids, attention_mask=torch.ones_like(ids)))
    for filler in (0, 7, 90):
        padded = torch.cat([ids, torch.full((2, 5), filler)], 1)
        real = torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=ids.dtype)], 1)
        found = task({"input_ids": padded, "mask": real.bool(), "attention_mask": real})
        for name, term in plain.items():
            assert float(found[name].sum) == pytest.approx(float(term.sum), rel=1e-4), name
            assert float(found[name].count) == pytest.approx(float(term.count), rel=1e-4)


def test_the_tail_term_is_the_mean_square_over_the_teachers_mean_square():
    student, teacher = pair()
    ids = tokens()
    task = CureTask(student, teacher, CureConfig(), depths_of(student, teacher))
    term = task(columns(ids))["tail1"]
    with torch.no_grad():
        states = {}
        for name, model in (("s", student), ("t", teacher)):
            handle = model.model.norm.register_forward_pre_hook(
                lambda _m, args, name=name: states.__setitem__(name, args[0][:, :-1])
            )
            model(ids)
            handle.remove()
    expected = (states["s"] - states["t"]).square().mean() / states["t"].square().mean()
    assert float(term.sum / term.count) == pytest.approx(float(expected), rel=1e-5)


def test_depths_follow_the_original_numbers_and_end_at_the_end():
    student, teacher = pair()
    assert depths_of(student, teacher) == [0, 1, 2, 3, 5]
    shorter = fold(teacher, FoldPlan(6, removed=(5,), groups=((0, 1),)))
    assert depths_of(shorter, teacher)[-1] == 5


def test_cutting_a_batch_into_parts_changes_nothing_but_rounding():
    """Parts with unequal numbers of targets; the losses themselves are taken in float32."""
    results = []
    for parts in (1, 2, 4):
        student, teacher = (m.double() for m in pair())
        task = CureTask(student, teacher, CureConfig(), depths_of(student, teacher))
        ids = tokens(4)
        batch = columns(ids)
        batch["mask"][0, 5:] = False
        batch["mask"][3, 11:] = False
        update = GradientUpdate.from_config(
            task, LoopConfig(steps=1, accumulate=parts), student.parameters()
        )
        _, gradients = update.differentiate(batch)
        results.append(gradients)
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-7), name


def test_gradient_checkpointing_gives_the_same_gradients():
    student, teacher = pair()
    task = CureTask(student.train(), teacher, CureConfig(), depths_of(student, teacher))
    batch = columns(tokens())
    plain = torch.autograd.grad(total(task(batch)), list(student.parameters()))
    student.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(total(task(batch)), list(student.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("trainable", ["all", "norms", "lora"])
def test_a_cure_lowers_the_loss_and_keeps_the_ties(trainable):
    student, teacher = pair()
    config = CureConfig(steps=30, trainable=trainable, learning_rate=3e-3, evaluate_every=10)
    data, held = columns(tokens(16)), columns(tokens(4, seed=9))
    task = CureTask(student, teacher, config, depths_of(student, teacher))
    with torch.no_grad():
        before = float(total(task(data)))
    kept = {n: p.detach().clone() for n, p in student.named_parameters() if "norm" not in n}
    fit = cure(student, teacher, data, held, config, progress=False)
    with torch.no_grad():
        assert float(total(task(data))) < before
    assert "kl" in fit.evaluation
    assert all(
        student.get_parameter(u) is student.get_parameter(s) for u, s in student.block_ties.items()
    )
    if trainable == "norms":
        assert all(torch.equal(kept[n], student.get_parameter(n)) for n in kept)
    assert not any(m._forward_hooks for m in student.modules())
    assert not student.training


def test_merging_shared_lora_is_exact():
    student, _ = pair()
    student.double()
    lora = SharedLora(student, rank=3).double()
    with torch.no_grad():
        for factor in lora.up:
            factor.normal_(0, 0.05)
        with_hooks = student(tokens()).logits
        plain_size = len(lora.up)
        lora.merge()
        merged = student(tokens()).logits
    assert torch.allclose(with_hooks, merged, atol=1e-10)
    # One pair of factors per shared matrix: 3 sets of weights with 7 matrices each.
    assert plain_size == 3 * 7


def test_half_precision_students_are_trained_in_float32_and_come_back():
    student, teacher = pair()
    student.to(torch.bfloat16)
    before = student.model.layers[0].mlp.up_proj.weight.clone()
    cure(
        student,
        teacher,
        columns(tokens(8)),
        config=CureConfig(steps=10, learning_rate=1e-3),
        progress=False,
    )
    assert student.dtype == torch.bfloat16
    assert not torch.equal(before, student.model.layers[0].mlp.up_proj.weight)


def test_a_cure_without_any_loss_is_refused():
    student, teacher = pair()
    with pytest.raises(UserError, match="All three"):
        cure(
            student,
            teacher,
            columns(tokens()),
            config=CureConfig(cross_entropy=0, distillation=0, tail=0),
        )


def test_early_stopping_keeps_the_best_weights():
    student, teacher = pair()
    config = CureConfig(steps=60, learning_rate=0.5, evaluate_every=2, patience=2)
    fit = cure(
        student, teacher, columns(tokens(8)), columns(tokens(4, seed=9)), config, progress=False
    )
    assert fit.stopped_early and fit.step < 60
    task = CureTask(student, teacher, config, depths_of(student, teacher))
    from weightshare.training import held_out

    with torch.no_grad():
        again = held_out(task, [columns(tokens(4, seed=9))])
    assert again["kl"] == pytest.approx(fit.evaluation["kl"], rel=1e-4)
