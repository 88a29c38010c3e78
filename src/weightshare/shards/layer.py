"""A linear layer with Mixture of Shards adapters."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightshare.shards.batched import UserFactors, add_updates
from weightshare.shards.store import PoolStore

BASE = "__base__"
"""The name that stands for no adapter in a mixed batch (PEFT's word)."""


@dataclass(frozen=True)
class Place:
    """Where a module's shards are: key and position in the pools of A and B; its rank and scale.

    ``row_scale`` names the pool entry with its learned row factors, where it has them.
    """

    a: tuple[str, int]
    b: tuple[str, int]
    rank: int
    scaling: float
    row_scale: str | None = None


class MosLayer(BaseTunerLayer):
    """What a layer keeps of each adapter: indices, dropout, its place in the pools."""

    adapter_layer_names = ("mos_pools",)
    other_param_names = (
        "mos_places",
        "mos_indices_A",
        "mos_indices_B",
        "mos_row_scale",
        "mos_dropout",
    )
    # PEFT's disable_input_dtype_casting sets it; factors take the type of the input either way.
    cast_input_dtype_enabled = True
    base_layer: Any
    active_adapters: Any
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    mos_indices_A: Any
    mos_indices_B: Any
    mos_row_scale: Any
    mos_dropout: Any

    def __init__(self, base_layer: nn.Module, store: PoolStore, **kwargs: Any) -> None:
        self.base_layer = base_layer
        # Not a module, so the pools are not registered here a second time.
        self._store = store
        self.mos_places: dict[str, Place] = {}
        self.mos_indices_A = BufferDict({}, persistent=True)
        self.mos_indices_B = BufferDict({}, persistent=True)
        self.mos_row_scale = BufferDict({}, persistent=True)
        self.mos_dropout = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # In a list, so that it is no parameter of this module: the weight as it was before merging.
        self._unmerged: list[nn.Parameter] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.kwargs = kwargs
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)

    @property
    def mos_pools(self) -> nn.ModuleDict:
        """The pools of this layer's adapters, where PEFT looks for what is trained."""
        pools = self._store.pools
        if all(name in self.mos_places for name in pools):
            return pools
        return nn.ModuleDict({name: pools[name] for name in self.mos_places if name in pools})

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def update_layer(
        self,
        adapter_name: str,
        place: Place,
        index_a: Tensor,
        index_b: Tensor,
        dropout: float = 0.0,
        save_indices: bool = True,
        row_scale: Tensor | None = None,
    ) -> None:
        """Add an adapter.

        ``index_a``, ``index_b``: (rank * shards per vector) integers; ``row_scale``: (rank) frozen
        factors, or None.
        """
        self.mos_places[adapter_name] = place
        for container, index in ((self.mos_indices_A, index_a), (self.mos_indices_B, index_b)):
            container.register_buffer(adapter_name, index, persistent=save_indices)
        if row_scale is not None:
            self.mos_row_scale[adapter_name] = row_scale
        self.mos_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def factors(self, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in_features) and B transposed (r, out_features)."""
        place, store = self.mos_places[adapter_name], self._store
        index_a, index_b = self.mos_indices_A[adapter_name], self.mos_indices_B[adapter_name]
        a = store.rows(adapter_name, *place.a, index_a, dtype).view(place.rank, -1)
        b = store.rows(adapter_name, *place.b, index_b, dtype).view(place.rank, -1)
        return a, b

    def row_scale(self, adapter_name: str) -> Tensor | None:
        """The factor on each rank, (r,), or None."""
        if adapter_name in self.mos_row_scale:
            return self.mos_row_scale[adapter_name]
        name = self.mos_places[adapter_name].row_scale
        return None if name is None else self._store.pool(adapter_name, name)

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """A (r, h), B (o, r) and the scale of the LoRA that this adapter equals."""
        with torch.no_grad():
            a, b = self.factors(adapter_name, torch.float32)
            if (scale := self.row_scale(adapter_name)) is not None:
                a = a * scale.unsqueeze(1).to(a.dtype)
        return a, b.t(), self.mos_places[adapter_name].scaling

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._store.remove(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self.mos_places)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the indices; the pools are moved once, by the tuner."""
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device or base_device
        for container in (self.mos_indices_A, self.mos_indices_B, self.mos_row_scale):
            if adapter_name in container and target is not None:
                persistent = adapter_name not in container._non_persistent_buffers_set
                moved = container[adapter_name]
                if moved.device.type != "meta":
                    container.register_buffer(adapter_name, moved.to(target), persistent=persistent)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class MosLinear(nn.Module, MosLayer):
    r"""A linear map with adapters.

    .. math:: y = Wx + \sum_{\text{adapters}} s\, B_k\, d \odot (A_k\, \mathrm{drop}(x))

    Works on ``nn.Linear``, transformers' ``Conv1D`` and whatever quantised linear layer PEFT knows.
    The factors take the type of the input (or of autocast); pools keep their own.
    """

    def __init__(self, base_layer: nn.Module, store: PoolStore, **kwargs: Any) -> None:
        super().__init__()
        MosLayer.__init__(self, base_layer, store, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.mos_places:
                result = result + self._update(x, adapter)
        return result.to(dtype)

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        dtype = compute_dtype(x)
        a, b = self.factors(adapter, dtype)
        a, b = a.to(x.device), b.to(x.device)
        hidden = F.linear(self.mos_dropout[adapter](x.to(dtype)), a)
        if (scale := self.row_scale(adapter)) is not None:
            hidden = hidden * scale.to(hidden)
        return F.linear(hidden, b.t()) * self.mos_places[adapter].scaling

    def _mixed(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch with its own adapter."""
        dtype = compute_dtype(x)
        names = tuple(n for n in dict.fromkeys(adapter_names) if n != BASE and n in self.mos_places)
        users = [names.index(name) if name in names else -1 for name in adapter_names]
        factors = self._store.kept(
            (self, names, dtype), names, lambda: self._user_factors(names, dtype, x.device)
        )
        return add_updates(result, x.to(dtype), users, factors)

    def _user_factors(
        self, names: tuple[str, ...], dtype: torch.dtype, device: torch.device
    ) -> UserFactors:
        factors = []
        for name in names:
            a, b = self.factors(name, dtype)
            if (scale := self.row_scale(name)) is not None:
                a = a * scale.unsqueeze(1).to(a)
            factors.append((a.to(device), b.to(device), self.mos_places[name].scaling))
        return UserFactors(factors)

    def _check_mixed(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight: (o, h), or (h, o) for ``Conv1D``."""
        a, b, scaling = self.lora_factors(adapter)
        delta = (b @ a) * scaling
        return delta.t() if self.fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base weight.

        The weight becomes a new tensor, and the old one is kept: ``unmerge`` gives it back bit for
        bit, and another layer that is tied to it does not change. A quantised weight is overwritten
        and the change subtracted again, which its grid rounds.

        Raises:
            ValueError: with ``safe_merge``, where the sum is not finite; the weight is left alone.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.mos_places:
                continue
            weight = self._changed(adapter, +1)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
            if self.quantization_backend is not None:
                self.set_base_weight(weight)
            else:
                base = self.get_base_layer()
                self._unmerged = self._unmerged or [base.weight]
                base.weight = nn.Parameter(weight, self._unmerged[0].requires_grad)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged changes away again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged:
            base, (weight,) = self.get_base_layer(), self._unmerged
            # The model may have been moved or cast while it was merged.
            weight.data = weight.data.to(base.weight)
            base.weight, self._unmerged, self.merged_adapters = weight, [], []
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.mos_places:
                self.set_base_weight(self._changed(adapter, -1))

    def _changed(self, adapter: str, sign: int) -> Tensor:
        """The base weight with the change added in float32, in its own type."""
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter).to(weight.device)
        return (weight.float() + sign * delta).to(weight.dtype)

    def __repr__(self) -> str:
        return "mos." + super().__repr__()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type an adapter is computed in: autocast's where it is on, else the input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
