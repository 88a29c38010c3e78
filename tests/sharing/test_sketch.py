import math

import pytest
import torch

from weightshare.sharing import CountSketch


def test_the_sketch_is_linear():
    sketch = CountSketch(size=64)
    x, y = torch.randn(2, 1000, dtype=torch.float64)
    both = sketch("w", 2 * x - 3 * y)
    assert torch.allclose(both, 2 * sketch("w", x) - 3 * sketch("w", y), atol=1e-12)


def test_small_tensors_are_kept_exactly():
    x = torch.randn(8, 8)
    assert torch.equal(CountSketch(size=64)("w", x), x.flatten())


def test_hashes_depend_on_seed_and_name_only():
    x = torch.randn(500)
    a = CountSketch(16, seed=1)("w", x)
    assert torch.equal(a, CountSketch(16, seed=1)("w", x))
    assert not torch.equal(a, CountSketch(16, seed=2)("w", x))
    assert not torch.equal(a, CountSketch(16, seed=1)("v", x))


@pytest.mark.parametrize("size", [256, 1024])
def test_a_cosine_has_the_error_of_a_count_sketch(size):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 50_000, generator=generator, dtype=torch.float64)
    c = 0.3
    y = c * x / x.norm() + math.sqrt(1 - c * c) * noise / noise.norm()
    true = float(torch.nn.functional.cosine_similarity(x, y, 0))
    errors = []
    for seed in range(60):
        sketch = CountSketch(size, seed)
        found = torch.nn.functional.cosine_similarity(sketch("w", x), sketch("w", y), 0)
        errors.append(float(found) - true)
    rmse = math.sqrt(sum(e * e for e in errors) / len(errors))
    expected = (1 - c * c) / math.sqrt(size)
    assert 0.75 * expected < rmse < 1.3 * expected
    assert abs(sum(errors) / len(errors)) < 4 * rmse / math.sqrt(len(errors))


def test_a_weight_with_equal_rows_is_no_worse():
    # Every row of such a gradient falls on the same buckets when the hash ignores the chunk.
    row = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = row.repeat(200)
    found = [float(CountSketch(64, seed)("w", x).square().sum()) for seed in range(200)]
    mean = sum(found) / len(found)
    error = torch.tensor(found).std() / math.sqrt(len(found))
    assert abs(mean - float(x.square().sum())) < 4 * error
    assert torch.tensor(found).std() / mean < 3 / math.sqrt(64)
