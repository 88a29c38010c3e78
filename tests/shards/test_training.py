"""However a step is taken, its gradients are those of plain eager."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch
from shards.shard_models import adapted, layers, pools
from small_models import tokens
from torch import nn

from weightshare.shards.gather import Table, gather_all, gather_one


def gradients(model, x, prepare=lambda m: None, steps=1):
    model.train()
    prepare(model)
    for part in x.chunk(steps):
        loss = model(part, labels=part).loss
        (loss / steps).backward()
    return {key: pool.grad.clone() for key, pool in pools(model).items()}


def same(found, want, rtol=1e-4, atol=1e-5):
    assert found.keys() == want.keys()
    for key, grad in want.items():
        torch.testing.assert_close(found[key], grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"row_scale": "learned", "scale_by_use": True}])
def test_activation_checkpointing(reentrant, options):
    x = tokens(4)

    def checkpointed(model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    found = gradients(adapted(**options), x, checkpointed)
    same(found, gradients(adapted(**options), x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_takes_what_the_step_has_gathered(reentrant, monkeypatch):
    import weightshare.shards.store as store

    calls = []
    original = store.gather_one
    monkeypatch.setattr(store, "gather_one", lambda *a: calls.append(1) or original(*a))
    model = adapted()
    gradients(
        model,
        tokens(),
        lambda m: (
            m.enable_input_require_grads(),
            m.gradient_checkpointing_enable({"use_reentrant": reentrant}),
        ),
    )
    assert len(calls) == (2 * len(layers(model)) if reentrant else 0)


def test_accumulation_over_parts():
    x = tokens(4)
    same(gradients(adapted(), x, steps=2), gradients(adapted(), x))


def test_two_forward_passes_before_one_backward():
    x = tokens(4)
    model = adapted().train()
    first, second = model(x[:2], labels=x[:2]).loss, model(x[2:], labels=x[2:]).loss
    ((first + second) / 2).backward()
    same({k: p.grad for k, p in pools(model).items()}, gradients(adapted(), x))


def test_autocast_is_near_float32():
    x = tokens(4)
    model = adapted().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    want = gradients(adapted(), x)
    for key, pool in pools(model).items():
        assert pool.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(pool.grad.flatten(), want[key].flatten(), dim=0)
        assert cosine > 0.99, key


def test_equal_steps_have_equal_bits():
    x = tokens(4)
    first, second = gradients(adapted(), x), gradients(adapted(), x)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_gather_a_pool_and_step(monkeypatch):
    import weightshare.shards.store as store

    calls = {"all": 0, "one": 0}
    for name in calls:
        original = getattr(store, f"gather_{name}")

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(store, f"gather_{name}", counted)
    x = tokens()
    model = adapted()
    model(x, labels=x).loss.backward()
    assert calls == {"all": 14, "one": 0}
    with torch.no_grad():
        for pool in pools(model).values():
            pool.mul_(1)
    model.base_model.model(x)
    assert calls["one"] == 2 * len(layers(model))


def test_the_backward_of_a_pool_is_linear_in_its_modules():
    def node_inputs(count):
        """Elements that flow back into one pool from ``count`` modules."""
        sources = [{"x": torch.randperm(64)[:16]} for _ in range(count)]
        pool = nn.Parameter(torch.randn(64, 8))
        table = Table("x", 64, sources).prepare(pool.device)
        seen = []
        parts = gather_all(pool, table, torch.float32)
        parts[0].grad_fn.next_functions[0][0].register_prehook(lambda g: seen.append(g[0].numel()))
        sum(part.sum() for part in parts).backward()
        want = torch.zeros(64)
        for source in sources:
            want[source["x"]] += 1
        assert torch.equal(pool.grad, want[:, None].expand(64, 8))
        return sum(seen)

    assert node_inputs(64) == 2 * node_inputs(32)


def test_gathering_one_module_is_gathering_it_among_all():
    torch.manual_seed(0)
    pool = nn.Parameter(torch.randn(20, 4))
    sources = [{"x": torch.randperm(20)[:6].to(torch.int16)} for _ in range(3)]
    for scaled in (False, True):
        table = Table("x", 20, sources, scaled).prepare(pool.device)
        weight = torch.randn(6, 4)
        (whole,) = torch.autograd.grad(
            (gather_all(pool, table, torch.float32)[1] * weight).sum(), pool
        )
        scale = table.scale[table.span(1)] if scaled else None
        alone = gather_one(pool, sources[1]["x"], torch.float32, scale)
        (single,) = torch.autograd.grad((alone * weight).sum(), pool)
        assert torch.equal(whole, single)


@pytest.mark.slow
def test_the_compiled_model_has_no_graph_break_and_equal_gradients():
    torch._dynamo.reset()
    x = tokens(4)
    model = adapted(blocks=2).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x, labels=x).loss.backward()
    same({k: p.grad for k, p in pools(model).items()}, gradients(adapted(blocks=2), x))


WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from shards.shard_models import adapted, pools
from small_models import tokens
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
x = tokens(4)
part = x[2 * rank : 2 * rank + 2]
model = adapted().train()
parallel = DistributedDataParallel(model)
parallel(part, labels=part).loss.backward()
if rank == 0:
    torch.save({{k: p.grad for k, p in pools(model).items()}}, {out!r})
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one():
    with tempfile.TemporaryDirectory() as folder:
        tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        out = f"{folder}/gradients.pt"
        code = WORKER.format(tests=tests, store=f"{folder}/store", out=out)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(rank)})
            for rank in range(2)
        ]
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
        same(torch.load(out), gradients(adapted(), tokens(4)))
