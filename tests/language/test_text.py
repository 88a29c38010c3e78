import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightshare.data import about
from weightshare.data.stdlib import SEPARATOR
from weightshare.errors import UserError
from weightshare.language import encode, pad, read_documents, split_documents, windows


def test_documents_are_what_stands_between_form_feeds(tmp_path):
    (tmp_path / "a.txt").write_text(SEPARATOR.join(["one\n\ntwo", "three", " \n", "four"]))
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo", "three", "four"]


def test_packed_and_plain_files_read_alike(tmp_path):
    raw = SEPARATOR.join(["naïve", "日本語"]).encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    rows = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in ["a\u2028b", "日本語"])
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert read_documents(tmp_path / "a.txt.gz") == read_documents(tmp_path / "a.txt")
    assert read_documents(tmp_path / "a.jsonl") == ["a\u2028b", "日本語"]
    assert read_documents(tmp_path / "a.jsonl.gz") == ["a\u2028b", "日本語"]


def test_a_folder_is_its_text_files_by_path(tmp_path):
    for name in ("b.py", "a/z.txt", "a/b.md", "skip.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_documents(tmp_path) == ["a/b.md", "a/z.txt", "b.py"]


@given(st.text(alphabet="a\n é", min_size=1, max_size=2000).filter(str.strip))
def test_the_pieces_of_an_undivided_text_give_it_back(text):
    from weightshare.language.text import _pieces

    pieces = _pieces(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_an_undivided_text_is_cut_where_paragraphs_end(tmp_path):
    paragraphs = [f"Paragraph {i} has a few words.\nAnd a second line.\n\n" for i in range(500)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    pieces = read_documents(tmp_path / "a.txt")
    assert 50 <= len(pieces) <= 100
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert "".join(pieces) == "".join(paragraphs)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9 is not UTF-8", "byte 0xe9 at position 3"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut short" * 100, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"words": 1}', "Line 2"),
        ("a.jsonl", b'{"text": 1}', "not a string"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_documents(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt"):
        read_documents(tmp_path / "none.txt")


def test_named_texts_are_the_shipped_sample_and_the_rest_of_the_library(monkeypatch, tmp_path):
    monkeypatch.delenv("WEIGHTSHARE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    heldout, train = read_documents("pystdlib"), read_documents("stdlib")
    assert len(heldout) == len(about("pystdlib")["documents"])
    assert len(train) > 200
    assert not set(heldout) & set(train)


@given(
    st.lists(st.integers(1, 50), min_size=3, max_size=60),
    st.floats(0.01, 0.9),
    st.floats(0.01, 0.9),
)
def test_splits_are_disjoint_complete_and_hold_out_the_end(sizes, heldout, calibration):
    documents = [f"{i}:" + "x" * size for i, size in enumerate(sizes)]
    splits = split_documents(documents, heldout, calibration)
    parts = (splits.calibration, splits.train, splits.heldout)
    assert all(parts)
    assert sorted([document for part in parts for document in part]) == sorted(documents)
    for name, where in splits.indices.items():
        assert getattr(splits, name) == [documents[i] for i in where]
    assert splits.indices["heldout"] == list(
        range(len(documents) - len(splits.heldout), len(documents))
    )


def test_the_last_tenth_of_equal_documents_is_held_out():
    splits = split_documents([f"document {i:03}" for i in range(100)])
    assert splits.indices["heldout"] == list(range(90, 100))
    assert len(splits.calibration) == 9
    assert np.ptp(np.diff(splits.indices["calibration"])) == 0


def test_too_few_documents_are_refused():
    with pytest.raises(UserError, match="2 document"):
        split_documents(["a", "b"])


def test_each_token_stands_for_the_bytes_it_decodes_to(tokenizer, text):
    ids, sizes = encode(tokenizer, [text])
    table = tokenizer.backend_tokenizer.id_to_token
    assert ids[-1] == tokenizer.eos_token_id
    assert sizes[-1] == 0
    # In a byte-level vocabulary every letter of a token stands for one byte.
    letters = [len(table(token)) for token in ids[:-1].tolist()]
    assert sizes.sum() == len(text.encode()) == sum(letters)
    # A character that is cut in two counts for its first token: totals agree at each boundary.
    whole = np.cumsum(sizes[:-1]) == np.cumsum(letters)
    assert whole.mean() > 0.8
    assert sum(sizes[:-1] == 0) >= 3


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=5))
def test_bytes_are_complete_whatever_the_text(tokenizer, documents):
    _, sizes = encode(tokenizer, documents)
    assert sizes.sum() == sum(len(text.encode()) for text in documents)
    assert (sizes >= 0).all()


def test_a_tokenizer_without_offsets_still_has_exact_totals(text):
    class Words:
        is_fast, eos_token_id = False, 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(word) for word in text.split()]}

    ids, sizes = encode(Words(), [text, "é"])
    assert len(ids) == len(text.split()) + 3
    assert sizes.sum() == len(text.encode()) + 2


@given(length=st.integers(2, 40), data=st.data())
def test_windows_count_every_target_once(tokenizer, text, length, data):
    stride = data.draw(st.integers(1, length))
    stream, sizes = encode(tokenizer, [text])
    got = windows(tokenizer, [text], length, stride=stride)
    # The same by a loop: a position is a target of the first window that predicts it.
    starts = list(range(0, len(stream) - length + 1, stride))
    if starts[-1] + length < len(stream):
        starts.append(len(stream) - length)
    covered, targets = 0, set()
    for row, start in enumerate(starts):
        assert got.input_ids[row].tolist() == stream[start : start + length].tolist()
        want = [start + k >= covered and k > 0 for k in range(length)]
        assert got.mask[row].tolist() == want
        places = [start + k for k in range(length) if want[k]]
        assert int(got.bytes[row]) == sizes[places].sum()
        assert targets.isdisjoint(places)
        targets.update(places)
        covered = start + length
    if stride < length:
        assert targets == set(range(1, len(stream)))
        assert int(got.bytes.sum()) == len(text.encode()) - sizes[0]
    assert got.tokens == len(targets)


def test_labels_are_ignored_where_the_mask_says_so(tokenizer, text):
    got = windows(tokenizer, [text], 16, limit=2)
    assert len(got) == 2
    assert torch.equal(got.labels == -100, ~got.mask)
    assert torch.equal(got.labels[got.mask], got.input_ids[got.mask])
    assert torch.equal(got[1:].input_ids, got.input_ids[1:])


@pytest.mark.parametrize(
    ("documents", "options", "says"),
    [
        ([], {"length": 8}, "empty"),
        ([""], {"length": 8}, "empty"),
        (["short"], {"length": 512}, "fewer than one sequence of 512"),
        (["long enough"], {"length": 1}, "at least 2"),
        (["long enough"], {"length": 4, "stride": 5}, "between 1 and the length"),
        (["long enough"], {"length": 4, "limit": 0}, "limit is 0"),
    ],
)
def test_text_that_gives_no_window_is_refused(tokenizer, documents, options, says):
    with pytest.raises(UserError, match=says):
        windows(tokenizer, documents, **options)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_logits_nor_loss(model, side):
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    batch = pad(rows, side=side, pad_id=3)
    with torch.no_grad():
        both = model(**batch)
        for row, ids in enumerate(rows):
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            seen = both.logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(seen, alone)
    assert batch["labels"][1].tolist().count(-100) == 3
    assert math.isfinite(both.loss)


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="no sequence"):
        pad([])


def test_a_tokenizer_without_an_end_joins_documents_bare(tokenizer):
    bare = SimpleNamespace(
        eos_token_id=None, is_fast=True, backend_tokenizer=tokenizer.backend_tokenizer
    )
    ids, _ = encode(bare, ["one", "two"])
    assert tokenizer.decode(ids.tolist()) == "onetwo"
