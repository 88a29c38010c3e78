import pytest
import torch

from weightshare.errors import UserError
from weightshare.language import continue_prompts


def greedy(model, tokenizer, prompt, steps):
    """One token after another, without a cache and without padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_each_prompt_is_continued_as_if_it_were_alone(model, tokenizer):
    prompts = ["The weights of a network", "Count", "日本語 and"]
    got = continue_prompts(model, tokenizer, prompts, 6)
    assert got == [greedy(model, tokenizer, prompt, 6) for prompt in prompts]


def test_sampling_depends_on_the_seed_alone_and_leaves_the_streams(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = continue_prompts(model, tokenizer, ["The"], 8, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert continue_prompts(model, tokenizer, ["The"], 8, temperature=1.0, seed=1) == first
    assert continue_prompts(model, tokenizer, ["The"], 8, temperature=1.0, seed=2) != first


def test_nothing_to_continue_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="no tokens"):
        continue_prompts(model, tokenizer, ["The", ""])
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        continue_prompts(model, tokenizer, ["The"], 0)
