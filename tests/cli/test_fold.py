"""``weightshare fold`` as a person uses it: a whole run, and everything that can be wrong."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightshare.cli import main
from weightshare.folding import FoldPlan
from weightshare.language import quiet

QUICK = ["--calibration-sequences", "3", "--sequence-length", "24"]


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "fold"
    arguments = [
        "fold", str(model_folder), "--text", str(text_file), "--remove", "0.2", "--share", "2",
        "--cure-steps", "4", "--cure-batch-size", "2", "--refine", "swaps", "--out", str(out),
        *QUICK,
    ]  # fmt: skip
    assert main(arguments) == 0
    return out, arguments


def test_the_summary_holds_what_scripts_rely_on(finished):
    out, _ = finished
    facts = json.loads((out / "summary.json").read_text())
    assert facts["command"] == "fold" and facts["finished"] and facts["seconds"]["total"] > 0
    assert facts["parameters"]["after"] < facts["parameters"]["before"]
    assert 0 < facts["blocks"]["saved_fraction"] < 1
    assert facts["bytes"]["equal_dtype"]["after"] == 4 * facts["parameters"]["after"]
    assert {"before", "folded", "cured"} <= set(facts["loss"]) & set(facts["perplexity"])
    assert len(facts["removed"]) == 1 and facts["ranking"] == "greedy"
    assert facts["tokens_per_second"]["after"] > 0
    blocks = sorted([*facts["removed"], *(b for group in facts["groups"] for b in group)])
    assert blocks == list(range(6))
    splits = facts["documents"]
    seen = [set(splits[name]) for name in ("calibration", "train", "heldout")]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


def test_the_run_directory_is_complete(finished):
    out, _ = finished
    for name in ("config.yaml", "metrics.jsonl", "report.html", "environment.json", "plan.json"):
        assert (out / name).is_file(), name
    plan = FoldPlan.load(out / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert len(model.model.layers) == len(plan.remaining) == 5
    assert (out / "model" / "README.md").is_file()
    assert (out / "model" / "tokenizer.json").is_file()
    page = (out / "report.html").read_text()
    assert "What happened to each block" in page and "Three prompts" in page


def test_a_second_run_in_the_same_folder_is_refused_and_resuming_changes_nothing(finished, capsys):
    out, arguments = finished
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    before = (out / "model" / "model.safetensors").read_bytes()
    assert main([*arguments, "--resume"]) == 0
    assert (out / "model" / "model.safetensors").read_bytes() == before


def test_a_saved_plan_gives_the_same_model_without_ranking(finished, model_folder, text_file,
                                                           tmp_path):  # fmt: skip
    out, _ = finished
    arguments = [
        "fold", str(model_folder), "--text", str(text_file), "--plan", str(out / "plan.json"),
        "--cure-steps", "4", "--cure-batch-size", "2", "--out", str(tmp_path / "again"), *QUICK,
    ]  # fmt: skip
    assert main(arguments) == 0
    one, two = (
        AutoModelForCausalLM.from_pretrained(folder / "model")
        for folder in (out, tmp_path / "again")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_evaluate_and_export_take_a_folded_model(finished, model_folder, text_file, tmp_path,
                                                 capsys):  # fmt: skip
    out, _ = finished
    stock = tmp_path / "stock"
    assert main(["export", str(out), "--to", "stock", "--out", str(stock)]) == 0
    assert json.loads((stock / "config.json").read_text())["model_type"] == "llama"
    arguments = ["evaluate", str(out), "--against", str(stock), "--text", str(text_file)]
    assert main([*arguments, "--out", str(tmp_path / "e"), "--sequences", "4", "--no-speed"]) == 0
    facts = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert facts["loss"] == pytest.approx(facts["against"]["loss"], abs=1e-6)
    assert facts["parameters"] < facts["against"]["parameters"]
    assert main(["export", str(out), "--to", "stock", "--out", str(stock)]) == 2
    assert main(["export", str(tmp_path)]) == 2


def test_a_dry_run_writes_nothing(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "none"
    arguments = ["fold", str(model_folder), "--text", str(text_file), "--remove", "0.3"]
    assert main([*arguments, "--share", "2", "--dry-run", "--out", str(out), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    for word in ("unique parameters", "bytes", "memory", "time"):
        assert word in shown


def test_only_removing_gives_a_stock_checkpoint(model_folder, text_file, tmp_path):
    out = tmp_path / "shorter"
    arguments = ["fold", str(model_folder), "--text", str(text_file), "--remove-blocks", "2,4"]
    assert main([*arguments, "--cure-steps", "0", "--out", str(out), *QUICK]) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 4
    assert not (out / "model" / "modeling_folded.py").exists()


def refused(capsys, *arguments):
    status = main(["fold", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1, (status, lines)
    return lines[0]


def test_bad_input_gets_a_sentence(model_folder, text_file, tmp_path, capsys):
    good = [model_folder, "--text", text_file, "--out", tmp_path / "out", *QUICK]
    assert "Nothing to do" in refused(capsys, *good)
    assert "1.2" in refused(capsys, *good, "--remove", "1.2")
    assert "names block 9" in refused(capsys, *good, "--remove-blocks", "9")
    assert "more than once" in refused(capsys, *good, "--remove-blocks", "1,1")
    assert "removes all" in refused(capsys, *good, "--remove-blocks", "0,1,2,3,4,5")
    assert "separated by commas" in refused(capsys, *good, "--remove-blocks", "one")
    assert "group size" in refused(capsys, *good, "--share", "99")
    assert "cannot be reached" in refused(capsys, *good, "--target-params", "5")
    assert "at most 128" in refused(capsys, *good[:-1], "4096", "--remove", "0.2")
    plan = tmp_path / "plan.json"
    FoldPlan(9, removed=(1,)).save(plan)
    assert "9 blocks" in refused(capsys, *good, "--plan", plan)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no text" in refused(capsys, model_folder, "--text", empty, "--remove", "0.2").lower()
    short = tmp_path / "short.txt"
    short.write_text("a few words\n\n\f\n\nmore\n\n\f\n\nend")
    line = refused(capsys, model_folder, "--text", short, "--remove", "0.2", *QUICK)
    assert "fewer than one sequence" in line
    line = refused(capsys, model_folder, "--text", tmp_path / "no", "--remove", "0.2")
    assert "No data set" in line
    file = tmp_path / "file"
    file.write_text("x")
    assert "file" in refused(capsys, *good[:3], "--out", file / "run", "--remove", "0.2", *QUICK)
    assert not (tmp_path / "out").exists()


def test_damaged_models_get_a_sentence(model_folder, text_file, tmp_path, capsys):
    rest = ["--text", text_file, "--remove", "0.2", "--out", tmp_path / "out", *QUICK]
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(capsys, broken, *rest)
    other = shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    line = refused(capsys, other, *rest)
    assert "causal" in line or "bert" in line
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "config.json" in refused(capsys, bare, *rest)


def test_a_family_that_is_not_known_is_refused_by_name(text_file, model_folder, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = shutil.copytree(model_folder, tmp_path / "gpt2")
    (folder / "model.safetensors").unlink()
    with quiet():
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=300)
        GPT2LMHeadModel(config).save_pretrained(folder)
    line = refused(capsys, folder, "--text", text_file, "--remove", "0.5", "--out", tmp_path / "o")
    assert "gpt2" in line and "Llama" in line


@pytest.mark.slow
def test_onnx_holds_shared_weights_once_and_gives_the_same_logits(finished, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, _ = finished
    file = tmp_path / "model.onnx"
    assert main(["export", str(out), "--to", "onnx", "--out", str(file)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    session = onnxruntime.InferenceSession(str(file))
    for shape in ((1, 5), (3, 17)):
        ids = torch.randint(3, 200, shape)
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    unique = sum(parameter.nbytes for parameter in model.parameters())
    weights = onnx.load(str(file)).graph.initializer
    stored = sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights)
    assert unique <= stored < 1.1 * unique
