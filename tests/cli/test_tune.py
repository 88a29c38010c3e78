"""``weightshare tune`` as a person uses it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weightshare.shards  # noqa: F401
from weightshare.cli import main
from weightshare.language import quiet, read_instructions

SHORT = ["--steps", "4", "--batch-size", "2", "--sequence-length", "24", "--shards", "2"]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "instruction": f"what is shared {i}",
            "response": "the weights of a network " * (i % 3 + 1),
        }
        for i in range(24)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tune"
    arguments = [
        "tune", str(model_folder), "--data", str(text_file), "--sweep", "1e-3,3e-2",
        "--out", str(out), *SHORT,
    ]  # fmt: skip
    assert main(arguments) == 0
    return out, arguments


def test_the_summary_holds_what_scripts_rely_on(finished):
    out, _ = finished
    facts = json.loads((out / "summary.json").read_text())
    assert facts["command"] == "tune" and facts["finished"] and facts["method"] == "mos"
    assert facts["parameters"]["trainable"] == 2 * 6 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert facts["file"]["bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert facts["seconds"]["per_step"] > 0
    assert facts["learning_rate"] == min((0.001, 0.03), key=lambda r: facts["sweep"][f"{r:g}"])


def test_the_adapter_is_peft_s_and_gives_the_loss_it_claims(finished, model_folder, text_file):
    from weightshare.language import load_model
    from weightshare.shards import read_data
    from weightshare.shards.tuning import evaluate_loss

    out, _ = finished
    facts = json.loads((out / "summary.json").read_text())
    source = load_model(model_folder)
    data = read_data(source.tokenizer, str(text_file), length=24, limit=8)
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert evaluate_loss(base, data.heldout) == pytest.approx(facts["loss"]["before"], rel=1e-5)
    model = PeftModel.from_pretrained(base, out / "adapter")
    assert evaluate_loss(model, data.heldout) == pytest.approx(facts["loss"]["after"], rel=1e-5)


def test_the_report_shows_curves_and_sizes(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    for words in ("Training and held-out loss", "Each rate", "Shards by their uses", "1,000 users"):
        assert words in page


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    out, arguments = finished
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_run_cut_short_resumes_to_the_same_bytes(model_folder, text_file, tmp_path, monkeypatch):
    import weightshare.training.loop as loop

    arguments = ["tune", str(model_folder), "--data", str(text_file), "--checkpoint-every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*arguments, *SHORT, "--out", str(whole)]) == 0
    original = loop.Loop._save

    def stop_after_two(self):
        original(self)
        if self.fitted.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_save", stop_after_two)
    assert main([*arguments, *SHORT, "--out", str(cut)]) == 130
    monkeypatch.setattr(loop.Loop, "_save", original)
    assert main([*arguments, *SHORT, "--out", str(cut), "--resume"]) == 0
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_processes_sweep_and_train_like_one(model_folder, instructions, tmp_path):
    """Adapter-only data parallel: half of every batch on each, one run directory, same adapter."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["tune", str(model_folder), "--data", str(instructions), *SHORT, "--batch-size", "4"]
    options += ["--sweep", "1e-3,1e-2", "--device", "cpu"]
    found = {}
    for name, how in (("one", []), ("two", launcher)):
        command = [sys.executable, *how, "-m", "weightshare", *options, "--out", tmp_path / name]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report:") == 1
        facts = json.loads((tmp_path / name / "summary.json").read_text())
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        found[name] = facts, adapter
    (one, adapter), (two, other) = found["one"], found["two"]
    assert two["finished"] and two["learning_rate"] == one["learning_rate"]
    assert two["loss"]["after"] == pytest.approx(one["loss"]["after"], abs=1e-4)
    for key, tensor in adapter.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", ["--rank", "3", "--dropout", "0.1"]),
        ("vera", ["--options", "r=8,projection_prng_key=5", "--target-modules", "q_proj"]),
        ("vblora", ["--options", "num_vectors=20,topk=2"]),
        ("unilora", ["--equivalent-rank", "0.5"]),
        ("miss", ["--rank", "2"]),
        ("prompt_tuning", []),
    ],
)
def test_other_methods_run_the_same_way(
    method, more, model_folder, instructions, tmp_path, monkeypatch
):
    out = tmp_path / method
    arguments = ["tune", str(model_folder), "--data", str(instructions), "--method", method]
    assert main([*arguments, *SHORT, "--packing", "--out", str(out), *more]) == 0
    facts = json.loads((out / "summary.json").read_text())
    assert facts["method"] == method and facts["data"]["kind"] == "instructions"
    assert (out / "adapter" / "adapter_config.json").is_file()


def test_prompts_are_read_and_not_learnt(model_folder, instructions):
    from weightshare.language import load_model
    from weightshare.shards import read_data

    tokenizer = load_model(model_folder).tokenizer
    rows = read_instructions(instructions)
    data = read_data(tokenizer, str(instructions), length=64)
    learnt = data.train["labels"] != -100
    assert len(data.train["labels"]) == 24 - 3 and len(data.heldout["labels"]) == 3
    text = tokenizer.decode(data.train["input_ids"][0][learnt[0]], skip_special_tokens=True)
    assert text.strip() == rows[1].response
    packed = read_data(tokenizer, str(instructions), length=64, packing=True)
    assert len(packed.train["labels"]) < 21
    assert packed.targets == data.targets
    lengths = packed.train["attention_mask"].sum(1)
    assert int(lengths.max()) <= 64 and int(lengths.sum()) == int(
        data.train["attention_mask"].sum()
    )


def test_a_chat_template_frames_what_is_read_and_learnt(model_folder, instructions, tmp_path):
    from transformers import AutoTokenizer

    from weightshare.shards import read_data

    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    arguments = ["tune", str(folder), "--data", str(instructions), "--out", str(out)]
    assert main([*arguments, *SHORT, "--sequence-length", "96"]) == 0
    assert json.loads((out / "summary.json").read_text())["loss"]["after"] > 0
    row = read_instructions(instructions)[1]
    data = read_data(AutoTokenizer.from_pretrained(folder), str(instructions), length=96)
    ids, labels = data.train["input_ids"][0], data.train["labels"][0]
    learnt = tokenizer.decode(ids[labels != -100])
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert learnt == f"{row.response}</assistant>"
    assert whole.startswith(f"<user>{row.prompt}</user><assistant>{learnt}")


def test_a_json_document_is_not_learnt_as_a_text(model_folder, tmp_path, capsys):
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 9))
    options = ["--data", str(tmp_path / "alpaca.json"), "--out", str(tmp_path / "x"), *SHORT]
    assert main(["tune", str(model_folder), *options]) == 2
    assert "write one row a line" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "nothing"
    arguments = ["tune", str(model_folder), "--data", str(text_file), "--out", str(out)]
    assert main([*arguments, *SHORT, "--dry-run", "--gradient-checkpointing"]) == 0
    assert not out.exists()
    assert "trained parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "magic"], "not a PEFT method"),
        (["--options", "depth=3"], "no option 'depth'"),
        (["--options", "depth"], "NAME=VALUE"),
        (["--rank", "99"], "at most 12"),
        (["--shards", "5"], "do not divide"),
        (["--private-rank", "3"], "from 0 to 2"),
        (["--equivalent-rank", "0.1"], "less than one whole vector"),
        (["--equivalent-rank", "0.5", "--method", "lora"], "whole ranks"),
        (["--sweep", "fast"], "learning rates separated by commas"),
        (["--sweep", "0"], "above 0"),
        (["--sequence-length", "4096"], "at most"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--target-modules", "nothing"], "some of down_proj"),
        (["--method", "poly"], "task_ids"),
        (["--method", "adalora"], "total_step"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--method", "prompt_tuning", "--sweep", "1e-3"], "off the model again"),
        (["--method", "vblora", "--options", "vector_length=7"], "does not fit"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    more, said, model_folder, text_file, tmp_path, capsys
):
    arguments = ["tune", str(model_folder), "--data", str(text_file), *SHORT, "--out"]
    assert main([*arguments, str(tmp_path / "x"), *more]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("weightshare:")]
    assert len(lines) == 1 and said in lines[0], lines
    # The corrected command must not meet a half-made run.
    assert not (tmp_path / "x").exists()
    assert torch.is_grad_enabled()


def test_a_shard_adapter_leaves_as_a_stock_lora_adapter(finished, model_folder, tmp_path, capsys):
    out, _ = finished
    assert main(["export", str(out), "--to", "lora", "--out", str(tmp_path / "lora")]) == 0
    kind = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"]
    assert kind == "LORA"
    ids = torch.randint(3, 200, (2, 12))
    logits = []
    for folder in (out / "adapter", tmp_path / "lora"):
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(model_folder)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(ids).logits)
    assert torch.allclose(*logits, atol=1e-5)
    assert main(["export", str(out), "--to", "lora", "--out", str(tmp_path / "lora")]) == 2
    assert main(["export", str(tmp_path), "--to", "lora", "--out", str(tmp_path / "x")]) == 2


def test_evaluate_takes_the_adapter_of_a_tune(finished, model_folder, text_file, tmp_path, capsys):
    """In a process of its own, where nothing has told PEFT of shard adapters."""
    out, _ = finished
    text = ["--text", str(text_file), "--sequences", "4", "--no-speed"]
    command = [sys.executable, "-m", "weightshare", "evaluate", str(model_folder), *text]
    command += ["--adapter", str(out), "--out", str(tmp_path / "e")]
    subprocess.run(command, check=True, capture_output=True)
    with_it = json.loads((tmp_path / "e" / "summary.json").read_text())
    alone = tmp_path / "alone"
    assert main(["evaluate", str(model_folder), *text, "--out", str(alone)]) == 0
    without = json.loads((alone / "summary.json").read_text())
    assert with_it["loss"] < without["loss"]
    assert with_it["parameters"] > without["parameters"]

    for arguments, says in (
        ([str(out)], "holds an adapter and no model"),
        ([str(model_folder), "--adapter", str(tmp_path)], "holds no adapter"),
        (["tiny", "--adapter", str(out)], "made for other modules"),
    ):
        capsys.readouterr()
        assert main(["evaluate", *arguments, *text, "--out", str(tmp_path / "x")]) == 2
        assert says in capsys.readouterr().err
