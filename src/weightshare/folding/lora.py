"""Low-rank updates of shared weights: one pair of factors per shared matrix, not per use.

A PEFT adapter has one pair per layer; merged into a tied weight the pairs of all uses add up and
the model changes. Here every use of a matrix runs through the same pair, so merging is exact.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightshare.folding.families import blocks_of
from weightshare.folding.modeling_folded import DeltaLinear


class SharedLora(nn.Module):
    r"""Adds :math:`\tfrac{\alpha}{r} B A x` to every linear layer of the blocks, until ``merge``.

    Args:
        model: the folded model; its linear weights are frozen, hooks compute the update.
        rank: r of the factors A (r, in) and B (out, r).
        alpha: scale; 16 as in the original LoRA code for language models.
        seed: of the factors A; B starts at zero, so the model starts unchanged.
    """

    def __init__(
        self, model: PreTrainedModel, rank: int = 8, alpha: float = 16.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        self._weights: list[Tensor] = []
        self._handles: list[Any] = []
        generator = torch.Generator().manual_seed(seed)
        place: dict[int, int] = {}
        for module in blocks_of(model).modules():
            if not isinstance(module, nn.Linear):
                continue
            weight = module.weight
            if id(weight) not in place:
                place[id(weight)] = len(self._weights)
                self._weights.append(weight)
                out, inner = weight.shape
                bound = 1 / math.sqrt(inner)
                start = torch.rand(rank, inner, generator=generator) * 2 * bound - bound
                self.down.append(nn.Parameter(start.to(weight.device)))
                self.up.append(nn.Parameter(torch.zeros(out, rank, device=weight.device)))
            self._handles.append(module.register_forward_hook(self._hook(place[id(weight)])))

    def _hook(self, index: int) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = nn.functional.linear(inputs[0].to(self.down[index].dtype), self.down[index])
            update = nn.functional.linear(inner, self.up[index])
            if isinstance(module, DeltaLinear) and module.kind == "scale":
                update = update * (1 + module.delta_unit * module.delta_scale)  # merged below it
            return output + self.scale * update.to(output.dtype)

        return add

    @torch.no_grad()
    def merge(self) -> None:
        """Add each update to its shared weight and take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for weight, down, up in zip(self._weights, self.down, self.up, strict=True):
            weight.add_((self.scale * (up @ down)).to(weight.dtype))
