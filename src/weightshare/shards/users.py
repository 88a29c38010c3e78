"""Many users of one public pool, each with a part of their own."""

import dataclasses
import math
from typing import Any

from peft import PeftModel

from weightshare.errors import UserError
from weightshare.shards.conversion import mos_tuner
from weightshare.shards.mos_config import MosConfig, check_positive


def add_user(
    model: PeftModel,
    name: str,
    lender: str = "default",
    *,
    equivalent_rank: float = 1,
    **options: Any,
) -> None:
    r"""Add an adapter that uses the public pools of ``lender`` and has a small one of its own.

    .. math:: \Delta W_k = s\,(B^{public}_k A^{public}_k + B^{own}_k A^{own}_k)

    The public factors are put together from the lender's shards, the own ones from
    ``equivalent_rank * sum(h + o)`` parameters, all that the user trains and saves. At first the
    user's adapter computes what the lender's public part does. With another ``index_seed`` it takes
    other shards of the pool, so that users differ at no cost where pools are trained together.

    The lender's pools are trained along where it is active too:
    ``model.base_model.set_adapter([lender, *users])``, then batches with ``adapter_names`` in
    evaluation mode. With ``model.set_adapter(name)`` only the user's own part learns: so a new user
    joins public pools that are trained and frozen, and nobody else's adapter changes.

    Args:
        model: a PEFT model with the adapter ``lender``.
        name: of the new adapter.
        lender: the adapter with the public pools; its ranks must be the same in every module.
        equivalent_rank: the user's own budget; by default one private rank a module.
        options: more of ``MosConfig``, instead of the lender's.

    Raises:
        UserError: no such adapter, modules of different ranks, or options that do not fit.
    """
    tuner = mos_tuner(model)
    if lender not in model.peft_config:
        raise UserError(
            f"The model has no adapter {lender!r}; it has {', '.join(model.peft_config)}."
        )
    config: MosConfig = model.peft_config[lender]
    places = [layer.mos_places[lender] for layer in tuner._layers(lender)]
    if len({(place.rank, place.scaling) for place in places}) > 1:
        raise UserError(
            f"The modules of {lender!r} differ in rank or scale; give its pools a rank that all of "
            "them can have, without rank_pattern and alpha_pattern."
        )
    check_positive("equivalent_rank", equivalent_rank)
    whole = equivalent_rank == int(equivalent_rank)
    changes = {
        "equivalent_rank": equivalent_rank,
        "output_rank": None,
        "private_rank": int(equivalent_rank) if whole else 0,
        "rank": max(1, round(equivalent_rank)),
        "public_from": lender,
        "public_rank": None,
        "inference_mode": False,
    } | options
    public = changes["public_rank"] or places[0].rank - config.private
    rank = public + changes["rank"]
    changes.setdefault(
        "lora_alpha", places[0].scaling * (math.sqrt(rank) if config.use_rslora else rank)
    )
    model.add_adapter(name, dataclasses.replace(config, **changes))
