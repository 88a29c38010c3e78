"""Federations in lockstep end as they do alone."""

import gzip

import numpy as np
import pytest
import torch

from weightshare.errors import UserError
from weightshare.federated.config import FederateConfig, LocalConfig
from weightshare.federated.loading import load_samples
from weightshare.federated.local import Classifier, LoopTraining, weights_of
from weightshare.federated.lockstep import Lockstep
from weightshare.federated.models import model_for
from weightshare.federated.reviews import WORDS
from weightshare.federated.samples import Samples
from weightshare.federated.simulation import simulate
from weightshare.federated.stacked import StackedTraining


def options(strategy, seed=0, **more):
    return FederateConfig("digits", participants=4, rounds=3, epochs=1, strategy=strategy,
                          samples=200, hidden=8, seed=seed, **more)  # fmt: skip


def test_federations_side_by_side_end_as_each_does_by_itself():
    configs = [
        options("reputation"),
        options("fltrust", root_samples=20),
        options("median", seed=1),
        options("robust", attack="alie", adversaries=2),
    ]
    lockstep = Lockstep()
    together = [simulate(config, training=lockstep.training) for config in configs]
    alone = lockstep.run([together[0].alone, *(each.run for each in together)])[0]
    assert alone == pytest.approx(simulate(configs[0]).alone(), abs=0.01)
    for config, found in zip(configs, together, strict=True):
        expected = simulate(config)
        expected.run()
        for name, vector in expected.vectors().items():
            np.testing.assert_allclose(found.vectors()[name], vector, atol=1e-4)


def test_a_failing_federation_is_reported_and_holds_up_nobody():
    lockstep = Lockstep()
    here = simulate(options("reputation"), training=lockstep.training)

    def fail():
        raise RuntimeError("as it happens")

    with pytest.raises(RuntimeError, match="as it happens"):
        lockstep.run([here.run, fail])
    assert here.done == 3


def test_reviews_become_word_numbers_with_both_classes_on_either_side(tmp_path):
    lines = [f"{c} {'good' if c else 'bad'} film number n{i}" for c in (0, 1) for i in range(600)]
    with gzip.open(tmp_path / "rt-polarity.all.gz", "wt") as file:
        file.write("\n".join(lines))
    found = load_samples(str(tmp_path))
    assert found.train.shape == (200, 32) and found.test.shape == (1000, 32)
    assert found.test_labels.sum() == 500 and found.classes == 2
    # film and number are the most frequent words, in the order of the alphabet.
    assert set(found.test[:, 1]) == {2} and set(found.test[:, 2]) == {3}
    assert len(set(found.train[found.train_labels == 1][:, 0])) == 1
    model = model_for(found, 4, seed=0)
    assert model(torch.from_numpy(found.test[:5])).shape == (5, 2)
    (tmp_path / "rt-polarity.all.gz").write_bytes(b"0 plain text")
    with pytest.raises(UserError, match="movie reviews"):
        load_samples(str(tmp_path))


@pytest.mark.parametrize(
    ("strategy", "attack"),
    [("robust", "alie"), ("cgsv", "replay"), ("fedavg", "free_rider"), ("median", "identical")],
)
def test_the_quick_way_of_the_tables_ends_bit_for_bit_as_the_whole_way(strategy, attack):
    config = options(strategy, attack=attack, adversaries=2)
    whole, quick = simulate(config), simulate(config, as_bytes=False)
    trained = whole.cohort._to_train
    whole.cohort._to_train = dict  # everybody
    whole.run()
    quick.run()
    for name, vector in whole.vectors().items():
        assert quick.vectors()[name].tobytes() == vector.tobytes()
    needed = {"alie": 4, "free_rider": 4, "replay": 6, "identical": 6}[attack]
    everyone = dict.fromkeys(whole.examples, whole.initial)
    assert len(trained(everyone)) == needed
    assert len(trained({"x01": whole.initial})) == (attack != "free_rider")
    assert quick.grid.received_bytes < whole.grid.received_bytes


def test_a_stack_in_groups_is_the_stack_in_one_piece(monkeypatch):
    here = simulate(options("reputation"))
    starts = {n: here.initial + i for i, n in enumerate(here.honest)}
    assert here.training.stack._together > len(starts)
    together = here.training.train(starts, 2)
    monkeypatch.setattr(here.training.stack, "_together", 3)
    apart = here.training.train(starts, 2)
    for name, vector in together.items():
        np.testing.assert_allclose(apart[name], vector, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_recorded_steps_on_a_gpu_are_the_loops_steps(kind):
    draw = np.random.default_rng(0)
    sizes = [200, 200, 90, 200, 33]
    shape, values = ((8, 8), None) if kind == "images" else ((32,), WORDS)
    rows = (
        draw.random((sum(sizes), *shape), np.float32)
        if values is None
        else draw.integers(0, values, (sum(sizes), *shape))
    )
    labels = draw.integers(0, 2, sum(sizes))
    model = model_for(Samples(rows, labels, rows[:1], labels[:1]), 16, seed=0)
    names, edges = [f"p{i}" for i in range(len(sizes))], np.cumsum([0, *sizes])
    data = {
        name: (torch.from_numpy(rows[a:b]), torch.from_numpy(labels[a:b]))
        for name, a, b in zip(names, edges, edges[1:], strict=False)
    }
    config = LocalConfig(epochs=2, batch_size=16)
    task = Classifier(model)
    stacked, loop = StackedTraining(task, data, config, "cuda"), LoopTraining(task, data, config)
    starts = {name: weights_of(task) + np.float32(0.01 * i) for i, name in enumerate(names)}
    for number, present in enumerate((names, names, names[1:4], names), 1):
        chosen = {name: starts[name] for name in present}
        expected = loop.train(chosen, number)
        for name, found in stacked.train(chosen, number).items():
            np.testing.assert_allclose(found, expected[name], atol=1e-4)
            starts[name] = expected[name]
