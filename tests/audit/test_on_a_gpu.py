"""What a GPU does differently: a thread for the backward pass, kernels for the products."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sharing"))
from models import SHARED, loss_of, twins

from weightshare.audit import apply, audit
from weightshare.sharing import CountSketch, per_use
from weightshare.sharing.products import inner_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "name", "places"), SHARED)
def test_each_use_gets_its_gradient(kind, name, places, checkpointing):
    shared, unshared = twins(kind, name, places, checkpointing)
    shared, unshared = shared.cuda(), unshared.cuda()
    x = torch.randn(5, 3, dtype=torch.float64, device="cuda")
    with per_use(shared) as uses:
        gradients = uses.gradients(loss_of(shared, x))[name]
    loss_of(unshared, x).backward()
    assert len(gradients) == len(places)
    for place, gradient in zip(places, gradients.values(), strict=True):
        assert torch.allclose(gradient, unshared.get_parameter(place).grad, atol=1e-10)


@pytest.mark.parametrize("size", [100, 3 * 2**13 + 5, 10_000_019])
def test_products_and_sketches_are_those_of_the_cpu(size):
    rows = [torch.randn(size) for _ in range(4)]
    moved = [row.cuda() for row in rows]
    ours, theirs = (inner_products({"w": r}, 4)["w"].cpu() for r in (moved, rows))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-7)
    sketch = CountSketch(1024)
    assert torch.allclose(sketch("w", moved[0]).cpu(), sketch("w", rows[0]), atol=1e-2)


def test_an_audit_on_a_gpu_leaves_no_trace_and_its_suggestions_are_exact(folded, batches, loss):
    model, data = folded.cuda(), [batch.cuda() for batch in batches]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.bfloat16):
        found = audit(model, data, loss, draws=20)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model(data[0]).logits
    for suggestion in found.suggestions:
        if suggestion.unsharing.kind == "low_rank":
            apply(model, suggestion)
            with torch.no_grad():
                assert torch.equal(model(data[0]).logits, logits)
