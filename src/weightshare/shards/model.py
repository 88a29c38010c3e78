"""The tuner: puts Mixture of Shards adapters on a model and owns their pools."""

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weightshare.errors import UserError
from weightshare.shards.checking import check_saved, stored_checksum
from weightshare.shards.gather import Table
from weightshare.shards.indices import SplitMix64
from weightshare.shards.layer import BASE, MosLayer, MosLinear, Place, compute_dtype
from weightshare.shards.mos_config import MosConfig
from weightshare.shards.planning import Loan, Plan, Target, by_pattern, plan_pools
from weightshare.shards.rows import copies, named_rows
from weightshare.shards.store import PoolStore


class MosModel(BaseTuner):
    """A model with Mixture of Shards adapters; made by ``get_peft_model(model, MosConfig(...))``.

    ``mos_pools[adapter][pool]`` are the trained parameters, each registered once. A forward pass
    gathers every pool once for all layers.
    """

    uses_shared_state: bool = True
    prefix: str = "mos_"
    tuner_layer_cls = MosLayer
    model: Any
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's injection; the pools are planned when it has found all targets.

        PEFT's own hooks before and after injection run for the first adapter only.
        """
        if not hasattr(self, "mos_pools"):
            self.mos_pools = nn.ModuleDict({})
            self.mos_checksum = BufferDict({}, persistent=True)
            self.mos_store = PoolStore(self.mos_pools)
            self._fresh: set[str] = set()
        self._found: list[tuple[str, nn.Module, str, nn.Module]] = []
        # Third and fourth in PEFT's order: autocast_adapter_dtype, low_cpu_mem_usage.
        on_meta = kwargs.get("low_cpu_mem_usage", args[1] if len(args) > 1 else False)
        self._adding = adapter_name, bool(on_meta)
        # PEFT puts back whether the parameters it finds were trained; the pools it does not find.
        before = {pool: pool.requires_grad for pool in self.mos_pools.parameters()}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for pool, trained in before.items():
            pool.requires_grad_(trained)
        self._fresh.add(adapter_name)

    def _create_and_replace(
        self,
        mos_config: MosConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        """Only take note: no pool can be made before all of its modules are known."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear | Conv1D):
            backend = resolve_quantization_backend(base, **get_quantization_kwargs(self))
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"Target module {target} is not supported. Currently, only the following "
                    "modules are supported: `torch.nn.Linear`, `transformers.pytorch_utils.Conv1D` "
                    "and quantized linear layers."
                )
        self._found.append((current_key, parent, target_name, target))

    @staticmethod
    def _create_new_module(
        mos_config: MosConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        return MosLinear(target, **kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The first thing PEFT does when it has found and checked all targets: nothing of the model
        # has been changed yet, so that a plan that fails leaves it as it was.
        if self._found:
            self._place_adapter(*self._adding)
        super()._mark_only_adapters_as_trainable(model)

    def _place_adapter(self, adapter_name: str, on_meta: bool) -> None:
        config: MosConfig = self.peft_config[adapter_name]
        found, self._found = self._found, []
        kwargs = get_quantization_kwargs(self)
        layers = {
            name: target
            if isinstance(target, MosLayer)
            else MosLinear(target, self.mos_store, **kwargs)
            for name, _, _, target in found
        }
        for name, layer in layers.items():
            hook = getattr(layer.get_base_layer(), "_hf_hook", None)
            if getattr(hook, "offload", False):
                raise UserError(
                    f"The weights of {name} are offloaded by accelerate, which cannot bring a pool "
                    "along with them; load the model whole on one device, or quantised."
                )
        targets = [Target(n, la.in_features, la.out_features) for n, la in layers.items()]
        plan = plan_pools(targets, config, self._loan(config))

        device, dtype = next(iter(layers.values()))._get_base_layer_device_and_dtype(
            next(iter(layers.values())).get_base_layer()
        )
        if dtype is None or not dtype.is_floating_point:
            dtype = torch.float32
        pools = _make_pools(plan, config, "meta" if on_meta else device, dtype)
        pools.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        self.mos_pools[adapter_name] = pools
        if config.public_from is not None:
            self.mos_store.lenders[adapter_name] = config.public_from
        self.mos_checksum.register_buffer(
            adapter_name,
            stored_checksum(pool.indices for pool in plan.pools.values()).to(device),
            persistent=True,
        )
        for name, parent, child, target in found:
            layer = layers[name]
            self._add_to_layer(layer, name, adapter_name, plan, config)
            if layer is not target:
                # Until now the layer knows nothing of which adapter is active.
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                self._replace_module(parent, child, layer, target)
        self.mos_store.tables[adapter_name] = {
            key: Table(
                adapter_name,
                pool.rows,
                [getattr(layers[name], f"mos_indices_{pool.side}") for name in pool.members],
                config.scale_by_use,
                pool.borrowed,
                pool.public,
            )
            for key, pool in plan.pools.items()
        }

    def _loan(self, config: MosConfig) -> Loan | None:
        lender = config.public_from
        if lender is None:
            return None
        if lender not in self.mos_pools:
            raise UserError(
                f"public_from is {lender!r}, but the model has no such adapter; it has "
                f"{', '.join(self.mos_pools) or 'none'}: load that one first."
            )
        other: MosConfig = self.peft_config[lender]
        if other.public_from is not None or other.scale_by_use:
            raise UserError(
                f"public_from is {lender!r}, which itself borrows or scales by use; name the "
                "adapter that has the public pools, made without scale_by_use."
            )
        pools: Any = self.mos_pools[lender]
        return Loan(
            {
                key: (table.public, pools[key].shape[1])
                for key, table in self.mos_store.tables[lender].items()
            },
            {
                name: layer.mos_places[lender].rank - other.private
                for name, layer in self.model.named_modules()
                if isinstance(layer, MosLayer) and lender in layer.mos_places
            },
        )

    def _add_to_layer(
        self, layer: MosLayer, name: str, adapter_name: str, plan: Plan, config: MosConfig
    ) -> None:
        rank = plan.ranks[name]
        alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        a, b = (plan.places[name][side] for side in ("A", "B"))
        indices = []
        for key, member in (a, b):
            pool = plan.pools[key]
            # Not int16, which no backend of torch.distributed can broadcast: DDP would fail.
            indices.append(torch.tensor(pool.indices[member], dtype=torch.int32))
        learned = f"{a[0]}_scale_{a[1]}" if config.row_scale == "learned" else None
        layer.update_layer(
            adapter_name,
            Place(a, b, rank, scaling, learned),
            indices[0],
            indices[1],
            dropout=config.lora_dropout,
            save_indices=config.save_indices,
            row_scale=_random_scale(rank, config, a) if config.row_scale == "random" else None,
        )
        layer._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None:
        """Bring pools that were loaded elsewhere to the device of the first layer."""
        for layer in self._layers(adapter_name):
            device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            pools = self.mos_pools[adapter_name]
            if device is not None and all(p.device.type != "meta" for p in pools.parameters()):
                pools.to(device)
            break

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype or adapter_name not in self.mos_pools:
            return
        for pool in self.mos_pools[adapter_name].parameters():
            if pool.dtype.itemsize < 4:
                pool.data = pool.data.float()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        # An adapter none of whose layers is left in the model still has its pools.
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, pools in self.mos_pools.items():
            pools.requires_grad_(name in names and not inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the adapters into the base weights, which are kept beside until ``unmerge``.

        Raises:
            ValueError: with ``safe_merge``, where a sum is not finite; no weight is changed.
        """
        before = {layer: list(layer.merged_adapters) for layer in self._layers()}
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        except ValueError:
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    if names:
                        layer.merge(adapter_names=names)
            raise

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The model itself with the adapters merged into its weights.

        Raises:
            ValueError: with ``safe_merge``, where a sum is not finite; the model is as it was.
        """
        if safe_merge:
            # A layer that is unloaded cannot be put back: try all of them first.
            self.merge_adapter(adapter_names, safe_merge=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return merged

    def delete_adapter(self, adapter_name: str) -> None:
        users = [name for name, lender in self.mos_store.lenders.items() if lender == adapter_name]
        if users:
            raise UserError(
                f"{', '.join(users)} use the public pools of {adapter_name!r}; delete them first."
            )
        super().delete_adapter(adapter_name)
        self.mos_store.remove(adapter_name)
        if adapter_name in self.mos_checksum:
            del self.mos_checksum[adapter_name]

    def _apply(self, fn: Any, recurse: bool = True) -> "MosModel":
        super()._apply(fn, recurse)
        self.mos_store.forget()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Check what is loaded for an adapter before any of it is copied."""
        for adapter_name in list(self.mos_pools):
            try:
                layers = self._named_layers(adapter_name)
                if check_saved(adapter_name, state_dict, prefix, self.mos_store, layers):
                    for key, tensor in state_dict.items():
                        if tensor.dtype == torch.int16:
                            state_dict[key] = tensor.int()
                    self.mos_store.forget(adapter_name)
                    self._fresh.discard(adapter_name)
            except UserError:
                # An adapter made for this file is of no use without it; one in use stays.
                if adapter_name in self._fresh:
                    self._withdraw(adapter_name)
                raise
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What PEFT saves; indices take two bytes each where that holds them."""
        found = super()._get_adapter_state_dict(*args, **kwargs)
        for key, tensor in found.items():
            if "mos_indices_" in key and tensor.max() <= torch.iinfo(torch.int16).max:
                found[key] = tensor.to(torch.int16)
        return found

    def _withdraw(self, adapter_name: str) -> None:
        """Take an adapter off again that could not be loaded."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
        else:
            self.unload()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._fresh.clear()
        with self._gathered(self.active_adapters):
            return self.model(*args, **kwargs)

    @contextmanager
    def assembled(self, *adapter_names: str) -> Iterator[None]:
        """Inside, every adapter's factors are assembled once and kept: for many short forward
        passes without gradients. Takes rank / equivalent_rank times the pools' memory.

        A pool that changes meanwhile is gathered again; a change through ``.data`` is not seen.
        """
        with torch.no_grad(), self._gathered(adapter_names or tuple(self.mos_pools)):
            yield

    @contextmanager
    def _gathered(self, adapter_names: Any) -> Iterator[None]:
        # A compiled model gathers layer by layer, in the graph.
        first = next(self._layers(), None)
        if torch.compiler.is_compiling() or first is None or first.disable_adapters or first.merged:
            yield
            return
        # Of a model that is quantised through and through only the pools are left.
        weights = itertools.chain(self.model.parameters(), self.mos_pools.parameters())
        dtype = compute_dtype(next(p for p in weights if p.is_floating_point()))
        with self.mos_store.gathered(adapter_names, dtype):
            yield

    def _named_layers(self, adapter_name: str) -> dict[str, MosLayer]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, MosLayer) and adapter_name in module.mos_places
        }

    def _layers(self, adapter_name: str | None = None) -> Iterator[MosLayer]:
        for module in self.model.modules():
            if isinstance(module, MosLayer) and (
                adapter_name is None or adapter_name in module.mos_places
            ):
                yield module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT opens around a forward pass and around ``generate``.

        Gathers the pools once for all of it. With ``adapter_names``, every layer is told which
        adapter each row of the batch has.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            with self._gathered(self.active_adapters):
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({n for n in names if n != BASE and n not in self.mos_pools})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with (
            named_rows(self, list(names), copies(self.model, kwargs)),
            self._gathered(dict.fromkeys(n for n in names if n != BASE)),
        ):
            yield


def _make_pools(plan: Plan, config: MosConfig, device: Any, dtype: torch.dtype) -> nn.ParameterDict:
    pools = nn.ParameterDict({})
    for key, pool in plan.pools.items():
        own = pool.rows - pool.borrowed
        weight = torch.zeros(own, pool.width, device=device, dtype=dtype)
        if pool.side == "A" or not config.init_weights:
            # Kaiming's range for the whole vector; that of a shard would be sqrt(l) too wide.
            bound = 1 / math.sqrt(pool.fan_in)
            nn.init.uniform_(weight, -bound, bound)
        pools[key] = nn.Parameter(weight)
        if config.row_scale == "learned" and pool.side == "A":
            for member, name in enumerate(pool.members):
                ones = torch.ones(plan.ranks[name], device=device, dtype=dtype)
                pools[f"{key}_scale_{member}"] = nn.Parameter(ones)
    return pools


def _random_scale(rank: int, config: MosConfig, place: tuple[str, int]) -> Tensor:
    """Frozen standard normal factors (Box & Muller on our own generator)."""
    stream = SplitMix64("mos row scale", config.index_seed, *place)
    uniform = [(stream.next() + 1) / 2**64 for _ in range(2 * rank)]
    pairs = zip(uniform[:rank], uniform[rank:], strict=True)
    return torch.tensor([math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs])
