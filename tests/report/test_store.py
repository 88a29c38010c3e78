"""Files are whole or absent; JSON is strict."""

import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightshare.errors import UserError
from weightshare.report import JSON, TENSORS, Memo, read_lines, recover, replacing, write_json
from weightshare.report.codecs import dumps, loads
from weightshare.report.store import append_line, cut_half_line, plain


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Color(Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    path: Path


def test_a_failing_writer_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("old")

    def write(fresh):
        fresh.write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), replacing(path) as fresh:
        write(fresh)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("before", ["absent", "file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_a_file_or_folder_replaces_whatever_was_there(tmp_path, before, after):
    path = tmp_path / "model"
    if before == "file":
        path.write_text("old")
    elif before == "folder":
        path.mkdir()
        (path / "old").write_text("old")
    with replacing(path) as fresh:
        if after == "file":
            fresh.write_text("new")
        else:
            fresh.mkdir()
            (fresh / "new").write_text("new")
    assert (path.read_text() if after == "file" else os.listdir(path)[0]) == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".old.model").mkdir()
    (tmp_path / ".old.model" / "weights").write_text("old")
    (tmp_path / ".new.model").mkdir()
    recover(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_leftovers_beside_a_whole_folder_are_removed(tmp_path):
    for name in ("model", ".old.model", ".new.model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    recover(tmp_path)
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "model"


def test_writers_that_append_a_missing_suffix_find_it_there(tmp_path):
    with replacing(tmp_path / "arrays.npz") as fresh:
        np.savez(fresh, a=np.arange(3))
    assert np.load(tmp_path / "arrays.npz")["a"].tolist() == [0, 1, 2]


def test_everything_a_result_holds_becomes_strict_json(tmp_path):
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -np.inf],
        "numpy": np.float32(0.5),
        "array": np.arange(4).reshape(2, 2),
        "bool": np.bool_(True),
        "tensor": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16, requires_grad=True),
        "scalar": torch.tensor(3),
        3: (1, 2),
        "set": {"b", "a"},
        "enum": Color.RED,
        "point": Point(1.0, Path("a/b")),
        "text": "naïve <script>",
    }
    write_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "nan": "NaN",
        "inf": ["Infinity", "-Infinity"],
        "numpy": 0.5,
        "array": [[0, 1], [2, 3]],
        "bool": True,
        "tensor": [1.5, "NaN"],
        "scalar": 3,
        "3": [1, 2],
        "set": ["a", "b"],
        "enum": "red",
        "point": {"x": 1.0, "path": "a/b"},
        "text": "naïve <script>",
    }
    assert float("Infinity") == np.inf  # the text is one that float() reads
    with pytest.raises(TypeError, match="object"):
        plain(object())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_the_json_of_stages_gives_back_what_it_was_given(value):
    strict(dumps(value))
    assert repr(loads(dumps(value))) == repr(value)


def test_the_json_codec_writes_that_json_as_utf8(tmp_path):
    JSON.write(tmp_path / "v.json", {"ü": float("inf")})
    assert (tmp_path / "v.json").read_bytes() == '{"ü": {"float": "inf"}}\n'.encode()
    assert JSON.read(tmp_path / "v.json") == {"ü": float("inf")}


def test_the_tensor_codec_keeps_dtypes_and_takes_views_and_shared_storage(tmp_path):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    value = {"t": base.T, "row": base[1], "same": base, "half": base.to(torch.bfloat16)}
    TENSORS.write(tmp_path / "v.safetensors", value)
    back = TENSORS.read(tmp_path / "v.safetensors")
    assert back.keys() == value.keys()
    for name, tensor in value.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_half_written_last_line_is_dropped_and_can_be_appended_after(tmp_path):
    path = tmp_path / "m.jsonl"
    append_line(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
    cut_half_line(path)
    append_line(path, {"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_line_that_did_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "m.jsonl"
    append_line(path, {"step": 1})
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from weightshare.errors import UserError\n"
        "from weightshare.report.store import append_line\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    append_line(Path(sys.argv[1]), {'step': 2, 'text': 'x' * 5000})\n"
        "except UserError:\n"
        "    append_line(Path(sys.argv[1]), {'step': 3})\n"
    )
    run_python(code, path)
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def run_python(code: str, *arguments: object) -> str:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_memo_computes_each_key_once_even_across_openings(tmp_path):
    calls = []

    def work(key):
        calls.append(key)
        return {"loss": np.float64(key[0]) / 3, "pair": (1, 2)}

    memo = Memo(tmp_path / "losses.jsonl")
    first = [memo((i, "x"), lambda i=i: work((i, "x"))) for i in (1, 2, 1)]
    with memo.path.open("ab") as file:
        file.write(b'{"key": "[3, ')
    again = Memo(tmp_path / "losses.jsonl")
    second = [again([i, "x"], lambda i=i: work((i, "x"))) for i in (1, 2, 3)]
    assert calls == [(1, "x"), (2, "x"), (3, "x")]
    assert first[0] == second[0] == {"loss": 1 / 3, "pair": [1, 2]}
    assert len(again) == 3


def test_what_a_memo_returns_does_not_change_what_it_knows(tmp_path):
    memo = Memo(tmp_path / "m.jsonl")
    memo("a", lambda: {"x": 1})["x"] = 5
    assert memo("a", lambda: None) == {"x": 1}


@pytest.mark.parametrize(
    "write",
    [
        "lambda p: p.write_bytes(bytes(10**6))",
        "lambda p: __import__('numpy').save(p, __import__('numpy').zeros(10**6))",
        "lambda p: TENSORS.write(p, {'a': __import__('torch').zeros(10**6)})",
    ],
    ids=["file", "numpy", "safetensors"],
)
def test_a_full_disk_is_one_sentence_for_every_writer(tmp_path, write):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from weightshare.errors import UserError\n"
        "from weightshare.report import TENSORS, replacing\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "try:\n"
        "    with replacing(Path(sys.argv[1]) / 'a.npy') as fresh:\n"
        f"        ({write})(fresh)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    message = run_python(code, tmp_path)
    assert "disk is full or a size limit" in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_writer_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a") as fresh:
        (fresh / "no" / "folder").write_text("x")
    with pytest.raises(UserError, match="own words"), replacing(tmp_path / "a"):
        raise UserError("own words")
