"""The options of a Mixture of Shards adapter."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import PeftType

from weightshare.errors import UserError

SCOPES = ("type", "shape", "all")
STRATEGIES = ("random", "balanced")
ROW_SCALES = ("none", "learned", "random")
BIASES = ("none", "all", "mos_only")


@dataclass
class MosConfig(PeftConfig):
    r"""Low-rank adapters put together from shards of shared pools (Wang et al., ICLR 2025).

    .. math:: y = Wx + \tfrac{\alpha}{r} B_k A_k x, \qquad
        A_k = \mathrm{reshape}(P_A[I^A_k]), \quad B_k = \mathrm{reshape}(P_B[I^B_k])^\top

    For the n modules of one type, of size o x h, the pools :math:`P_A` (e n l, h / l) and
    :math:`P_B` (e n l, o / l) are trained; the indices are drawn once and frozen. It trains
    ``e * n * (h + o)`` parameters, as LoRA of rank e, and each module has rank r.

    Args:
        equivalent_rank: e, the budget: as many parameters as LoRA of this rank. It may be a
            fraction, also below 1, which LoRA cannot have; pools then have the nearest whole number
            of shards.
        rank: r of each module, at least e; None is 4e (the paper uses 2e to 4e), less where a pool
            is too small for it. The modules of one pool allow at most ``(e - p) n + p``.
        shards_per_vector: l, pieces each row of A and column of B is put together from; divides the
            sizes of all targeted modules. 1 shares whole vectors.
        private_rank: p, ranks of each module that no other module uses; None is e // 8. With p = e
            the adapter is LoRA.
        lora_alpha: numerator of the scale (16 in the authors' runs).
        lora_dropout: dropout of the adapter's input.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        target_modules: names of modules, a regular expression, or "all-linear".
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: blocks to adapt, by number.
        layers_pattern: name of the list of blocks, where it is unusual.
        rank_pattern: rank by module name or expression, instead of ``rank``.
        alpha_pattern: alpha by module name or expression, instead of ``lora_alpha``.
        shard_pattern: shards per vector by module name or expression.
        bias: biases to train: none, all, or mos_only (of the targeted modules). Trained biases
            change the model also where the adapter is disabled.
        modules_to_save: modules besides the adapter to train and save whole.
        pool_scope: who shares a pool: modules of one name and shape (type, the paper), all that
            have the same width on that side (shape), or all modules (all, with shards of one width:
            the greatest that divides every size, over ``shards_per_vector``).
        index_strategy: random (the paper), or balanced: every shard is used equally often, none
            never.
        index_seed: of the draw.
        save_indices: write the indices into the checkpoint; otherwise they are drawn again and
            compared with a checksum.
        init_weights: False starts B at random too, so that the adapter is no identity (for tests).
        pair_dissociation: draw the index of B apart from that of A.
        output_rank: equivalent rank of the B pools, where it differs from that of the A pools.
        scale_by_use: divide each shard by the square root of how often it is used, so that its
            gradient does not grow with it (after Uni-LoRA).
        row_scale: a factor on each rank of each module: learned (after RaSA; n * r parameters
            more), or random and frozen (the paper's "random scaling").
        public_from: name of an adapter of the model whose public pools this one uses beside its
            own, for many users of one pool: its rank grows by ``public_rank``, its own parameters
            and its file do not. See ``add_user``.
        public_rank: ranks of each module that are made of shards from there; None is as many as
            that adapter itself has, and with its ``index_seed`` they are the same ones.

    Raises:
        UserError: a value that cannot be used.
    """

    equivalent_rank: float = field(default=2, metadata={"help": "LoRA rank of equal budget."})
    rank: int | None = field(default=None, metadata={"help": "Rank of each module."})
    shards_per_vector: int = field(default=4, metadata={"help": "Pieces of each vector."})
    private_rank: int | None = field(default=None, metadata={"help": "Ranks not shared."})
    lora_alpha: float = field(default=16, metadata={"help": "Numerator of the scale."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by module."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Alpha by module."}
    )
    shard_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Shards per vector by module."}
    )
    bias: Literal["none", "all", "mos_only"] = field(
        default="none", metadata={"help": "Biases to train."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole."}
    )
    pool_scope: Literal["type", "shape", "all"] = field(
        default="type", metadata={"help": "Which modules share a pool."}
    )
    index_strategy: Literal["random", "balanced"] = field(
        default="random", metadata={"help": "How shards are drawn."}
    )
    index_seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    save_indices: bool = field(default=True, metadata={"help": "Save the indices."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity."})
    pair_dissociation: bool = field(default=True, metadata={"help": "Draw A and B apart."})
    output_rank: float | None = field(default=None, metadata={"help": "Equivalent rank of B."})
    scale_by_use: bool = field(default=False, metadata={"help": "Normalise by use."})
    row_scale: Literal["none", "learned", "random"] = field(
        default="none", metadata={"help": "Factor on each rank."}
    )
    public_from: str | None = field(
        default=None, metadata={"help": "Adapter whose public pools are used too."}
    )
    public_rank: int | None = field(default=None, metadata={"help": "Ranks from there."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["MOS"]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        _check(self)

    @property
    def private(self) -> int:
        """p, the private rank in use."""
        return int(self.equivalent_rank // 8) if self.private_rank is None else self.private_rank

    @property
    def budgets(self) -> tuple[float, float]:
        """Equivalent ranks of the A pools and of the B pools."""
        return self.equivalent_rank, self.output_rank or self.equivalent_rank

    def to_dict(self) -> dict[str, Any]:
        """Every option by name, for ``adapter_config.json``."""
        return dict(super().to_dict())


def _check(config: MosConfig) -> None:
    _check_numbers(config)
    for name, allowed in (
        ("pool_scope", SCOPES),
        ("index_strategy", STRATEGIES),
        ("row_scale", ROW_SCALES),
        ("bias", BIASES),
    ):
        if getattr(config, name) not in allowed:
            raise UserError(
                f"{name} is {getattr(config, name)!r}; give one of {', '.join(allowed)}."
            )
    smallest, largest = min(config.budgets), max(config.budgets)
    if config.private > smallest:
        raise UserError(
            f"private_rank is {config.private}, but the budget is an equivalent rank of "
            f"{smallest}; give a private rank from 0 to {int(smallest)}."
        )
    for name, rank in {"rank": config.rank, **config.rank_pattern}.items():
        if rank is not None and rank < config.private:
            raise UserError(
                f"The rank of {name!r} is {rank}, below the private rank {config.private}; "
                "give a rank that contains it."
            )
    if config.rank is not None and config.rank < int(largest):
        raise UserError(
            f"rank is {config.rank}, below the equivalent rank {largest:g}, so that parts of the "
            f"pools could never be used; give a rank of at least {int(largest)}."
        )
    if config.public_from is None and config.public_rank is not None:
        raise UserError("public_rank is given without public_from; name the adapter it is of.")
    if config.public_from is not None and config.scale_by_use:
        raise UserError(
            "scale_by_use cannot be had with public_from: the uses of a public shard by other "
            "adapters are not known; leave it off."
        )
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise UserError(
                    f"{name} needs target_modules as a list of names, but it is the expression "
                    f"{config.target_modules!r}; write the layers into the expression."
                )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise UserError("layers_pattern is given without layers_to_transform; give both.")


def _check_numbers(config: MosConfig) -> None:
    whole = {"shards_per_vector": 1, "rank": 1, "private_rank": 0, "public_rank": 1}
    for name in ("rank", "private_rank", "public_rank"):
        if getattr(config, name) is None:
            del whole[name]
    for name, least in whole.items():
        _check_whole(name, getattr(config, name), least)
    if not _is_number(config.index_seed, int):
        raise UserError(f"index_seed is {config.index_seed!r}; give a whole number.")
    check_positive("equivalent_rank", config.equivalent_rank)
    if config.output_rank is not None:
        check_positive("output_rank", config.output_rank)
    check_positive("lora_alpha", config.lora_alpha)
    for name in ("rank_pattern", "alpha_pattern", "shard_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, dict):
            raise UserError(f"{name} is {patterns!r}; give a dictionary from modules to numbers.")
        for key, value in patterns.items():
            if name == "alpha_pattern":
                check_positive(f"{name}[{key!r}]", value)
            else:
                _check_whole(f"{name}[{key!r}]", value, 1)
    dropout = config.lora_dropout
    if not _is_number(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout is {dropout!r}; give a probability from 0 to below 1.")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not _is_number(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; give a whole number >= {least}.")


def check_positive(name: str, value: Any) -> None:
    """Raise ``UserError`` unless ``value`` is a finite number above 0."""
    if not _is_number(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{name} is {value!r}; give a number above 0.")
