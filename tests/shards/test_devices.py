"""Layers on several devices; the whole life of an adapter on a GPU."""

import pytest
import torch
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model
from shards.shard_models import LINEARS, layers, pools
from small_models import make, tokens

from weightshare.shards import MosConfig, add_user

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OPTIONS = {"target_modules": LINEARS, "shards_per_vector": 2, "init_weights": False}


def spread_out():
    """A model whose first half lies on the GPU and whose second on the CPU."""
    model = make("llama")
    inner = model.model
    places = {inner.embed_tokens: "cuda", inner.rotary_emb: "cuda", inner.norm: "cpu"}
    places |= {layer: "cuda" if k < 3 else "cpu" for k, layer in enumerate(inner.layers)}
    places[model.lm_head] = "cpu"
    for module, device in places.items():
        module.to(device)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, to=device: (
                send_to_device(args, to),
                send_to_device(kwargs, to),
            ),
            with_kwargs=True,
        )
    return model


def adapted(base):
    torch.manual_seed(0)
    model = get_peft_model(base, MosConfig(**OPTIONS))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for pool in pools(model).values():
            pool.copy_(0.1 * torch.randn(pool.shape, generator=generator))
    return model


def step(model, device):
    x = tokens(3)
    logits = model(x.to(device)).logits
    logits.float().square().mean().backward()
    return logits.detach().cpu(), {k: p.grad.cpu() for k, p in pools(model).items()}


def test_layers_on_two_devices_use_one_pool(tmp_path):
    want, gradients = step(adapted(make("llama")), "cpu")
    model = adapted(spread_out())
    devices = {layer.get_base_layer().weight.device.type for layer in layers(model)}
    assert devices == {"cuda", "cpu"}
    assert {pool.device.type for pool in pools(model).values()} == {"cuda"}
    found, others = step(model, "cuda")
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(spread_out(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            back(tokens(3).to("cuda")).logits.cpu(), want, rtol=1e-3, atol=1e-4
        )
        model.merge_adapter()
        merged = model(tokens(3).to("cuda")).logits.cpu()
    torch.testing.assert_close(merged, want, rtol=1e-3, atol=1e-3)


def test_a_step_on_the_gpu_has_the_same_bits_twice():
    first, second = (step(adapted(make("llama").cuda()), "cuda")[1] for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_mixed_batch_is_trained_inside_a_cuda_graph():
    """Users of one public pool, one step recorded and replayed, against the same step eagerly."""
    x, names = tokens(4).cuda(), ["ann", "bob", "default", "ann"]

    def community():
        model = adapted(make("llama").cuda())
        add_user(model, "ann", init_weights=True)
        add_user(model, "bob", init_weights=True, index_seed=3)
        model.base_model.set_adapter(["default", "ann", "bob"])
        return model.eval()

    def gradients(model):
        loss = model(x, labels=x, adapter_names=names).loss
        trained = [
            pool for name in ("default", "ann", "bob") for pool in pools(model, name).values()
        ]
        return torch.autograd.grad(loss, trained)

    want = gradients(community())
    model = community()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(model)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(model)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
