"""Adapters of a language model, one domain of text for each participant."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel

from weightshare.cli import main
from weightshare.cli.models import open_model
from weightshare.errors import UserError
from weightshare.federated.domains import deal_domains, read_domains

SENTENCES = {
    "code": "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n\n",
    "tales": "Once upon a time there was a king who had three sons and a golden tree.\n\n",
    "sums": "Two apples and three apples are five apples, and half of them are eaten.\n\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in SENTENCES.items():
        (folder / f"{name}.txt").write_text("".join(f"{i}. {text}" for i in range(60)))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return open_model("tiny").tokenizer


def test_a_folder_and_json_lines_hold_the_same_domains(folder, tmp_path):
    found = read_domains(str(folder))
    assert list(found) == ["code", "sums", "tales"]
    lines = [json.dumps({"domain": d, "text": t}) for d, texts in found.items() for t in texts]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    assert read_domains(str(tmp_path / "all.jsonl")) == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"domain": "a", "text": "b"}', "1 domain"),
        ('{"text": "b"}', "Line 1"),
        ('{"domain": 3, "text": "b"}', "Line 1"),
    ],
)
def test_other_files_are_refused(content, said, tmp_path):
    (tmp_path / "all.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read_domains(str(tmp_path / "all.jsonl"))


def test_every_window_is_somebodys_and_nobody_has_anothers(folder, tokenizer):
    domains = read_domains(str(folder))
    dealt = deal_domains(domains, tokenizer, 16, adversaries=2, root=5, seed=1)
    parts = [*dealt.honest.values(), *dealt.adversaries.values(), dealt.root, dealt.test]
    whole = deal_domains(domains, tokenizer, 16)
    assert sum(len(ids) for ids, _ in parts) == sum(
        len(ids) for ids, _ in [*whole.honest.values(), whole.test]
    )
    windows = [tuple(row) for ids, _ in parts for row in ids.tolist()]
    every = [tuple(row) for ids, _ in [*whole.honest.values(), whole.test] for row in ids.tolist()]
    assert sorted(windows) == sorted(every)
    assert len(dealt.root[0]) == 5
    mean = np.mean([len(ids) for ids, _ in dealt.honest.values()])
    for ids, _ in dealt.adversaries.values():
        assert len(ids) == pytest.approx(mean / 2, abs=1.5)
    assert all(torch.equal(a, b) for a, b in zip(dealt.test, whole.test, strict=True))
    few = deal_domains(domains, tokenizer, 16, samples=12)
    assert [len(ids) for ids, _ in few.honest.values()] == [4, 4, 4]
    with pytest.raises(UserError, match="too few"):
        deal_domains(domains, tokenizer, 16, samples=3, adversaries=40)


OPTIONS = [
    "--model", "tiny", "--length", "24", "--samples", "24", "--epochs", "1", "--batch-size", "4",
    "--rounds", "2",
]  # fmt: skip


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "root", "x01"])
def test_a_domain_whose_name_is_taken_or_leads_elsewhere_is_refused(name, tmp_path):
    rows = [{"domain": d, "text": "words"} for d in ("plain", name)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="is called"):
        read_domains(str(file))


def test_files_are_domains_by_all_of_their_name(tmp_path):
    for name in ("en.books.txt", "en.wiki.txt"):
        (tmp_path / name).write_text("words")
    assert sorted(read_domains(str(tmp_path))) == ["en.books", "en.wiki"]
    (tmp_path / "en.wiki").mkdir()
    (tmp_path / "en.wiki" / "more.txt").write_text("words")
    with pytest.raises(UserError, match="two domains"):
        read_domains(str(tmp_path))


def test_a_domain_that_is_too_short_is_named(tokenizer):
    with pytest.raises(UserError, match="the domain 'short'"):
        deal_domains({"long": ["word " * 900], "short": ["word"]}, tokenizer, 32)


@pytest.mark.parametrize("adapter", ["lora", "mos"])
def test_the_command_ends_in_adapters_that_peft_loads(adapter, folder, tmp_path):
    out = tmp_path / "run"
    attack = ["--attack", "sign_flip", "--adversaries", "1", "--adapter", adapter]
    assert main(["federate", str(folder), *OPTIONS, *attack, "--out", str(out)]) == 0
    facts = json.loads((out / "summary.json").read_text())
    assert 0 < facts["loss"]["mean"] < 8 and 0 < facts["accuracy"]["mean"] < 1
    names = sorted(path.name for path in (out / "adapters").iterdir())
    assert names == ["code", "sums", "tales", "x01"]
    base = open_model("tiny", "fp32").model
    model = PeftModel.from_pretrained(base, out / "adapters" / "code")
    trained = sum(p.numel() for n, p in model.named_parameters() if adapter in n)
    assert trained > 0 and facts["bytes"]["received"] < 2 * 4 * (4 * trained + 2000)


def test_fedavg_and_trusted_text_run_too(folder, tmp_path):
    for strategy in (["fedavg"], ["fltrust", "--root-samples", "4"]):
        out = tmp_path / strategy[0]
        chosen = ["--strategy", *strategy, "--out", str(out)]
        assert main(["federate", str(folder), *OPTIONS, *chosen]) == 0
        assert json.loads((out / "summary.json").read_text())["gain"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--attack", "label_flip", "--adversaries", "1"], "labelled samples"),
        (["--partition", "power"], "labelled samples"),
        (["--length", "4096"], "at most 512"),
        (["--length", "1"], "--length is 1"),
    ],
)
def test_options_of_images_are_refused(more, said, folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--dry-run"]
    assert main(["federate", str(folder), "--model", "tiny", *more, *out]) == 2
    assert said in capsys.readouterr().err
