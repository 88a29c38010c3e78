"""``weightshare audit`` from the command line."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weightshare.cli import main
from weightshare.folding import FoldPlan, fold


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["tree", "river", "stone", "cloud", "bird", "night", "song", "road"]
    g = torch.Generator().manual_seed(0)
    documents = [
        " ".join(words[i] for i in torch.randint(8, (60,), generator=g).tolist()) for _ in range(40)
    ]
    path.write_text("\n\n\f\n\n".join(documents))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    words = ["<unk>", "tree", "river", "stone", "cloud", "bird", "night", "song", "road"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config), fast


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    model, tokenizer = base
    path = tmp_path_factory.mktemp("plain")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folded(base, tmp_path_factory):
    model, tokenizer = base
    path = tmp_path_factory.mktemp("folded")
    fold(model, FoldPlan(4, groups=((1, 2, 3),))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def audit(*arguments):
    return main(["audit", *map(str, arguments)])


def test_a_folded_model_is_audited_probed_and_reported(folded, text, tmp_path, capsys):
    out = tmp_path / "run"
    status = audit(
        folded, "--data", text, "--batches", 6, "--batch-size", 2, "--probe", 2,
        "--probe-steps", 2, "--budget", 200, "--out", out,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["command"] == "audit" and summary["finished"]
    assert summary["shared_weights"] == 1
    assert list(summary["agreement"]) == ["model.layers.{1,2,3}"]
    assert (
        summary["saved_parameters"]
        == summary["parameters"]["total"] - (summary["parameters"]["unique"])
    )
    assert {row["do"] for row in summary["suggestions"]} & {"private scales", "leave it shared"}
    assert "rank_correlation" in summary["probe"]
    assert "rank correlation of predicted and realised gain" in printed.out
    assert "model.layers" in (out / "report.html").read_text()


def test_nothing_shared_ends_well_and_says_what_could_be(plain, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert audit(plain, "--data", text, "--batches", 2, "--batch-size", 2, "--out", out) == 0
    assert "no weight of this model is shared" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["shared_weights"] == 0 and summary["similar"]


def test_per_tensor_lists_every_matrix(folded, text, tmp_path):
    out = tmp_path / "run"
    audit(
        folded, "--data", text, "--batches", 3, "--batch-size", 2, "--per", "tensor", "--out", out
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["shared_weights"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1"], "--batches is 1"),
        (["--batch-size", "500"], "give more text"),
        (["--per", "block"], "per"),
        (["--data", "/nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(folded, text, tmp_path, capsys, options, message):
    data = [] if "--data" in options else ["--data", text]
    status = audit(folded, *data, *options, "--out", tmp_path / "run")
    assert status == 2
    assert message in capsys.readouterr().err
