"""Federated adapters: the state that PEFT itself saves travels, the model under it stays at home.

    model = get_peft_model(base, LoraConfig(...))          # or shards.MosConfig(...)
    adapter = Adapter(model)
    training = LoopTraining(NextToken(model), data, LocalConfig(optimizer="adamw"), adapter)
    strategy = ReputationStrategy(adapter.read(), layers=adapter.sizes)
    ...
    adapter.write(strategy.model_of("p01")); model.save_pretrained("p01")

Of a LoRA its factors travel, of a mixture of shards its pools. Everyone needs the same model and
the same adapter configuration; shard indices follow from it.
"""

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightshare.errors import UserError
from weightshare.federated.local import Examples
from weightshare.federated.vectors import Vector
from weightshare.training import Losses, Task, Term


class Adapter:
    """The adapter of a PEFT model as one vector, tensor after tensor in the order of names.

    Args:
        model: what ``get_peft_model`` has made.
        name: of the adapter.

    Raises:
        UserError: the model trains weights that are not in the adapter's state, or are not float32.
    """

    def __init__(self, model: PeftModel, name: str = "default") -> None:
        self.model, self.name = model, name
        state = self._state()
        moving = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
        self._shapes = {key: moving[key].shape for key in sorted(moving)}
        self._fixed = {key: tensor for key, tensor in state.items() if key not in moving}
        trained = [p for p in model.parameters() if p.requires_grad]
        if any(p.dtype != torch.float32 for p in trained):
            raise UserError(
                f"The adapter {name!r} has weights that are not float32; make it with "
                "autocast_adapter_dtype=True."
            )
        if sum(p.numel() for p in trained) != sum(self.sizes):
            raise UserError(
                f"The model trains {sum(p.numel() for p in trained):,} weights and its adapter "
                f"{name!r} has {sum(self.sizes):,}; federate the adapter alone, without "
                "modules_to_save or other trainable weights."
            )

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each tensor."""
        return [shape.numel() for shape in self._shapes.values()]

    def read(self) -> Vector:
        """The adapter's weights, ``(D,)`` float32."""
        state = self._state()
        vector: Vector = torch.cat([state[key].detach().flatten() for key in self._shapes]).numpy()
        return vector

    def write(self, vector: Vector) -> None:
        """The inverse of ``read``, by PEFT's own loading."""
        parts = torch.from_numpy(vector.copy()).split(self.sizes)
        state = {
            key: part.view(shape)
            for (key, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        set_peft_model_state_dict(self.model, state | self._fixed, adapter_name=self.name)

    def _state(self) -> dict[str, Tensor]:
        found = get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=False
        )
        return {key: tensor.detach().cpu() for key, tensor in found.items()}


class NextToken(Task):
    """Cross-entropy of the next token of a causal language model; the label -100 is left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Examples) -> Losses:
        """``(input_ids, labels)``, both ``(B, length)``."""
        tokens, labels = batch
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
        loss = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")
        return {"cross_entropy": Term(loss, int((wanted != -100).sum()))}
