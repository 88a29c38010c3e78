"""Small random models of every family that can be folded."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(family: str, blocks: int = 6, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; norms and biases are random too, so that mixing them up
    shows, and matrices are large enough for the blocks to matter."""
    options = {**_COMMON, "num_hidden_layers": blocks, **changes}
    torch.manual_seed(seed)
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**options))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": 7, "head_dim": 8, **options}))
    elif family == "qwen2":
        sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
        model = Qwen2ForCausalLM(Qwen2Config(**{**sliding, **options}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 16, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "embed" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()


def tokens(rows: int = 3, length: int = 20, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def own_text(model: PreTrainedModel, rows: int = 8, length: int = 24) -> torch.Tensor:
    """Text a random model has written itself, with a sharpened head: what it models best.

    On random tokens a random model may well gain by losing a block; on its own text it does not.
    """
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        torch.manual_seed(2)
        start = tokens(rows, 2)
        options = {"do_sample": True, "max_new_tokens": length - 2, "min_new_tokens": length - 2}
        return model.generate(start, attention_mask=torch.ones_like(start), **options)
