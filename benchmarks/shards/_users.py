"""Eight users of one base: the adapters they get, and the adapter of each row of a batch.

Budgets count for *all users together*, in numbers of LoRA of rank 1: two, eight, and what it takes
to give each user as many numbers of his own as LoRA of rank 1 has. LoRA is written as shards that
are all private (the same map), so that one batched path serves every method.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft import PeftModel, get_peft_model

from weightshare.shards import MosConfig, add_user

Method = tuple[Callable[[Any], Any], float]
"""A function that adapts the base model, and the lower of the first two learning rates."""
PUBLIC = "all"
"""The adapter that users without one of their own are served with."""
BESIDE = {"own": "LoRA r=1 for each", "one": "one LoRA r=8"}


def users(names: Sequence[str], shards: int, rate: float) -> dict[str, Method]:
    """Adapters by method; ``rate`` is one that suits LoRA of rank 2."""
    usual = {"target_modules": "all-linear", "shards_per_vector": shards, "private_rank": 0}

    def everybody(base: Any, **options: Any) -> Any:
        return get_peft_model(base, MosConfig(**{**usual, **options}), adapter_name=PUBLIC)

    def each(base: Any, **options: Any) -> Any:
        model = get_peft_model(base, MosConfig(**{**usual, **options}), adapter_name=names[0])
        for seed, name in enumerate(names[1:], start=1):
            model.add_adapter(name, MosConfig(**{**usual, "index_seed": seed, **options}))
        return model

    def public(base: Any, e: float, own: float, apart: bool = False) -> Any:
        model = everybody(base, equivalent_rank=e, rank=round(4 * e))
        for seed, name in enumerate(names):
            more = {"index_seed": seed} if apart else {}
            rank = max(1, round(4 * own))
            add_user(model, name, PUBLIC, equivalent_rank=own, rank=rank, private_rank=0, **more)
        return model

    def lora(rank: int) -> dict[str, int]:
        return {"equivalent_rank": rank, "rank": rank, "private_rank": rank}

    return {
        "LoRA r=1 for each": (partial(each, **lora(1)), rate),
        "public e=4, own e=0.5": (partial(public, e=4, own=0.5), 2 * rate),
        "MoS e=1 for each": (partial(each, equivalent_rank=1, rank=4), 2 * rate),
        "one LoRA r=8": (partial(everybody, **lora(8)), rate),
        "one MoS e=8": (partial(everybody, equivalent_rank=8, rank=32), 2 * rate),
        "public e=4, own e=1": (partial(public, e=4, own=1), 2 * rate),
        "LoRA r=2 for each": (partial(each, **lora(2)), rate),
        "one LoRA r=2": (partial(everybody, **lora(2)), rate),
        "MoS e=0.25 for each": (partial(each, equivalent_rank=0.25, rank=2), 2 * rate),
        "public e=1, own e=0.125": (partial(public, e=1, own=0.125), 2 * rate),
        "public e=4, own e=0.5, apart": (partial(public, e=4, own=0.5, apart=True), 2 * rate),
    }


def activate(model: PeftModel) -> None:
    """Train the adapters of all users at once."""
    model.base_model.set_adapter(list(model.peft_config))


def adapter_of(model: PeftModel, name: str) -> str:
    """The adapter that serves a user."""
    return name if name in model.peft_config else PUBLIC


def adapters_of_rows(model: PeftModel, names: Sequence[str], share: int) -> list[str]:
    """The adapter of each row of a batch with ``share`` rows a user."""
    return [adapter_of(model, name) for name in names for _ in range(share)]
