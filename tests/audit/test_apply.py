import copy

import pytest
import torch
from models import Cropped, Looped, Recurrent, TiedHead, TwoModules, batch
from small_models import make
from torch import nn

from weightshare.audit import Unsharing, apply, audit, merge
from weightshare.audit.unsharing import KINDS
from weightshare.errors import UserError
from weightshare.sharing import size, tie

X = batch(rows=8, dtype=torch.float32)


def loss(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


class Blocks(nn.Module):
    """Three blocks that share their matrices and their norms."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)) for _ in range(3)
        )
        for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
            tie(self, [[f"blocks.{i}.{name}" for i in range(3)]])

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def suggestion(model, kind, rank=1):
    batches = [batch(seed, rows=8, dtype=torch.float32) for seed in range(6)]
    found = audit(model, batches, loss, rank=rank)
    return next(s for s in found.suggestions if s.unsharing.kind == kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Blocks, TwoModules, Looped, Recurrent])
def test_nothing_changes_before_the_first_step(make, kind):
    torch.manual_seed(0)
    model = make()
    advice = suggestion(model, kind)
    before, unique = model(X), size(model).unique
    changed = apply(model, advice)
    assert changed is model
    assert torch.equal(model(X), before)
    assert size(model).unique - unique == advice.added == advice.unsharing.added(make())
    assert torch.equal(copy.deepcopy(model)(X), before)
    assert torch.equal(model(X), before)  # a second forward counts its calls from the start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Blocks, Looped, Recurrent])
def test_the_groups_can_then_go_their_own_way(make, kind):
    torch.manual_seed(0)
    model = make()
    known = {id(p) for p in model.parameters()}
    apply(model, suggestion(model, kind))
    new = [p for p in model.parameters() if id(p) not in known]
    before = loss(model, X)
    gradients = torch.autograd.grad(before, new, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
    with torch.no_grad():
        for parameter, gradient in zip(new, gradients, strict=True):
            parameter -= 0.01 * (0 if gradient is None else gradient)
    assert loss(model, X) < before


def test_unshared_groups_keep_sharing_inside():
    model = Blocks()
    layer = audit(model, [X, X + 1], loss, suggestions=False).findings[0].layer
    groups = (("blocks.0", "blocks.2"), ("blocks.1",))
    apply(model, Unsharing("unshare", layer, groups))
    assert model.blocks[0][1].weight is model.blocks[2][1].weight
    assert model.blocks[0][1].weight is not model.blocks[1][1].weight


def test_a_training_step_of_one_copy_leaves_the_parent_and_the_other_copy_alone():
    torch.manual_seed(0)
    parent = nn.Sequential(Blocks(), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(parent.parameters())
    loss(parent, X).backward()
    optimizer.step()
    parent.eval()
    advice = suggestion(parent, "unshare")
    children = [apply(copy.deepcopy(parent), advice) for _ in range(2)]
    assert all(torch.equal(child(X), parent(X)) for child in children)
    before = [copy.deepcopy(m.state_dict()) for m in (parent, children[1])]
    moments = copy.deepcopy(optimizer.state_dict())
    theirs = torch.optim.Adam(children[0].parameters())
    children[0].train()
    loss(children[0], X).backward()
    theirs.step()
    for model, kept in zip((parent, children[1]), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(moments)
    stored = [{t.data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (parent, *children)]
    assert stored[0].isdisjoint(stored[1] | stored[2]) and stored[1].isdisjoint(stored[2])
    # one group of two still shares
    assert all(len({id(b[1].bias) for b in child[0].blocks}) == 2 for child in children)


def test_a_loop_with_weights_of_its_own_is_the_unrolled_loop():
    torch.manual_seed(0)
    model = Looped(depth=3).double()
    x = X.double()
    layer = audit(model, [x, x + 1], loss, suggestions=False).findings[0].layer
    groups = (("blocks.0#0", "blocks.0#2"), ("blocks.0#1",))
    apply(model, Unsharing("unshare", layer, groups))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    unrolled = Looped(depth=3, unshared=True).double()
    source = dict(model.blocks[0].named_parameters())
    with torch.no_grad():
        unrolled.inp.load_state_dict(model.inp.state_dict())
        for number, block in enumerate(unrolled.blocks):
            for name, parameter in block.named_parameters():
                path, _, leaf = name.rpartition(".")
                key = f"{path}.parametrizations.{leaf}"
                parameter.copy_(source[f"{key}.original"])
                if number == 1:
                    parameter += source[f"{key}.0.deltas.1.delta"]
    assert torch.allclose(model(x), unrolled(x), atol=1e-12)


def test_low_rank_deltas_can_be_merged():
    model = Blocks()
    apply(model, suggestion(model, "low_rank"))
    changed = [m for m in model.modules() if nn.utils.parametrize.is_parametrized(m)]
    for module in changed:
        with torch.no_grad():
            module.parametrizations.weight[0].b.normal_()
    out = model(X)
    merge(model)
    assert torch.equal(model(X), out)
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in model.modules())
    assert size(model).unique == 2 * 9 + 3 + 6  # two matrices, one bias, one norm


def test_low_rank_rows_span_the_measured_disagreement():
    torch.manual_seed(0)
    model = Blocks()
    advice = suggestion(model, "low_rank", rank=1)
    apply(model, advice)
    (delta,) = {
        m.parametrizations.weight[0]
        for m in model.modules()
        if nn.utils.parametrize.is_parametrized(m)
    }
    (direction,) = (r for name, r in advice.directions.items() if name.startswith("blocks.0.1"))
    assert torch.allclose(delta.a @ direction.T, delta.a.norm(dim=1, keepdim=True), atol=1e-5)


def test_checkpointed_loops_are_refused():
    torch.manual_seed(0)
    model = Looped()
    apply(model, suggestion(model, "scale"))
    model.checkpointing = True
    with pytest.raises(UserError, match="checkpointing"):
        loss(model, X).backward()


@pytest.mark.parametrize(("make", "message"), [(Cropped, "slices"), (TiedHead, "another module")])
def test_what_only_the_modules_code_can_do_is_refused(make, message):
    torch.manual_seed(0)
    model = make()
    batches = [batch(seed, rows=8, dtype=torch.float32) for seed in range(4)]
    found = audit(model, batches, lambda m, x: m(x).square().mean())
    advice = next(s for s in found.suggestions if s.unsharing.kind == "unshare")
    with pytest.raises(UserError, match=message):
        apply(model, advice)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_head_stays_untied_when_the_model_is_saved(kind, tmp_path):
    model = make("llama", blocks=2, tie_word_embeddings=True)
    batches = [torch.randint(0, model.config.vocab_size, (2, 8)) for _ in range(4)]
    found = audit(model, batches, lambda m, ids: m(input_ids=ids, labels=ids).loss)
    apply(model, next(s for s in found.suggestions if s.unsharing.kind == kind))
    before = model(batches[0]).logits
    merge(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert size(loaded).unique == size(model).unique
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.allclose(loaded(batches[0]).logits, before, atol=1e-6)


def test_a_second_action_on_the_same_weight_is_refused():
    torch.manual_seed(0)
    model = Blocks()
    first, second = suggestion(model, "scale"), suggestion(model, "low_rank")
    apply(model, first)
    with pytest.raises(UserError, match="one suggestion per shared weight"):
        apply(model, second)


def test_leaving_it_shared_does_nothing():
    model = Blocks()
    layer = audit(model, [X, X + 1], loss, suggestions=False).findings[0].layer
    keys = list(model.state_dict())
    apply(model, Unsharing("nothing", layer, (layer.users,)))
    assert list(model.state_dict()) == keys
