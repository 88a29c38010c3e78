"""The oracles again on a trained model: the one that ships."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightshare.folding import CureConfig, FoldPlan, GateConfig, fold, gated, rank, unfold
from weightshare.folding.curing import CureTask, depths_of
from weightshare.folding.families import block_sizes
from weightshare.language import cast, evaluate, load_model, quiet, read_documents, windows

PLAN = FoldPlan(12, removed=(4,), groups=((1, 2), (5, 6, 7), (10, 11)))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="fp32")


@pytest.fixture(scope="module")
def text(tiny):
    return windows(tiny.tokenizer, read_documents("pystdlib"), 96, limit=24)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_it_is_worth_folding(tiny):
    """Far below what xz -9e makes of the same text (1.803 bits a byte)."""
    held = windows(tiny.tokenizer, read_documents("pystdlib"), 512, limit=24)
    assert evaluate(tiny.model, held).bits_per_byte < 1.25
    assert len(tiny.model.model.layers) >= 12
    assert 2e6 < tiny.model.num_parameters() < 3e6
    assert tiny.license == "apache-2.0" and tiny.stored_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_removal_agree_bit_for_bit(tiny, text, dtype):
    model, ids = cast(copy.deepcopy(tiny.model), dtype), text.input_ids[:2]
    plain = logits(model, ids)
    with gated(model, [1.0] * 12, "hard"):
        assert torch.equal(logits(model, ids), plain)
    with gated(model, [float(block not in (0, 6)) for block in range(12)], "hard"):
        masked = logits(model, ids)
    assert torch.equal(masked, logits(fold(model, FoldPlan(12, removed=(0, 6))), ids))


def test_folding_unfolding_and_counting(tiny, text):
    ids = text.input_ids[:2]
    folded = fold(tiny.model, PLAN)
    assert torch.equal(logits(unfold(folded), ids), logits(folded, ids))
    assert torch.equal(logits(fold(tiny.model, FoldPlan(12)), ids), logits(tiny.model, ids))
    counted = sum(parameter.numel() for parameter in folded.parameters())
    assert counted == folded.num_parameters() == block_sizes(tiny.model).total(PLAN)


def test_saved_in_bfloat16_and_loaded_again(tiny, text, tmp_path):
    folded = cast(fold(tiny.model, PLAN), torch.bfloat16)
    with quiet():
        folded.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(again, text.input_ids[:2]), logits(folded, text.input_ids[:2]))
    assert again.block_ties == folded.block_ties
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - 2 * folded.num_parameters() < 64_000


def test_generation_with_and_without_a_cache(tiny, text):
    folded, ids = fold(tiny.model, PLAN), text.input_ids[:2, :20]
    options = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    plain = folded.generate(ids, use_cache=False, **options)
    assert torch.equal(folded.generate(ids, **options), plain)
    assert torch.equal(folded.generate(ids, cache_implementation="static", **options), plain)


@pytest.mark.parametrize("method", ["gates", "block_influence", "one_shot", "greedy", "coupling"])
def test_a_no_op_block_goes_first(tiny, text, method):
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.model.layers[5].self_attn.o_proj.weight.zero_()
        model.model.layers[5].mlp.down_proj.weight.zero_()
    ids = text.input_ids[:6]
    quick = GateConfig(steps=40, seeds=1, sequences=4)
    assert rank(model, ids, method, remove=1, gates=quick).order[0] == 5
    assert torch.equal(logits(fold(model, FoldPlan(12, removed=(5,))), ids), logits(model, ids))


def test_a_student_that_is_the_teacher_has_no_loss(tiny, text):
    config = CureConfig(cross_entropy=0.0)
    student = copy.deepcopy(tiny.model)
    task = CureTask(student, tiny.model, config, depths_of(student, tiny.model))
    losses = task({"input_ids": text.input_ids[:2], "mask": text.mask[:2]})
    assert abs(losses["kl"].sum.item()) < 1e-6 and abs(losses["tail1"].sum.item()) < 1e-6


def test_distances_prefer_neighbours_in_the_middle(tiny, text):
    """Block 0 of a trained model can stand for nobody."""
    from weightshare.folding.blocks import BlockLosses
    from weightshare.folding.planner import replacement_costs

    cost = replacement_costs(BlockLosses(tiny.model, text.input_ids[:4]), range(12), 2)
    pairs = {block: float(cost[block, block + 1]) for block in range(11)}
    assert max(pairs, key=pairs.__getitem__) in (0, 10)
    assert min(pairs, key=pairs.__getitem__) not in (0, 10)
