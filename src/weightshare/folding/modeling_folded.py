"""Folded language models: ordinary Hugging Face causal LMs in which groups of blocks share weights.

This file is copied into every folder that holds a folded model, so it needs torch and transformers
and nothing else. It alone knows how a plan becomes tied parameter names:

* a folded model has one ordinary decoder layer for every block that still runs, each with its own
  ``layer_idx``, its own key/value cache slot and its own norms;
* inside a group all other parameters *are* those of the group's first block. Parameters are tied,
  never modules: a module used twice would write into one cache slot and generate nonsense;
* a use may have something of its own on top (the plan's ``deltas``): a copy of one parameter, or
  scales or a low-rank delta in a ``DeltaLinear``;
* the configuration keeps the depth under ``fold_depth`` and writes ``num_hidden_layers: null``. A
  stock class would otherwise load such a folder with random blocks and only log it; with null it
  raises.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
    deltas = plan.get("deltas", ())
    tied: list[tuple[str, list[int]]] = []
    for name in block_parameters:
        if not is_private(name, plan["private"]):
            own = [d["blocks"] for d in deltas if (d["parameter"], d["kind"]) == (name, "own")]
            apart = {block for part in own for block in part}
            rest = [[block for block in group if block not in apart] for group in plan["groups"]]
            tied += [(name, part) for part in (*rest, *own)]
    for delta in deltas:
        for leaf in DELTA_PARAMETERS[delta["kind"]]:
            tied.append((delta["parameter"].removesuffix("weight") + leaf, delta["blocks"]))
    return {
        f"model.layers.{position[block]}.{name}": f"model.layers.{position[part[0]]}.{name}"
        for name, part in tied
        for block in part[1:]
    }


DELTA_PARAMETERS = {"own": (), "scale": ("delta_scale",), "low_rank": ("delta_a", "delta_b")}
"""What a delta adds to the module of its parameter."""


def delta_modules(plan: dict[str, Any], delta: dict[str, Any]) -> list[str]:
    """The linear layers that become a :class:`DeltaLinear`; a copy needs none."""
    if delta["kind"] == "own":
        return []
    remaining = sorted(block for group in plan["groups"] for block in group)
    module = delta["parameter"].removesuffix(".weight")
    places = [f"model.layers.{remaining.index(block)}.{module}" for block in delta["blocks"]]
    return places or [module]


class DeltaLinear(nn.Linear):
    r"""A linear layer that shares its weight W and has something small of its own.

    ========  ==========================================  ==============================
    scale     :math:`y = (1 + u s) \circ W x + c`          s (out,), u one fixed number
    low_rank  :math:`y = W x + B A x + c`                  A (rank, in), B (out, rank)
    ========  ==========================================  ==============================

    s and B start at zero: the output is then that of the shared layer, bit for bit.
    """

    delta_unit: Tensor

    def __init__(self, shared: nn.Linear, kind: str, rank: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = shared.in_features, shared.out_features
        self.weight = shared.weight
        self.register_parameter("bias", shared.bias)  # type: ignore[arg-type]
        self.kind = kind
        zeros = shared.weight.detach().new_zeros
        if kind == "scale":
            self.delta_scale = nn.Parameter(zeros(self.out_features))
            self.register_buffer("delta_unit", zeros(()) + 1)
        else:
            self.delta_a = nn.Parameter(nn.init.normal_(zeros(rank, self.in_features)))
            self.delta_b = nn.Parameter(zeros(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self.weight, self.bias)
        if self.kind == "scale":
            plain = output if self.bias is None else output - self.bias
            return output + self.delta_unit * self.delta_scale * plain
        return output + F.linear(F.linear(input, self.delta_a), self.delta_b)

    def merged(self) -> Tensor:
        """The weight, (out, in), of the ordinary linear layer that computes the same."""
        if self.kind == "scale":
            return self.weight * (1 + self.delta_unit * self.delta_scale)[:, None]
        return torch.addmm(self.weight, self.delta_b, self.delta_a)


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
        self._place_deltas()
        self._tie_blocks()

    def _place_deltas(self) -> None:
        for delta in self.config.fold_plan.get("deltas", ()):
            for path in delta_modules(self.config.fold_plan, delta):
                shared = self.get_submodule(path)  # type: ignore[attr-defined]
                if not isinstance(shared, DeltaLinear):
                    changed = DeltaLinear(shared, delta["kind"], delta["rank"])
                    self.set_submodule(path, changed)  # type: ignore[attr-defined]

    def _tie_blocks(self) -> None:
        self._tied_weights_keys = {**self._head_tie(), **self.block_ties}
        self.tie_weights()  # type: ignore[attr-defined]

    def _head_tie(self) -> dict[str, str]:
        usual: dict[str, str] = getattr(type(self), "_tied_weights_keys", None) or {}
        own = any(
            not delta["blocks"] and delta["kind"] == "own"
            for delta in self.config.fold_plan.get("deltas", ())
        )
        return dict(usual) if self.config.tie_word_embeddings and not own else {}

    @property
    def block_ties(self) -> dict[str, str]:
        """Full parameter names ``{use: source}`` of this model's groups."""
        if self._block_ties is None:
            first: nn.Module = self.model.layers[0]
            names = [name for name, _ in first.named_parameters() if ".delta_" not in name]
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
