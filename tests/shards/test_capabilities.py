"""What the method can do, found out by doing it; quantised bases by a stand-in for a backend."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from weightshare.shards import MosConfig, layer, model


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.store(linear.weight.data)

    def store(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), False)

    def full(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return F.linear(x, self.full())


class Int8Backend(QuantizationBackend):
    layer_type, supports_merge, backend_name = "linear", True, "int8 for tests"

    def get_base_weight(self, base_layer):
        return base_layer.full()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().store(weight_data)

    def maybe_clone_base_result(self, x):
        return x.clone()


@pytest.fixture
def quantised(monkeypatch):
    def resolve(base_layer, **kwargs):
        return Int8Backend() if isinstance(base_layer, Int8Linear) else None

    sizes = layer._get_in_out_features

    def features(module):
        if isinstance(module, Int8Linear):
            return module.in_features, module.out_features
        return sizes(module)

    monkeypatch.setattr(layer, "resolve_quantization_backend", resolve)
    monkeypatch.setattr(model, "resolve_quantization_backend", resolve)
    monkeypatch.setattr(layer, "_get_in_out_features", features)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(*[Int8Linear(nn.Linear(16, 16)) for _ in range(4)])

    return make


def test_quantised_bases_train_merge_and_come_back(quantised, tmp_path):
    x = torch.randn(5, 16)
    base = quantised()
    want = base(x)
    config = MosConfig(
        target_modules=[str(i) for i in range(4)],
        pool_scope="shape",
        rank=6,
        init_weights=False,
        lora_alpha=1,
    )
    adapted = get_peft_model(base, config)
    pools = list(adapted.base_model.mos_pools.parameters())
    assert all(pool.dtype == torch.float32 for pool in pools)
    changed = adapted(x)
    changed.sum().backward()
    assert all(pool.grad is not None and pool.grad.any() for pool in pools)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), want)
    adapted.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(quantised(), tmp_path)
    assert torch.equal(back(x), changed)
    before = [m.full() for m in adapted.modules() if isinstance(m, Int8Linear)]
    deltas = [m.get_delta_weight("default") for m in adapted.base_model._layers()]
    adapted.merge_adapter()
    after = [m for m in adapted.modules() if isinstance(m, Int8Linear)]
    for old, delta, new in zip(before, deltas, after, strict=True):
        # Rounded to the grid of int8 again: half a step.
        assert ((old + delta - new.full()).abs() <= 0.501 * new.scale).all()
    adapted.unmerge_adapter()


def test_capabilities_hold_when_tried(tmp_path):
    """Each on the smallest model that shows it; the table in docs/shards.md follows this list."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    targets = {"target_modules": ["0", "1"], "pool_scope": "shape", "rank": 3}
    adapted = get_peft_model(
        base, MosConfig(**targets, init_weights=False, modules_to_save=["2"])
    ).eval()
    tried = {}
    adapted.add_adapter(
        "b", MosConfig(**targets, index_seed=1, modules_to_save=["2"], init_weights=False)
    )
    with torch.no_grad():
        first = adapted(x)
        adapted.set_adapter("b")
        tried["several adapters"] = not torch.equal(adapted(x), first)
        adapted.set_adapter("default")
        mixed = adapted(x, adapter_names=["default", "b", "__base__", "default"])
        tried["mixed batches"] = torch.allclose(mixed[0], first[0], atol=1e-6)
        saved = adapted.base_model.model[2].modules_to_save["default"]
        saved.weight.add_(1)
        tried["modules to save"] = not torch.equal(adapted(x), first)
        changed = adapted(x)
        adapted.merge_adapter()
        tried["merging"] = torch.allclose(adapted(x), changed, atol=1e-5)
        adapted.unmerge_adapter()
    tried["LoRA conversion"] = adapted.supports_lora_conversion()
    assert all(tried.values()), tried
