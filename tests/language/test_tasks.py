import gzip
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.language import (
    TaskScore,
    above_chance,
    kept,
    log_likelihoods,
    read_task,
    zero_shot,
)
from weightshare.language.likelihood import _batches

EXAMPLES = [
    [
        ("Question: what can serve?", " The weights."),
        ("Question: what can serve?", " Bytes, each."),
    ],
    [("A", " tied"), ("A", " tied embedding is the oldest example"), ("A", " x")],
    [("The naïve users", " disagree"), ("日本語 users", " disagree")],
    [("Count bytes, not", " characters")],
    [("", "Count"), ("", "weights of")],
]


def by_hand(model, tokenizer, context, more):
    """Each token's log-probability from a forward pass of its own."""
    start = [] if context else [tokenizer.eos_token_id]
    before = start + tokenizer(context)["input_ids"]
    whole = start + tokenizer(context + more)["input_ids"]
    total, greedy = 0.0, True
    for t in range(len(before), len(whole)):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole[:t]])).logits[0, -1].log_softmax(-1)
        total += float(log_p[whole[t]])
        greedy &= int(log_p.argmax()) == whole[t]
    return total, greedy


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_likelihoods_are_those_of_one_token_after_another(
    model, tokenizer, share_prefix, batch_tokens
):
    found = log_likelihoods(
        model, tokenizer, EXAMPLES, batch_tokens=batch_tokens, share_prefix=share_prefix
    )
    for example, row in zip(EXAMPLES, found, strict=True):
        for (context, more), one in zip(example, row, strict=True):
            total, greedy = by_hand(model, tokenizer, context, more)
            assert one.total == pytest.approx(total, rel=1e-4)
            assert one.greedy == greedy


def test_the_shared_prefix_is_read_once(model, tokenizer):
    read = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context = "Count bytes, not characters, when two tokenizers are compared with each other."
    example = [(context, f" {letter}") for letter in "abcdefgh"]
    log_likelihoods(model, tokenizer, [example], share_prefix=False)
    alone = sum(read)
    read.clear()
    log_likelihoods(model, tokenizer, [example])
    assert alone > 5 * sum(read)


def test_of_all_single_tokens_only_the_most_likely_is_greedy(model, tokenizer):
    found = 0
    for context in ("The", "Count", "one use of", "several bytes"):
        ids = tokenizer(context)["input_ids"]
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        texts = {token: tokenizer.decode([token]) for token in range(1, len(tokenizer))}
        whole = {
            token: text
            for token, text in texts.items()
            if tokenizer(context + text)["input_ids"] == [*ids, token]
        }
        pairs = [[(context, text) for text in whole.values()]]
        (row,) = log_likelihoods(model, tokenizer, pairs)
        greedy = [token for token, one in zip(whole, row, strict=True) if one.greedy]
        assert greedy == [best] * (best in whole)
        found += len(greedy)
    assert found


def test_a_context_that_is_too_long_loses_its_beginning(model, tokenizer):
    limit = model.config.max_position_embeddings
    long = "weights " * 300
    ids = tokenizer(long + " use")["input_ids"]
    more = len(ids) - len(tokenizer(long)["input_ids"])
    ((one,),) = log_likelihoods(model, tokenizer, [[(long, " use")]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[-limit - 1 : -1]])).logits[0]
    log_p = logits.log_softmax(-1)
    want = sum(float(log_p[-k, ids[-k]]) for k in range(1, more + 1))
    assert one.total == pytest.approx(want, rel=1e-4)


def test_a_tokenizer_that_begins_texts_does_so_here(model, tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    begins = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", eos_token="<|end|>")
    ((got,),) = log_likelihoods(model, begins, [[("The", " weights")]])
    ids = [tokenizer.eos_token_id, *tokenizer("The weights")["input_ids"]]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    context = 1 + len(tokenizer("The")["input_ids"])
    want = sum(float(log_p[t - 1, ids[t]]) for t in range(context, len(ids)))
    assert got.total == pytest.approx(want, rel=1e-4)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4), st.integers(1, 50)), max_size=30),
    st.integers(1, 200),
    st.integers(1, 200),
)
@settings(max_examples=50)
def test_batches_hold_every_item_once_within_their_bounds(shapes, tokens, logits):
    batches = list(_batches(dict(enumerate(shapes)), tokens, logits))
    assert sorted(key for batch in batches for key in batch) == list(range(len(shapes)))
    for batch in batches:
        if len(batch) > 1:
            read, rows, wide = zip(*(shapes[key] for key in batch), strict=True)
            assert len(batch) * max(read) <= tokens
            assert sum(rows) * max(wide) <= min(tokens, logits)


def write(path, rows):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def test_the_three_forms_of_tasks_are_scored(model, tokenizer, tmp_path, monkeypatch):
    choices = [" weights", " use of weights", " é"]
    write(
        tmp_path / "piqa.jsonl.gz",
        [{"context": "The", "choices": choices, "answer": k} for k in (0, 1, 2, 0)],
    )
    write(
        tmp_path / "winogrande.jsonl.gz",
        [{"contexts": ["The weights", "The use"], "continuation": " disagree", "answer": 0}],
    )
    write(tmp_path / "lambada.jsonl.gz", [{"context": "The weights of a", "continuation": " use"}])
    monkeypatch.setenv("WEIGHTSHARE_DATA", str(tmp_path))
    scores = zero_shot(model, tokenizer, ["piqa", "winogrande", tmp_path / "lambada.jsonl.gz"])

    totals = [by_hand(model, tokenizer, "The", choice)[0] for choice in choices]
    best = int(np.argmax(totals))
    normed = int(np.argmax([t / len(c.strip()) for t, c in zip(totals, choices, strict=True)]))
    piqa = scores["piqa"]
    assert piqa.acc == np.mean([answer == best for answer in (0, 1, 2, 0)])
    assert piqa.acc_norm == np.mean([answer == normed for answer in (0, 1, 2, 0)])
    assert (piqa.n, piqa.chance, piqa.metric) == (4, pytest.approx(1 / 3), "acc_norm")
    assert piqa.stderr == pytest.approx(math.sqrt(piqa.value * (1 - piqa.value) / 3))
    assert zero_shot(model, tokenizer, ["piqa"], limit=2)["piqa"].n == 2

    first, second = (
        by_hand(model, tokenizer, c, " disagree")[0] for c in ("The weights", "The use")
    )
    assert scores["winogrande"].acc == (first > second)
    assert scores["winogrande"].acc_norm is None
    assert scores["winogrande"].chance == 0.5

    total, greedy = by_hand(model, tokenizer, "The weights of a", " use")
    assert scores["lambada"].acc == greedy
    assert scores["lambada"].perplexity == pytest.approx(math.exp(-total), rel=1e-4)
    assert scores["lambada"].chance == 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["[]"], "Line 1"),
        (['{"context": "a", "continuation": "b"}', "{"], "Line 2"),
        (['{"context": "a", "choices": ["b"], "answer": 1}'], "Line 1"),
        (['{"context": "a", "choices": ["b", ""], "answer": 0}'], "Line 1"),
        (['{"context": 1, "continuation": "b"}'], "Line 1"),
        ([""], "no examples"),
        (
            [
                '{"context": "a", "continuation": "b"}',
                '{"context": "a", "choices": ["b"], "answer": 0}',
            ],
            "choice and last word",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, rows, says):
    (tmp_path / "task.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=says):
        read_task(tmp_path / "task.jsonl")


def test_a_limit_of_nothing_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="limit is 0"):
        zero_shot(model, tokenizer, [], limit=0)


def score(name, correct, chance):
    correct = np.array(correct, float)
    a = correct.mean()
    stderr = math.sqrt(a * (1 - a) / (len(correct) - 1))
    return TaskScore(name, len(correct), a, None, chance, stderr, "acc", correct=correct)


@pytest.fixture
def dense():
    """One task far above chance, one at chance."""
    return {
        "clear": score("clear", [1] * 80 + [0] * 20, 0.5),
        "coin": score("coin", [1, 0] * 50, 0.5),
    }


def test_only_tasks_clearly_above_chance_count(dense):
    assert above_chance(dense) == pytest.approx(0.3)
    result = kept(dense, dense)
    assert (result.above_chance, result.low, result.high) == (1, 1, 1)
    assert result.percent == pytest.approx(100)
    assert result.tasks == ("clear",)


def test_losing_everything_but_chance_keeps_nothing_though_most_accuracy_is_kept(dense):
    guess = {
        "clear": score("clear", [1] * 50 + [0] * 50, 0.5),
        "coin": dense["coin"],
    }
    result = kept(dense, guess)
    assert result.above_chance == pytest.approx(0)
    assert result.percent == pytest.approx(100 * 0.5 / 0.65)
    assert result.low < 0 < result.high < 0.5


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, covered = (0.7 - 0.25) / (0.8 - 0.25), 0
    for _ in range(200):
        both = rng.random((300, 1))
        first = {"t": score("t", (both < 0.8)[:, 0], 0.25)}
        second = {"t": score("t", (both < 0.7)[:, 0], 0.25)}
        result = kept(first, second, draws=300)
        covered += result.low <= truth <= result.high
    assert 0.89 <= covered / 200 <= 0.99


def test_without_a_task_above_chance_there_is_nothing_to_keep(dense):
    result = kept({"coin": dense["coin"]}, {"coin": dense["coin"]})
    assert math.isnan(result.above_chance)
    with pytest.raises(UserError, match="not scored alike"):
        kept(dense, {"clear": dense["clear"]})
