"""The simulator against a plain loop, against the published stream, against physics."""

import numpy as np

from weightshare.equivariant import nbody


def plain_loop(charges, places, speeds, steps):
    """One trajectory, one particle and one component at a time."""
    x, v, n = [list(p) for p in places], [list(p) for p in speeds], len(charges)

    def force():
        result = [[0.0] * 3 for _ in range(n)]
        for i in range(n):
            for j in range(n):
                if i != j:
                    gap = [x[i][d] - x[j][d] for d in range(3)]
                    cube = sum(g * g for g in gap) ** 1.5
                    for d in range(3):
                        result[i][d] += charges[i] * charges[j] / cube * gap[d]
        return [[min(max(c, -100), 100) for c in row] for row in result]

    def kick():
        for i, row in enumerate(force()):
            for d in range(3):
                v[i][d] += 0.001 * row[d]

    kick()
    for step in range(1, steps + 1):
        for i in range(n):
            for d in range(3):
                x[i][d] += 0.001 * v[i][d]
        if step == steps:
            return np.array(x), np.array(v)
        kick()


def test_the_batched_simulation_equals_a_plain_loop():
    charges, places, speeds = nbody.initial_states(3)
    found = nbody.simulate(charges, places, speeds, (0, 2))
    for row in range(3):
        for frame in (0, 2):
            x, v = plain_loop(charges[row], places[row], speeds[row], 100 * (frame + 1))
            assert abs(found[frame][0][row] - x).max() < 1e-12
            assert abs(found[frame][1][row] - v).max() < 1e-12


def test_the_stream_is_the_published_one():
    data = nbody.make_nbody(2)
    # The first two trajectories of the published training set, frames 30 and 40.
    assert data.charges.tolist() == CHARGES
    assert np.allclose(data.start[:, 0], START, atol=1e-5)
    assert np.allclose(data.velocity[:, 1], VELOCITY, atol=1e-5)
    assert np.allclose(data.target[:, 2], TARGET, atol=1e-5)


def test_skipping_reaches_the_same_trajectory():
    few, later = nbody.initial_states(4), nbody.initial_states(2, skip=2)
    assert all((a[2:] == b).all() for a, b in zip(few, later, strict=True))


def test_momentum_is_conserved_and_speeds_start_equal():
    charges, places, speeds = nbody.initial_states(20)
    assert np.allclose(np.linalg.norm(speeds, axis=-1), 0.5)
    _, after = nbody.simulate(charges, places, speeds, (5,))[5]
    # Clipping a component breaks Newton's third law; few trajectories come that near.
    drift = abs(after.sum(1) - speeds.sum(1)).max(-1)
    assert np.median(drift) < 1e-12


def test_the_fitted_time_beats_standing_still():
    data = nbody.make_nbody(40, seed=1)
    still = float(((data.start - data.target) ** 2).mean())
    assert nbody.constant_velocity(data, data) < still


CHARGES = [[-1.0, 1.0, -1.0, -1.0, -1.0], [1.0, -1.0, 1.0, 1.0, 1.0]]
START = [[2.989116, 1.76937, -1.171294], [-2.251102, -2.000332, -1.179424]]
VELOCITY = [[-0.057065, 0.347776, 0.445389], [-0.369754, -0.441159, -0.036133]]
TARGET = [[-0.596871, 0.392962, 1.90582], [5.735381, 1.00558, 0.977183]]
