"""From the targeted modules to pools and indices: plain numbers, before any tensor is made."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError
from weightshare.shards.indices import SplitMix64, draw, draw_balanced

if TYPE_CHECKING:
    from weightshare.shards.mos_config import MosConfig

SIDES = ("A", "B")


@dataclass(frozen=True)
class Target:
    """A module to adapt: W has ``out_features`` x ``in_features``."""

    name: str
    in_features: int
    out_features: int

    def size(self, side: str) -> int:
        """Length of the vectors on that side: h for A, o for B."""
        return self.in_features if side == "A" else self.out_features


@dataclass
class Pool:
    """A matrix of ``rows`` shards of ``width`` numbers and who uses which.

    ``indices[k]`` belongs to ``members[k]``: entry ``i * l + j`` is segment j of its rank row i.
    ``fan_in`` is the in_features that the initial range of an A pool follows. The first
    ``borrowed`` rows are public ones of another adapter, the next ``public`` are open to all
    members, the rest belongs to one member each.
    """

    key: str
    side: str
    width: int
    rows: int
    fan_in: int
    borrowed: int = 0
    public: int = 0
    members: list[str] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)

    def uses(self) -> list[int]:
        """How often each shard is used."""
        counts = [0] * self.rows
        for index in self.indices:
            for shard in index:
                counts[shard] += 1
        return counts


@dataclass(frozen=True)
class Loan:
    """What an adapter may use of another's: public rows and width of each pool, and how many ranks
    of each module come from there."""

    pools: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]


@dataclass
class Plan:
    """All pools by key, and for each module its rank and its place on either side."""

    pools: dict[str, Pool]
    ranks: dict[str, int]
    places: dict[str, dict[str, tuple[str, int]]]

    @property
    def parameters(self) -> int:
        """Numbers in all pools, without what is borrowed."""
        return sum((pool.rows - pool.borrowed) * pool.width for pool in self.pools.values())

    @property
    def dead_shards(self) -> float:
        """Share of the shards that no module uses: paid for, never trained."""
        counts = [n for pool in self.pools.values() for n in pool.uses()[pool.borrowed :]]
        return counts.count(0) / len(counts)


def parameter_count(targets: Sequence[Target], config: "MosConfig") -> int:
    r""":math:`\sum_k (e_A h_k + e_B o_k)`, whatever rank, shards, private rank and scope are; with
    fractions of a rank the same, rounded to whole shards pool by pool."""
    pools, _, _ = _sized(targets, config, _widths(targets, config))
    return sum(pool.rows * pool.width for pool in pools.values())


def plan_pools(targets: Sequence[Target], config: "MosConfig", loan: Loan | None = None) -> Plan:
    """Pools, ranks and indices for ``targets`` in the order of the model.

    With a ``loan``, rows of the other adapter's pools come first in every pool and in every index.

    The draw of a module depends on the seed, its pool's key, its position in the pool and the side,
    and on nothing else; with balanced indices also on the modules before it in the pool.

    Raises:
        UserError: shards that do not divide a module, or a rank that its pool cannot give.
    """
    widths = _widths(targets, config)
    pools, members, places = _sized(targets, config, widths)
    for key, pool in pools.items():
        own = config.private * sum(t.size(pool.side) // pool.width for t in members[key])
        pool.public = pool.rows - own
    own_ranks = {
        target.name: _rank(target, config, places[target.name], pools, members)
        for target in targets
    }
    _warn_capped(own_ranks, config)
    for key, group in members.items():
        _fill_indices(pools[key], group, config, own_ranks)
    ranks = dict(own_ranks)
    if loan is not None:
        for target in targets:
            ranks[target.name] += _public_rank(target, config, loan)
        for key, group in members.items():
            _borrow(pools[key], group, config, loan)
    if not config.pair_dissociation:
        _pair(pools, places, targets)
    return Plan(pools, ranks, places)


def _public_rank(target: Target, config: "MosConfig", loan: Loan) -> int:
    """How many ranks of a module are made of borrowed shards."""
    if target.name not in loan.ranks:
        raise UserError(
            f"{target.name} is not adapted by {config.public_from!r}, whose pools are to be used; "
            "target modules that it adapts."
        )
    return loan.ranks[target.name] if config.public_rank is None else config.public_rank


def _borrow(pool: Pool, group: list[Target], config: "MosConfig", loan: Loan) -> None:
    """Put the other adapter's public rows in front.

    With its seed and its number of ranks, the draw is the one it has drawn itself.
    """
    rows, width = loan.pools.get(pool.key, (0, 0))
    if width != pool.width:
        raise UserError(
            f"{config.public_from!r} has no pool {pool.key} with shards of {pool.width}; give the "
            "pool_scope and shards_per_vector that it has."
        )
    for k, target in enumerate(group):
        segments = target.size(pool.side) // pool.width
        rank = _public_rank(target, config, loan)
        if rank * segments > rows:
            raise UserError(
                f"public_rank {rank} cannot be had for {target.name}: the public pool of "
                f"{config.public_from!r} gives at most {rows // segments}; lower it."
            )
        stream = SplitMix64("mos", config.index_seed, pool.key, k)
        public = draw(rows, rank * segments, stream)
        pool.indices[k] = [*public, *(rows + number for number in pool.indices[k])]
    pool.borrowed = rows
    pool.rows += rows


def _sized(
    targets: Sequence[Target], config: "MosConfig", widths: dict[tuple[str, str], int]
) -> tuple[dict[str, Pool], dict[str, list[Target]], dict[str, dict[str, tuple[str, int]]]]:
    """Pools without indices, the modules of each, and each module's place in them."""
    pools: dict[str, Pool] = {}
    members: dict[str, list[Target]] = {}
    places: dict[str, dict[str, tuple[str, int]]] = {target.name: {} for target in targets}
    for side in SIDES:
        for target in targets:
            key = _key(target, side, widths[target.name, side], config)
            group = members.setdefault(key, [])
            places[target.name][side] = key, len(group)
            group.append(target)
    for key, group in members.items():
        side = key[-1]
        width = widths[group[0].name, side]
        segments = sum(target.size(side) // width for target in group)
        rows = round(config.budgets[SIDES.index(side)] * segments)
        fan_in = round(sum(t.in_features for t in group) / len(group))
        names = [target.name for target in group]
        pools[key] = Pool(key, side, width, rows, fan_in, members=names)
    return pools, members, places


def _widths(targets: Sequence[Target], config: "MosConfig") -> dict[tuple[str, str], int]:
    """Shard width of every module on either side."""
    common = math.gcd(*(size for t in targets for size in (t.in_features, t.out_features)))
    widths = {}
    for target in targets:
        shards: int = by_pattern(config.shard_pattern, target.name, config.shards_per_vector)
        for side in SIDES:
            size = common if config.pool_scope == "all" else target.size(side)
            if size % shards:
                both = math.gcd(target.in_features, target.out_features)
                both = common if config.pool_scope == "all" else both
                allowed = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
                raise UserError(
                    f"{target.name} has {target.in_features} inputs and {target.out_features} "
                    f"outputs, which {shards} shards per vector do not divide; "
                    f"give one of {allowed}, or a shard_pattern for this module."
                )
            widths[target.name, side] = size // shards
    return widths


def _key(target: Target, side: str, width: int, config: "MosConfig") -> str:
    """The pool a module uses on one side; it must not hold a dot, as it names a parameter."""
    if config.pool_scope == "all":
        return f"all_w{width}_{side}"
    if config.pool_scope == "shape":
        return f"{target.size(side)}_w{width}_{side}"
    leaf = target.name.rpartition(".")[2]
    name = f"{leaf}_{target.in_features}x{target.out_features}"
    plain = target.size(side) == width * config.shards_per_vector
    return f"{name}_{side}" if plain else f"{name}_w{width}_{side}"


def _rank(
    target: Target,
    config: "MosConfig",
    places: dict[str, tuple[str, int]],
    pools: dict[str, Pool],
    members: dict[str, list[Target]],
) -> int:
    """The rank of a module: the asked one, or the usual one where the pools are large enough."""
    most = config.private
    most += min(
        pool.public // (target.size(pool.side) // pool.width)
        for pool in (pools[key] for key, _ in places.values())
    )
    asked = by_pattern(config.rank_pattern, target.name, config.rank)
    count = len(members[places["A"][0]])
    if most < 1:
        raise UserError(
            f"An equivalent rank of {min(config.budgets):g} leaves {target.name} less than one "
            f"whole vector in the pool of its {count} module(s); raise equivalent_rank, or let "
            "more modules share with pool_scope."
        )
    if asked is None:
        return min(usual_rank(config), most)
    if asked > most:
        raise UserError(
            f"Rank {asked} cannot be had for {target.name}: the pool of its {count} module(s) "
            f"gives at most {most}; lower rank or private_rank, or raise equivalent_rank."
        )
    return int(asked)


def usual_rank(config: "MosConfig") -> int:
    """Four times the budget (the paper uses two to four), at least 1."""
    return max(1, round(4 * config.equivalent_rank))


def _warn_capped(ranks: dict[str, int], config: "MosConfig") -> None:
    usual = usual_rank(config)
    if config.rank is None and config.private < config.equivalent_rank:
        capped = {rank for rank in ranks.values() if rank < usual}
        if capped and not config.rank_pattern:
            warnings.warn(
                f"Some pools are too small for the usual rank {usual}; their modules get rank "
                f"{', '.join(map(str, sorted(capped)))}.",
                stacklevel=3,
            )


def _fill_indices(
    pool: Pool, group: list[Target], config: "MosConfig", ranks: dict[str, int]
) -> None:
    used = [0] * pool.public
    private = pool.public
    for k, target in enumerate(group):
        segments = target.size(pool.side) // pool.width
        count = (ranks[target.name] - config.private) * segments
        stream = SplitMix64("mos", config.index_seed, pool.key, k)
        if config.index_strategy == "balanced":
            index = draw_balanced(used, count, stream)
        else:
            index = draw(pool.public, count, stream)
        own = config.private * segments
        pool.indices.append([*index, *range(private, private + own)])
        private += own


def _pair(
    pools: dict[str, Pool],
    places: dict[str, dict[str, tuple[str, int]]],
    targets: Sequence[Target],
) -> None:
    """Give B the index of A, which needs pools of the same number of shards on both sides."""
    for target in targets:
        (a, k), (b, m) = places[target.name]["A"], places[target.name]["B"]
        index = pools[a].indices[k]
        if pools[a].rows != pools[b].rows or len(index) != len(pools[b].indices[m]):
            raise UserError(
                f"pair_dissociation is off, but the pools of {target.name} differ in shards "
                "between A and B; use pool_scope='type' without output_rank, or leave it on."
            )
        pools[b].indices[m] = list(index)


def by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits the module's name, as PEFT reads patterns."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), name), otherwise)
