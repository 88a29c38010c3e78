import math

import pytest
import torch
import torch.nn.functional as F

from weightshare.errors import UserError
from weightshare.language import compare, evaluate, evaluating, windows


@pytest.fixture
def text_windows(tokenizer, text):
    return windows(tokenizer, [text], 24, stride=16)


def test_the_score_is_the_loss_of_every_target_written_out(model, text_windows, text):
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in zip(text_windows.input_ids, text_windows.mask, strict=True):
            log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for t in range(1, len(ids)):
                if mask[t]:
                    total -= float(log_p[t - 1, ids[t]])
                    count += 1
    score = evaluate(model, text_windows)
    assert score.tokens == count
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    size = int(text_windows.bytes.sum())
    assert score.bytes == size == len(text.encode()) - len("The")
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(model, text_windows):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = evaluate(model, text_windows)
    assert score.loss == pytest.approx(math.log(model.config.vocab_size), rel=1e-6)
    assert score.stderr == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_nothing_but_rounding(model, text_windows, batch_size, monkeypatch):
    want = evaluate(model, text_windows)
    assert evaluate(model, text_windows, batch_size).loss == pytest.approx(want.loss, rel=1e-6)
    monkeypatch.setattr("weightshare.language.score.LOGIT_ELEMENTS", 1)
    assert evaluate(model, text_windows, batch_size).loss == pytest.approx(want.loss, rel=1e-6)


def test_stderr_is_that_of_the_mean_over_windows_of_one_size(model, tokenizer, text):
    got = evaluate(model, windows(tokenizer, [text * 4], 16))
    full = got.window_tokens == 15
    assert full.sum() >= len(full) - 1
    means = got.window_losses / got.window_tokens
    assert got.stderr == pytest.approx(float(means.std()) / len(means) ** 0.5, rel=0.05)


def test_evaluating_leaves_no_trace_even_after_an_exception(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with pytest.raises(UserError), evaluating(model):  # noqa: PT012
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        evaluate(model, None, batch_size=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_paired_difference_is_surer_than_two_single_losses(model, text_windows):
    first = evaluate(model, text_windows)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    second = evaluate(model, text_windows)
    difference, stderr = compare(first, second)
    assert difference == pytest.approx(second.loss - first.loss)
    assert 0 < stderr < first.stderr / 5
    assert compare(first, first) == (0, 0)


def test_scores_of_other_windows_do_not_compare(model, text_windows):
    with pytest.raises(UserError, match="different windows"):
        compare(evaluate(model, text_windows), evaluate(model, text_windows[:2]))


def test_nothing_to_score_is_refused(model, text_windows):
    with pytest.raises(UserError, match="no target"):
        evaluate(model, text_windows[:0])
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluate(model, text_windows, 0)


def test_a_bfloat16_model_is_scored_in_float32(model, text_windows):
    want = evaluate(model.bfloat16(), text_windows)
    with torch.no_grad():
        logits = model(input_ids=text_windows.input_ids).logits.float()
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), text_windows.input_ids[:, 1:].flatten(), reduction="none"
    )
    keep = text_windows.mask[:, 1:].flatten()
    assert want.loss == pytest.approx(float(losses[keep].double().mean()), rel=2e-3)
