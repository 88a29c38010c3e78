import pytest
import torch
import torch.nn.functional as F

from weightshare.language import distillation_loss, hidden_mse, next_token_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        torch.randn(3, 7, 11, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(11, (3, 7), generator=generator)
    mask = torch.rand(3, 7, generator=generator) < 0.7
    return student, teacher, labels, mask


def test_next_token_loss_is_the_mean_of_log_probabilities_written_out(batch):
    student, _, labels, mask = batch
    total, count = 0.0, 0
    for b in range(3):
        for t in range(1, 7):
            if mask[b, t]:
                total -= student[b, t - 1].softmax(-1)[labels[b, t]].log()
                count += 1
    got, counted = next_token_loss(student, labels, mask)
    torch.testing.assert_close(got, total)
    assert counted == count


def test_labels_of_minus_100_are_no_targets(batch):
    student, _, labels, mask = batch
    got = next_token_loss(student, labels.masked_fill(~mask, -100))
    assert got == next_token_loss(student, labels, mask)


def test_distillation_loss_is_the_divergence_times_temperature_squared(batch):
    student, teacher, _, mask = batch
    log_s, log_t = ((x[:, :-1] / 2.0).log_softmax(-1) for x in (student, teacher))
    want = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    got, count = distillation_loss(student, teacher, mask, temperature=2.0)
    torch.testing.assert_close(got, 4 * want[mask[:, 1:]].sum())
    assert count == mask[:, 1:].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_has_exactly_no_loss_and_no_gradient(batch, dtype):
    student = (30 * batch[0]).to(dtype).requires_grad_()
    teacher = student.detach().clone()
    for temperature in (1.0, 0.5, 3.0):
        loss, _ = distillation_loss(student, teacher, batch[3], temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0
        assert not gradient.any()
    loss, _ = hidden_mse(student, teacher, batch[3])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert not gradient.any()


def test_distillation_gradients_agree_with_finite_differences(batch):
    student, teacher, _, mask = batch
    student = student[:, :4].clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teacher[:, :4], mask[:, :4], 1.5)[0], student
    )


def test_hidden_mse_is_relative_to_the_teacher_over_the_unmasked_positions(batch):
    student, teacher, _, mask = batch
    want = (student[mask] - teacher[mask]).square().mean() / teacher[mask].square().mean()
    distance, square = hidden_mse(student, teacher, mask)
    torch.testing.assert_close(distance / square, want)
    tenfold, hundredfold = hidden_mse(10 * student, 10 * teacher, mask)
    torch.testing.assert_close(tenfold / hundredfold, want)


def test_hidden_mse_of_parts_adds_up_to_that_of_the_batch(batch):
    student, teacher, _, mask = batch
    whole = torch.stack(hidden_mse(student, teacher, mask))
    parts = [
        torch.stack(hidden_mse(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]))
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("junk", [1e4, float("nan"), float("inf")])
def test_nothing_at_a_masked_position_reaches_a_loss_or_a_gradient(batch, junk):
    student, teacher, labels, mask = batch
    predicts = F.pad(mask[:, 1:], (0, 1))  # positions whose prediction counts

    def results(student, teacher, labels):
        student = student.clone().requires_grad_()
        hidden = student.detach().clone().requires_grad_()
        sums = [
            next_token_loss(student, labels, mask)[0],
            distillation_loss(student, teacher, mask, 2.0)[0],
            hidden_mse(hidden, teacher, predicts)[0],
        ]
        return sums + [torch.autograd.grad(s, (student, hidden), allow_unused=True) for s in sums]

    clean = results(student, teacher, labels)
    spoilt = [x.masked_fill(~predicts.unsqueeze(-1), junk) for x in (student, teacher)]
    dirty = results(*spoilt, labels.masked_fill(~mask, 3))
    for one, other in zip(clean, dirty, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_chunks_change_neither_losses_nor_gradients(batch, chunk):
    student, teacher, labels, mask = batch
    student.requires_grad_()
    for loss in (
        lambda c: next_token_loss(student, labels, mask, chunk=c)[0],
        lambda c: distillation_loss(student, teacher, mask, 2.0, chunk=c)[0],
    ):
        torch.testing.assert_close(loss(chunk), loss(10**6))
        torch.testing.assert_close(
            torch.autograd.grad(loss(chunk), student), torch.autograd.grad(loss(10**6), student)
        )


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 2049, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(1, 2049, dtype=torch.int64)
    total, count = next_token_loss(logits, labels)
    want, _ = next_token_loss(logits.double(), labels)
    assert total.dtype == torch.float32
    assert count == 2048
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=0)


def test_no_unmasked_position_is_no_loss(batch):
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    student, teacher, labels, _ = batch
    for total, count in (
        next_token_loss(student, labels, nothing),
        distillation_loss(student, teacher, nothing),
        hidden_mse(student, teacher, nothing),
    ):
        assert total == 0
        assert count == 0
