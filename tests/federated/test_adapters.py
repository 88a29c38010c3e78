"""Only the adapter travels, and what arrives is what PEFT loads."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from small_models import make, tokens

import weightshare.shards
from weightshare.errors import UserError
from weightshare.federated import LocalConfig, ReputationConfig
from weightshare.federated.adapters import Adapter, NextToken
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import InProcessGrid, each_app
from weightshare.federated.local import LoopTraining
from weightshare.federated.participant import client_app
from weightshare.federated.strategy import ReputationStrategy

CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "mos": lambda: weightshare.shards.MosConfig(
        equivalent_rank=1, shards_per_vector=2, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip


def adapted(kind):
    base = make("llama", blocks=2)
    torch.manual_seed(3)
    return get_peft_model(base, CONFIGS[kind]())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_federation_of_adapters_ends_in_adapters_that_peft_loads(kind, tmp_path):
    model = adapted(kind)
    adapter = Adapter(model)
    initial, frozen = adapter.read(), model.get_base_model().lm_head.weight.clone()
    names = ["p1", "p2", "p3"]
    data = {n: (t := tokens(12, 16, seed=i), t.clone()) for i, n in enumerate(names)}
    config = LocalConfig(epochs=1, batch_size=4, learning_rate=1e-2, optimizer="adamw")
    training = LoopTraining(NextToken(model), data, config, adapter)
    apps = {name: client_app(name, training, len(initial), 12) for name in names}
    grid = InProcessGrid(names, each_app(apps))
    strategy = ReputationStrategy(initial, ReputationConfig(), layers=adapter.sizes)
    sent = []
    run_rounds(strategy, grid, None, 3, after=lambda *now: sent.append(now[2]))
    strategy.deliver(grid)
    # 4 bytes a weight of the adapter and a header of 128, nothing of the model under it.
    assert sent[0]["bytes-sent"] == 3 * (4 * len(initial) + 128)
    assert all(row["bytes-received"] == 3 * 4 * len(initial) for row in sent)
    assert 0 < len(initial) < sum(p.numel() for p in model.parameters()) / 5

    vectors = {name: strategy.model_of(name) for name in names}
    assert len({v.tobytes() for v in vectors.values()} | {initial.tobytes()}) == 4
    adapter.write(vectors["p2"])
    assert adapter.read().tobytes() == vectors["p2"].tobytes()
    batch = tokens(2, 10)
    with torch.no_grad():
        expected = model.eval()(batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama", blocks=2), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, expected)
    state = get_peft_model_state_dict(loaded)
    assert state.keys() == get_peft_model_state_dict(model).keys()
    assert torch.equal(model.get_base_model().lm_head.weight, frozen)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_vector_is_exactly_what_is_trained(kind):
    model = adapted(kind)
    adapter = Adapter(model)
    vector = adapter.read()
    assert sum(adapter.sizes) == len(vector)
    assert len(vector) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    draw = np.random.default_rng(0).standard_normal(len(vector)).astype(np.float32)
    before = model(tokens(1, 6)).logits
    adapter.write(draw)
    assert adapter.read().tobytes() == draw.tobytes()
    assert not torch.equal(model(tokens(1, 6)).logits, before)


def test_weights_outside_the_adapter_are_refused():
    model = adapted("lora")
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(UserError, match="the adapter alone"):
        Adapter(model)
    model = adapted("lora").to(torch.float16)
    with pytest.raises(UserError, match="float32"):
        Adapter(model)
