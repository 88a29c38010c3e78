"""What a checkpoint must hold before it is believed."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.shards.indices import checksum
from weightshare.shards.layer import MosLayer
from weightshare.shards.store import PoolStore


def stored_checksum(pools: Iterable[Sequence[Sequence[int]]]) -> Tensor:
    """The checksum of the indices of all pools' members, as it is saved: int64 (1,)."""
    value = checksum(index for members in pools for index in members)
    return torch.tensor([value], dtype=torch.int64)


def check_saved(
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    store: PoolStore,
    layers: Mapping[str, MosLayer],
) -> bool:
    """Whether ``state_dict`` brings the adapter; if so it must bring all of it, unharmed.

    Raises:
        UserError: a pool or an index is missing or of another shape, or the indices do not have the
            checksum that was saved with them.
    """
    pools = f"{prefix}mos_pools.{adapter_name}."
    saved = f"{prefix}mos_checksum.{adapter_name}"
    # Pools of other modules have other names: PEFT leaves those it does not know without the
    # adapter's name, and would go on with an adapter that was never trained.
    if saved not in state_dict and not any(key.startswith(pools) for key in state_dict):
        return False
    tables = store.tables[adapter_name]
    wanted: dict[str, Tensor] = {f"{pools}{key}": store.pool(adapter_name, key) for key in tables}
    indices: dict[tuple[str, int], Tensor] = {}
    for name, layer in layers.items():
        place = layer.mos_places[adapter_name]
        for side, (key, member) in (("A", place.a), ("B", place.b)):
            container = getattr(layer, f"mos_indices_{side}")
            index = container[adapter_name]
            if adapter_name not in container._non_persistent_buffers_set:
                full = f"{prefix}model.{name}.mos_indices_{side}.{adapter_name}"
                wanted[full] = index
                index = state_dict.get(full, index)
            indices[key, member] = index
    for key, tensor in wanted.items():
        if key not in state_dict:
            raise UserError(
                f"The adapter's file has no {key.removeprefix(prefix)}; it is incomplete or was "
                "made for other modules: save it again, or get it again."
            )
        if state_dict[key].shape != tensor.shape:
            raise UserError(
                f"{key.removeprefix(prefix)} has the shape {tuple(state_dict[key].shape)} in the "
                f"adapter's file, but its configuration asks for {tuple(tensor.shape)}; give the "
                "file and the adapter_config.json of the same adapter."
            )
    for (key, _), index in indices.items():
        rows = tables[key].rows
        if not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise UserError(
                f"The adapter's file uses shard {int(index.max())} of the pool {key}, which has "
                f"{rows}; it is damaged, or belongs to other public pools."
            )
    # By the tables: pools in their order, members in theirs.
    found = stored_checksum(
        [indices[key, member].tolist() for member in range(len(table.sources))]
        for key, table in tables.items()
    )
    expected = state_dict.get(saved)
    if expected is None or not torch.equal(expected.cpu(), found):
        raise UserError(
            "The indices of the adapter do not have the checksum that was saved with them, so its "
            "shards would be put together wrongly; the file is damaged: get it again."
        )
    return True
