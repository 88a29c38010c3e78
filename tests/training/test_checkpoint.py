"""A checkpoint is whole or not there."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from weightshare.errors import UserError
from weightshare.training import checkpoint


def test_tensors_and_values_come_back_bit_for_bit(tmp_path):
    whole = torch.randn(4, 6)
    tensors = {
        "a": whole,
        "tied": whole,
        "part": whole[1:3],
        "transposed": whole.T,
        "step": torch.tensor(3.0),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(3, dtype=torch.float64),
        "integers": torch.arange(4),
    }
    values = {"loss": 0.1 + 0.2, "list": [1, 2.5, None], "text": "ü"}
    path = checkpoint.save(tmp_path, 120, tensors, values)
    assert path.name == "step-00000120"
    loaded, again = checkpoint.load(path)
    assert again == values
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_tied_tensors_are_stored_once(tmp_path):
    big = torch.randn(1000)
    one = checkpoint.save(tmp_path / "one", 1, {"a": big}, {})
    two = checkpoint.save(tmp_path / "two", 1, {"a": big, "b": big}, {})
    size = lambda path: (path / checkpoint.TENSORS).stat().st_size  # noqa: E731
    assert size(one) == size(two)


def test_only_the_newest_are_kept_and_half_written_ones_are_swept(tmp_path):
    (tmp_path / ".step-00000007.writing").mkdir()
    (tmp_path / ".step-00000007.writing" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "step-notes").mkdir()
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=2)
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000010",
        "step-notes",
    ]
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [3, 10]


def test_writing_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, {"a": torch.zeros(1)}, {})
    path = checkpoint.save(tmp_path, 5, {"a": torch.ones(1)}, {})
    assert checkpoint.load(path)[0]["a"].item() == 1


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 5, {"a": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.VALUES])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "remove"])
def test_a_damaged_checkpoint_is_refused_and_its_file_named(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, 5, {"a": torch.randn(100)}, {"x": 1})
    file = path / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "flip" and name == checkpoint.TENSORS:
        file.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    elif damage == "flip":
        file.write_bytes(b"[" + content[1:])
    else:
        file.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    with pytest.raises(UserError, match=name) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 5, {"a": torch.zeros(1)}, {})
    content = json.loads((path / checkpoint.VALUES).read_text())
    (path / checkpoint.VALUES).write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(path)


@pytest.mark.parametrize("elements", [3000, 300])
def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(tmp_path, elements):
    """A limit on the size of files stands for the full disk: the write fails half way."""
    code = f"""
        import resource, sys, torch
        from pathlib import Path
        from weightshare.errors import UserError
        from weightshare.training import checkpoint
        folder = Path({str(tmp_path)!r})
        checkpoint.save(folder, 1, {{"a": torch.ones(10)}}, {{}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            # Either the tensors or the JSON beside them do not fit.
            checkpoint.save(folder, 2, {{"a": torch.ones({elements})}}, {{"text": "x" * 9000}})
        except UserError as error:
            print(error)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.count("\n") == 1 and "No room to write the checkpoint" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001")[0]["a"], torch.ones(10))
