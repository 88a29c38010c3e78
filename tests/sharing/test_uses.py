import copy

import pytest
import torch
from models import Recurrent
from torch import nn

from weightshare.errors import UserError
from weightshare.sharing import find_shared, size, tie, untie


class Language(nn.Module):
    """Embedding, one block run ``depth`` times, head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.depth = depth

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(self.depth):
            x = torch.tanh(self.block(x))
        return self.head(x)


class Entangled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 5, 5))

    def shared_uses(self):
        return {"weight": {"3x3": lambda w: w[..., 1:4, 1:4], "5x5": lambda w: w}}


def tokens():
    return torch.tensor([[1, 2, 3]])


def test_tied_parameters_are_found_with_both_uses():
    model = Language()
    assert find_shared(model) == []
    tie(model, [["embedding.weight", "head.weight"]])
    (shared,) = find_shared(model)
    assert shared.name == "embedding.weight"
    assert [str(use) for use in shared.uses] == ["embedding.weight", "head.weight"]
    assert shared.saved == 28


def test_a_module_that_runs_three_times_has_three_uses_and_leaves_no_trace():
    model = Language(depth=3)
    model.train()
    before = torch.random.get_rng_state()
    found = find_shared(model, (tokens(),))
    assert {s.name: [str(u) for u in s.uses] for s in found} == {
        "block.weight": ["block.weight", "block.weight#1", "block.weight#2"],
        "block.bias": ["block.bias", "block.bias#1", "block.bias#2"],
    }
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_attention_runs_its_output_projection_as_often_as_itself():
    model = Recurrent()
    found = find_shared(model, (torch.randn(5, 3),))
    assert {s.name: len(s.uses) for s in found} == {
        f"layer.{name}": 3 for name, _ in model.layer.named_parameters()
    }
    assert size(model, (torch.randn(5, 3),)).saved == 2 * size(model.layer).unique


def test_one_module_under_several_names_counts_like_one_that_runs_several_times():
    block = nn.Linear(4, 4)
    registered = nn.Sequential(block, block, block)
    assert [s.uses for s in find_shared(registered)] == [
        s.uses for s in find_shared(registered, torch.zeros(1, 4))
    ]
    assert len(find_shared(registered)[0].uses) == 3


def test_a_declared_slice_is_a_use_of_the_whole_weight():
    (shared,) = find_shared(nn.Sequential(Entangled(), nn.Linear(2, 2)))
    assert [str(u) for u in shared.uses] == ["0.weight[3x3]", "0.weight[5x5]"]
    assert shared.saved == 2 * 2 * 3 * 3


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: m.to(torch.float64),
        lambda m: (m.load_state_dict(m.state_dict()), m)[1],
        lambda m: m.half().float(),
    ],
)
def test_ties_survive(change):
    model = Language()
    tie(model, [["embedding.weight", "head.weight"]])
    model = change(model)
    assert model.embedding.weight is model.head.weight
    assert list(model.state_dict()) == list(Language().state_dict())


def test_tie_then_untie_gives_equal_but_independent_parameters():
    model = Language()
    tie(model, [["embedding.weight", "head.weight"]])
    order = [name for name, _ in Language().named_parameters()]
    untie(model, ["head.weight"])
    assert torch.equal(model.embedding.weight, model.head.weight)
    assert model.embedding.weight.data_ptr() != model.head.weight.data_ptr()
    assert [name for name, _ in model.named_parameters()] == order


def test_untying_a_whole_group_keeps_the_original_at_the_first_name():
    model = Language()
    original = model.embedding.weight
    tie(model, [["embedding.weight", "head.weight"]])
    untie(model, ["embedding.weight", "head.weight"])
    assert model.embedding.weight is original
    tie(model, [["embedding.weight", "head.weight"]])
    untie(model, "head.weight")
    assert model.head.weight is not original


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["embedding.weight", "nothing.weight"]], "'nothing.weight'"),
        ([["embedding.weight", "block.weight"]], r"shape \(7, 4\) but 'block.weight'.*\(4, 4\)"),
        ([["block.weight", "block.weight"]], "'block.weight' is named 2 times"),
        (["embedding.weight", "head.weight"], "a list in a list"),
        ([[]], "a list in a list"),
        ([["embedding.weight", "head.weight"], ["head.weight"]], "'head.weight' is named 2 times"),
    ],
)
def test_bad_ties_are_refused_by_name_and_change_nothing(groups, message):
    model = Language()
    with pytest.raises(UserError, match=message):
        tie(model, groups)
    assert find_shared(model) == []


def test_ties_of_different_dtype_are_refused():
    model = Language()
    model.head.half()
    with pytest.raises(UserError, match="dtype"):
        tie(model, [["embedding.weight", "head.weight"]])


def test_untie_refuses_what_has_no_tie_or_no_second_place():
    with pytest.raises(UserError, match=r"'block\.weight' is not tied"):
        untie(Language(), ["block.weight"])
    block = nn.Linear(2, 2)
    with pytest.raises(UserError, match="several names"):
        untie(nn.Sequential(block, block), ["1.weight"])


def test_size_counts_unique_once_and_total_at_every_use():
    model = Language()
    plain = size(model)
    assert (plain.unique, plain.total) == (76, 76)
    tie(model, [["embedding.weight", "head.weight"]])
    tied = size(model)
    assert (tied.unique, tied.total, tied.saved) == (48, 76, 28)
    assert tied.bytes == 4 * 48
    # three runs of the block, 3 tokens: 3·2·3·16 for the block, 2·3·28 for the head
    ran = size(model, (tokens(),))
    assert (ran.total, ran.flops) == (76 + 2 * 20, 3 * 2 * 3 * 16 + 2 * 3 * 28)


def test_size_works_on_the_meta_device_and_in_half_precision():
    with torch.device("meta"):
        model = Language().to(torch.bfloat16)
    tie(model, [["embedding.weight", "head.weight"]])
    assert size(model).unique == 48
    assert size(model).bytes == 96


def test_parameters_on_one_storage_count_the_elements_they_cover_together():
    whole = torch.zeros(6, 6)
    model = nn.Module()
    model.a = nn.Parameter(whole[:4])  # rows 0-3
    model.b = nn.Parameter(whole[2:])  # rows 2-5: two rows overlap
    model.c = nn.Parameter(whole[:, 0])  # a column of both
    assert size(model).unique == 36
    assert size(model).total == 24 + 24 + 6
    model.d = nn.Parameter(torch.zeros(1).expand(5))  # five elements, one stored
    assert size(model).unique == 37


def test_counting_leaves_buffers_and_modes_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    size(model, torch.randn(4, 3))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and not model[2].training
