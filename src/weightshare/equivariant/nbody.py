"""Charged particles in space: the N-body task, simulated.

Five unit masses with charges ±1 attract and repel each other; from positions and velocities at one
moment the network predicts the positions 1,000 steps later. This is the "nbody_small" set of EGNN
(Satorras et al. 2021) and its successors, replayed in batches and float64: the same random stream
gives the same trajectories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from weightshare.data import locate
from weightshare.errors import UserError

STEP = 1e-3
"""Time step of the simulation."""
BOX, FASTEST_FORCE, SPEED = 5.0, 100.0, 0.5
"""Walls that reflect initial positions; bound on every force component; initial speed."""
EVERY = 100
"""Steps between recorded frames: frame k is step 100 (k + 1)."""
HORIZON = 1.0
"""Time from frame 30, which is given, to frame 40, which is to be predicted."""
FRAMES = 49
SEED = 43
"""Of the published stream."""
PUBLISHED = (10_000, 2_000, 2_000)
"""Trajectories of the published training (the first 3,000 are used), validation and test sets."""


@dataclass(frozen=True)
class NBody:
    """Trajectories: ``charges`` (M, n), ``start``, ``velocity`` and ``target`` (M, n, 3).

    Positions and velocities of one frame, and the positions ``time`` later.
    """

    charges: np.ndarray
    start: np.ndarray
    velocity: np.ndarray
    target: np.ndarray
    time: float = 1.0

    def __len__(self) -> int:
        return len(self.charges)

    def take(self, rows: slice | np.ndarray) -> "NBody":
        """Some of the trajectories."""
        return NBody(
            self.charges[rows], self.start[rows], self.velocity[rows], self.target[rows], self.time
        )


def initial_states(
    count: int, seed: int = SEED, skip: int = 0, particles: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charges (M, n), positions and velocities (M, n, 3) of trajectories ``skip`` ...
    ``skip + count - 1`` of the legacy NumPy stream of ``seed``.

    Per trajectory: charges, positions, velocities, then two arrays of noise that the original
    generator multiplies by zero.
    """
    stream = np.random.RandomState(seed)
    charges = np.empty((count, particles))
    places, speeds = np.empty((count, particles, 3)), np.empty((count, particles, 3))
    for row in range(skip + count):
        charge = stream.choice([-1.0, 0.0, 1.0], size=(particles, 1), p=[0.5, 0.0, 0.5])
        place, speed = stream.randn(3, particles), stream.randn(3, particles)
        stream.randn(2 * FRAMES * 3 * particles)
        if row >= skip:
            speed *= SPEED / np.sqrt((speed**2).sum(0))
            over, under = place > BOX, place < -BOX
            place = np.where(over, 2 * BOX - place, np.where(under, -2 * BOX - place, place))
            speed = np.where(over, -abs(speed), np.where(under, abs(speed), speed))
            charges[row - skip] = charge[:, 0]
            places[row - skip], speeds[row - skip] = place.T, speed.T
    return charges, places, speeds


def forces(charges: np.ndarray, places: np.ndarray) -> np.ndarray:
    r""":math:`F_i = \sum_j q_i q_j (x_i - x_j)/\lVert x_i - x_j\rVert^3`, every component clipped
    to ±100; (M, n), (M, n, 3) -> (M, n, 3)."""
    between = places[:, :, None] - places[:, None]
    squared = (between**2).sum(-1)
    n = places.shape[1]
    squared[:, range(n), range(n)] = 1.0
    strength = charges[:, :, None] * charges[:, None] / (squared * np.sqrt(squared))
    strength[:, range(n), range(n)] = 0.0
    found: np.ndarray = np.einsum("mij,mijd->mid", strength, between)
    return found.clip(-FASTEST_FORCE, FASTEST_FORCE)


def simulate(
    charges: np.ndarray,
    places: np.ndarray,
    speeds: np.ndarray,
    frames: tuple[int, ...] = (30, 40),
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Positions and velocities at the given frames, all trajectories at once.

    Kick, then drift, record, kick, ...: a recorded velocity is the one before that step's kick.
    There are no walls after the start.
    """
    places, recorded = places.copy(), {}
    speeds = speeds + STEP * forces(charges, places)
    last = EVERY * (max(frames) + 1)
    for step in range(1, last + 1):
        places += STEP * speeds
        frame, rest = divmod(step, EVERY)
        if rest == 0 and frame - 1 in frames:
            recorded[frame - 1] = places.copy(), speeds.copy()
        speeds += STEP * forces(charges, places)
        if progress is not None and rest == 0:
            progress(step, last)
    return recorded


def make_nbody(
    count: int,
    seed: int = SEED,
    skip: int = 0,
    particles: int = 5,
    frames: tuple[int, int] = (30, 40),
    progress: Callable[[int, int], None] | None = None,
) -> NBody:
    """Simulate trajectories ``skip`` ... ``skip + count - 1`` of the stream of ``seed``.

    With the defaults, trajectories 0-2,999 are the published training set, 10,000-11,999 the
    validation and 12,000-13,999 the test set. The work is 4,100 steps of all trajectories together.
    """
    return make_sets([(skip, count)], seed, particles, frames, progress)[0]


def make_sets(
    parts: Sequence[tuple[int, int]],
    seed: int = SEED,
    particles: int = 5,
    frames: tuple[int, int] = (30, 40),
    progress: Callable[[int, int], None] | None = None,
) -> list[NBody]:
    """Several stretches (skip, count) of one stream, simulated together."""
    states = [initial_states(count, seed, skip, particles) for skip, count in parts]
    charges, places, speeds = (np.concatenate(kind) for kind in zip(*states, strict=True))
    found = simulate(charges, places, speeds, frames, progress)
    (start, velocity), (target, _) = found[frames[0]], found[frames[1]]
    whole = NBody(charges, start, velocity, target, STEP * EVERY * (frames[1] - frames[0]))
    ends = np.cumsum([count for _, count in parts]).tolist()
    return [whole.take(slice(e - n, e)) for e, (_, n) in zip(ends, parts, strict=True)]


def check_counts(counts: tuple[int, int, int]) -> None:
    """Refuse sets that would reach into each other."""
    for part, count, most in zip(
        ("training", "validation", "test"), counts, PUBLISHED, strict=True
    ):
        if not 0 < count <= most:
            raise UserError(f"The {part} set has {most} trajectories, not {count}; ask for fewer.")


def training_sets(
    counts: tuple[int, int, int], progress: Callable[[int, int], None] | None = None
) -> dict[str, NBody]:
    """So many training, validation and test trajectories of the published sets.

    They are read from ``nbody_small_7000`` where ``data.locate`` finds it, else simulated.

    Raises:
        UserError: more are asked for than a set holds; the next ones are those of another set.
    """
    check_counts(counts)
    parts = ("train", "valid", "test")
    try:
        with np.load(locate("nbody_small_7000"), allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
        enough = all(n <= len(kept[f"{p}_idx"]) for p, n in zip(parts, counts, strict=True))
    except UserError:
        enough = False
    if enough:
        whole = NBody(kept["charges"], kept["loc30"], kept["vel30"], kept["loc40"])
        return {p: whole.take(kept[f"{p}_idx"][:n]) for p, n in zip(parts, counts, strict=True)}
    starts = (0, PUBLISHED[0], PUBLISHED[0] + PUBLISHED[1])
    return dict(
        zip(
            parts, make_sets(list(zip(starts, counts, strict=True)), progress=progress), strict=True
        )
    )


def constant_velocity(train: NBody, test: NBody) -> float:
    """Test MSE of ``start + t * velocity`` with the one time t that fits the training set best."""
    time = (train.velocity * (train.target - train.start)).sum() / (train.velocity**2).sum()
    return float(((test.start + time * test.velocity - test.target) ** 2).mean())
