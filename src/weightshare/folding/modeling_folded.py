"""Folded language models: ordinary Hugging Face causal LMs in which groups of blocks share weights.

This file is copied into every folder that holds a folded model, so it needs torch and transformers
and nothing else. It alone knows how a plan becomes tied parameter names:

* a folded model has one ordinary decoder layer for every block that still runs, each with its own
  ``layer_idx``, its own key/value cache slot and its own norms;
* inside a group all other parameters *are* those of the group's first block. Parameters are tied,
  never modules: a module used twice would write into one cache slot and generate nonsense;
* the configuration keeps the depth under ``fold_depth`` and writes ``num_hidden_layers: null``. A
  stock class would otherwise load such a folder with random blocks and only log it; with null it
  raises.
"""

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def is_private(name: str, private: list[str]) -> bool:
    """Whether a block's parameter ``name`` (as ``self_attn.q_proj.weight``) stays with its use."""
    return any(part in name for part in private)


def tied_names(plan: dict[str, Any], block_parameters: list[str]) -> dict[str, str]:
    """Full parameter names ``{use: source}`` that a plan makes one tensor.

    ``plan["groups"]`` lists original block numbers; the blocks that remain are renumbered in their
    old order. Full names, because transformers matches the keys as prefixes: ``model.layers.1``
    would tie the layers 10 and 11 as well.
    """
    remaining = sorted(block for group in plan["groups"] for block in group)
    position = {block: index for index, block in enumerate(remaining)}
    shared = [name for name in block_parameters if not is_private(name, plan["private"])]
    return {
        f"model.layers.{position[block]}.{name}": f"model.layers.{position[group[0]]}.{name}"
        for group in plan["groups"]
        for block in group[1:]
        for name in shared
    }


def _with_depth(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Put the depth back where the stock configuration expects it."""
    depth = kwargs.get("fold_depth") or kwargs.get("num_hidden_layers")
    if depth is not None:
        kwargs |= {"fold_depth": depth, "num_hidden_layers": depth}
    return kwargs


class FoldedConfigMixin:
    """``fold_plan`` (the plan as a dictionary) and ``fold_depth`` (blocks that run)."""

    fold_plan: dict[str, Any]
    fold_depth: int

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "num_hidden_layers": None}  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "num_hidden_layers": None}  # type: ignore[misc]


class FoldedLlamaConfig(FoldedConfigMixin, LlamaConfig):
    model_type = "weightshare_folded_llama"

    def __init__(self, **kwargs: Any) -> None:
        LlamaConfig.__init__(self, **_with_depth(kwargs))


class FoldedMistralConfig(FoldedConfigMixin, MistralConfig):
    model_type = "weightshare_folded_mistral"

    def __init__(self, **kwargs: Any) -> None:
        MistralConfig.__init__(self, **_with_depth(kwargs))


class FoldedQwen2Config(FoldedConfigMixin, Qwen2Config):
    model_type = "weightshare_folded_qwen2"

    def __init__(self, **kwargs: Any) -> None:
        Qwen2Config.__init__(self, **_with_depth(kwargs))


class FoldedQwen3Config(FoldedConfigMixin, Qwen3Config):
    model_type = "weightshare_folded_qwen3"

    def __init__(self, **kwargs: Any) -> None:
        Qwen3Config.__init__(self, **_with_depth(kwargs))


class FoldedModelMixin:
    """Ties the blocks of each group when the model is built, loaded, resized or copied.

    transformers ties what ``get_expanded_tied_weights_keys`` returns, and consults
    ``_tied_weights_keys`` when it saves; by itself it looks at neither unless the word embeddings
    are tied, hence both are set here.
    """

    config: Any
    model: Any
    config_class: type
    named_parameters: Any

    def __init__(self, config: Any) -> None:
        self._block_ties: dict[str, str] | None = None
        super().__init__(config)  # type: ignore[call-arg]
        self._tie_blocks()

    def _tie_blocks(self) -> None:
        self._tied_weights_keys = {**self._head_tie(), **self.block_ties}
        self.tie_weights()  # type: ignore[attr-defined]

    def _head_tie(self) -> dict[str, str]:
        usual: dict[str, str] = getattr(type(self), "_tied_weights_keys", None) or {}
        return dict(usual) if self.config.tie_word_embeddings else {}

    @property
    def block_ties(self) -> dict[str, str]:
        """Full parameter names ``{use: source}`` of this model's groups."""
        if self._block_ties is None:
            first: nn.Module = self.model.layers[0]
            names = [name for name, _ in first.named_parameters()]
            self._block_ties = tied_names(self.config.fold_plan, names)
        return self._block_ties

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return {**self._head_tie(), **self.block_ties}


class FoldedLlamaForCausalLM(FoldedModelMixin, LlamaForCausalLM):
    config_class = FoldedLlamaConfig


class FoldedMistralForCausalLM(FoldedModelMixin, MistralForCausalLM):
    config_class = FoldedMistralConfig


class FoldedQwen2ForCausalLM(FoldedModelMixin, Qwen2ForCausalLM):
    config_class = FoldedQwen2Config


class FoldedQwen3ForCausalLM(FoldedModelMixin, Qwen3ForCausalLM):
    config_class = FoldedQwen3Config


FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (FoldedLlamaConfig, FoldedLlamaForCausalLM),
    "mistral": (FoldedMistralConfig, FoldedMistralForCausalLM),
    "qwen2": (FoldedQwen2Config, FoldedQwen2ForCausalLM),
    "qwen3": (FoldedQwen3Config, FoldedQwen3ForCausalLM),
}
"""Stock ``model_type`` -> folded configuration and model."""

for _config, _model in FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)  # type: ignore[attr-defined]
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()  # type: ignore[attr-defined]
    _model.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[attr-defined]
