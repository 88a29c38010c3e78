"""A folded model is a Hugging Face model: saved, loaded elsewhere, refused by the stock class."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import FAMILIES, make, tokens
from transformers import AutoModelForCausalLM

from weightshare.folding import Delta, FoldPlan, fold
from weightshare.folding.families import block_sizes
from weightshare.language import quiet

# Groups touch blocks 1 and 10, 11: keys matched as prefixes would tie too much.
DEEP = FoldPlan(12, removed=(4,), groups=((1, 2), (3, 5, 6), (10, 11)))
DELTAS = replace(
    DEEP,
    deltas=(
        Delta("mlp.up_proj.weight", (5, 6), "low_rank", 2),
        Delta("self_attn.q_proj.weight", (6,), "scale"),
        Delta("mlp.down_proj.weight", (11,), "own"),
        Delta("lm_head.weight", (), "low_rank", 2),
    ),
)
SCRIPT = Path(__file__).with_name("load_elsewhere.py")


def save(folder, model, **options):
    ids = tokens()
    with torch.no_grad():
        logits = model(ids).logits
    with quiet():
        model.save_pretrained(folder, **options)
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    (folder / "logits.bin").write_bytes(logits.numpy().tobytes())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family, head tied and not, one file and sharded, folded and only shortened."""
    home, models = tmp_path_factory.mktemp("saved"), {}
    for family in FAMILIES:
        for tied in (True, False):
            model = make(family, blocks=12, tie_word_embeddings=tied)
            models[f"{family}-{'tied' if tied else 'untied'}"] = fold(model, DEEP)
        models[f"{family}-deltas"] = trained_a_little(
            fold(make(family, blocks=12, tie_word_embeddings=True), DELTAS)
        )
        models[f"{family}-shorter"] = fold(make(family, blocks=12), FoldPlan(12, removed=(0, 7)))
    for name, model in models.items():
        save(home / name, model)
    copies = {"llama-sharded": "llama-untied", "qwen2-deltas-sharded": "qwen2-deltas"}
    for name, source in copies.items():
        models[name] = models[source]
        save(home / name, models[name], max_shard_size="60KB")
    return home, models


def trained_a_little(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delta_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def loaded(how, home, cwd):
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(SCRIPT), how, *map(str, sorted(home.iterdir()))]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["with", "without"])
def test_a_new_process_loads_the_same_model(folders, how, tmp_path):
    home, models = folders
    found = loaded(how, home, tmp_path)
    for name, model in models.items():
        facts = found[name]
        assert facts["missing"] == facts["unexpected"] == [], name
        assert facts["equal"] and facts["tied"], name
        assert facts["parameters"] == model.num_parameters(), name
        if name.endswith("shorter"):
            # Removal alone leaves an ordinary checkpoint that the stock class loads.
            assert facts["class"] == type(model).__name__ and facts["ties"] == 0
            assert facts["stock"] == "loaded"
        else:
            assert facts["class"].startswith("Folded") and facts["ties"] > 0
            assert facts["stock"] != "loaded", f"{name}: the stock class made random blocks"


def test_only_shared_folders_carry_code(folders):
    home, _ = folders
    for folder in home.iterdir():
        assert (folder / "modeling_folded.py").exists() == (not folder.name.endswith("shorter"))


def test_files_hold_each_weight_once(folders):
    home, models = folders
    for name, model in models.items():
        size = sum(file.stat().st_size for file in (home / name).glob("*.safetensors"))
        unique = sum(p.nbytes for p in model.parameters())
        assert unique < size < unique + 64_000, name
    for name in ("llama-sharded", "qwen2-deltas-sharded"):
        assert len(list((home / name).glob("*.safetensors"))) > 1


def test_a_loaded_model_can_be_saved_and_loaded_again(folders, tmp_path):
    home, models = folders
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(home / "qwen3-untied")
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, models["qwen3-untied"](tokens()).logits)


def test_the_unfolded_depth_is_not_in_the_way_of_counting(folders):
    _, models = folders
    for family in FAMILIES:
        model = models[f"{family}-untied"]
        sizes = block_sizes(make(family, blocks=12, tie_word_embeddings=False))
        assert model.num_parameters() == sizes.total(DEEP)
        assert model.get_memory_footprint(return_buffers=False) == 4 * sizes.total(DEEP)


def generate(model, ids, **options):
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, **options)


CACHED = {
    "removed first block": ("llama", FoldPlan(6, removed=(0,), groups=((1, 2),))),
    "sliding windows": ("mistral", FoldPlan(6, removed=(3,), groups=((1, 2), (4, 5)))),
    "both kinds of attention in a group": ("qwen2", FoldPlan(6, groups=((1, 2, 3),))),
    "query and key norms": ("qwen3", FoldPlan(6, removed=(2,), groups=((0, 1), (3, 4)))),
    "only shortened": ("qwen2", FoldPlan(6, removed=(0, 4))),
}


@pytest.mark.parametrize("case", CACHED)
def test_generation_with_every_cache_equals_generation_without(case):
    family, plan = CACHED[case]
    model = fold(make(family), plan)
    ids = tokens(2, 9)
    ids[0, :3] = 0  # left padding
    plain = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), plain)
    assert torch.equal(generate(model, ids, cache_implementation="static"), plain)
    one = ids[1:]
    beams = {"num_beams": 3}
    assert torch.equal(
        generate(model, one, **beams), generate(model, one, use_cache=False, **beams)
    )
    assert torch.equal(
        generate(model, one, prompt_lookup_num_tokens=3), generate(model, one, use_cache=False)
    )


@pytest.mark.parametrize("case", CACHED)
def test_every_use_has_its_own_cache_slot_and_steps_match(case):
    family, plan = CACHED[case]
    model, ids = fold(make(family), plan), tokens(2, 14)
    with torch.no_grad():
        whole = model(ids).logits
        cache, steps = None, []
        for place in range(ids.shape[1]):
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert len(cache) == len(plan.remaining)
    assert {cache.get_seq_length(layer) for layer in range(len(cache))} == {14}
