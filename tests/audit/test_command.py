"""``weightshare audit`` from the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weightshare.cli import main
from weightshare.folding import FoldPlan, fold
from weightshare.sharing import Gram, size

PLAN = FoldPlan(4, groups=((1, 2, 3),))


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
    return make("llama", blocks=4, tie_word_embeddings=False), fast


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
    fold(model, PLAN).save_pretrained(path)
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


def test_suggestions_can_come_from_a_trial(folded, text, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", text, "--batches", 4, "--batch-size", 2, "--sequence-length", 16]
    options += ["--probe", 1, "--probe-steps", 1, "--out", out]
    status = audit(folded, *options, "--trial", 5)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    found = json.loads((out / "summary.json").read_text())
    kinds = {row["do"].split(":")[0] for row in found["suggestions"]}
    assert {"private scales", "weights of their own", "low-rank deltas (rank 4)"} <= kinds
    assert {"suggested", "random"} == found["probe"]["gain"].keys()
    assert audit(folded, *options, "--trial", 5000, "--overwrite") == 2
    assert "--trial 5000" in capsys.readouterr().err
    options[3] = 3
    assert audit(folded, *options, "--trial", 5, "--overwrite") == 2
    assert "at least 4" in capsys.readouterr().err


def test_scales_come_first_and_copies_for_the_rest(folded, base, text, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", text, "--batches", 4, "--batch-size", 2, "--sequence-length", 16]
    options += ["--per", "tensor", "--trial", 5, "--scales-first", "--out", out, "--overwrite"]
    status = audit(folded, *options, "--budget", 100_000)
    assert status == 0, capsys.readouterr().err
    plan = FoldPlan.load(out / "plan.json")
    matrices = [n for n, p in base[0].model.layers[0].named_parameters() if p.ndim > 1]
    assert {d.parameter for d in plan.deltas if d.kind == "scale"} >= set(matrices)
    assert {d.kind for d in plan.deltas} <= {"scale", "own"}
    assert size(fold(base[0], plan)).unique <= size(fold(base[0], PLAN)).unique + 100_000
    capsys.readouterr()
    assert audit(folded, *options, "--budget", 3) == 2
    assert "private scales on every shared weight take" in capsys.readouterr().err
    assert audit(folded, *options) == 2
    assert "--budget too" in capsys.readouterr().err


def test_nothing_shared_ends_well_and_says_what_could_be(plain, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert audit(plain, "--data", text, "--batches", 2, "--batch-size", 2, "--out", out) == 0
    assert "no weight of this model is shared" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["shared_weights"] == 0 and summary["similar"]


def test_what_two_batches_cannot_say_is_null(folded, text, tmp_path):
    out = tmp_path / "run"
    options = ["--batches", 2, "--batch-size", 2, "--probe", 1, "--probe-steps", 1]
    assert audit(folded, "--data", text, *options, "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    (agreement,) = summary["agreement"].values()
    assert agreement["low"] is None and agreement["high"] is None
    assert summary["probe"]["rank_correlation"] is None and summary["probe"]["gain"]["random"]


def test_per_tensor_lists_every_matrix(folded, text, tmp_path):
    out = tmp_path / "run"
    audit(
        folded, "--data", text, "--batches", 3, "--batch-size", 2, "--per", "tensor", "--out", out
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["shared_weights"] == 7


def test_a_budget_becomes_a_plan_that_fold_carries_out(folded, base, text, tmp_path, monkeypatch):
    # All that would gain counts as beyond chance here: random models hardly disagree.
    monkeypatch.setattr("weightshare.sharing.splitting.unit_gram", forgiving)
    out = tmp_path / "run"
    short = ("--batches", 6, "--batch-size", 2, "--budget", 3000)
    assert audit(folded, "--data", text, *short, "--out", out) == 0
    plan = FoldPlan.load(out / "plan.json")
    assert plan.groups != ((0,), (1, 2, 3)) or plan.deltas
    assert 0 < size(fold(base[0], plan)).unique - size(fold(base[0], PLAN)).unique <= 3000


def forgiving(gram):
    """Users as far apart as can be, without noise: every split of them is advised."""
    measured = Gram(gram.labels)
    for _ in range(6):
        rows = torch.eye(len(gram.labels), dtype=torch.float64)
        rows[1:] = -rows[:1]
        measured.update({"w": dict(zip(gram.labels, rows, strict=True))})
    return measured


def test_a_killed_probe_resumes_without_repeating_trials(
    folded, text, tmp_path, capsys, monkeypatch
):
    from weightshare.audit import honesty

    trained, calls = honesty._trained, []

    def counted(*arguments):
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trained(*arguments)

    monkeypatch.setattr(honesty, "_trained", counted)
    out = tmp_path / "run"
    command = (
        folded, "--data", text, "--batches", 4, "--batch-size", 2, "--probe", 2,
        "--probe-steps", 2, "--out", out,
    )  # fmt: skip
    assert audit(*command) == 130
    assert "--resume" in capsys.readouterr().err
    assert audit(*command) == 2  # the folder holds a run
    assert audit(*command, "--resume") == 0
    assert len(calls) == 3 + (1 + 4 - 2)  # one shared layer and four trials, two were kept
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and "probe" in summary


def test_weights_that_are_not_finite_are_named(folded, text, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folded, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert audit(broken, "--data", text, "--batch-size", 2, "--out", tmp_path / "run") == 2
    assert "the loss is nan, not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1"], "--batches is 1"),
        (["--batch-size", "500"], "give more text"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--probe-steps", "0"], "--probe-steps is 0"),
        (["--probe-learning-rate", "0"], "--probe-learning-rate is 0"),
        (["--sketch", "3"], "--sketch is 3; give 0 or at least 8"),
        (["--sequence-length", "1"], "--sequence-length is 1"),
        (["--sequence-length", "999"], "made for 128 tokens"),
        (["--groups", "one"], "groups"),
        (["--per", "block"], "per"),
        (["--data", "/nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(folded, text, tmp_path, capsys, options, message):
    data = [] if "--data" in options else ["--data", text]
    status = audit(folded, *data, *options, "--out", tmp_path / "run")
    assert status == 2
    assert message in capsys.readouterr().err
