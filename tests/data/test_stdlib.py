import hashlib
import json

import pytest

from weightshare import data
from weightshare.data.stdlib import SEPARATOR
from weightshare.errors import UserError


@pytest.fixture
def library(tmp_path):
    """A small standard library with everything that must stay out."""
    root = tmp_path / "python"
    long = "x = 1  # a line of code\n" * 20
    for name in (
        "gzip.py", "json/__init__.py", "json/decoder.py", "asyncio/queues.py",
        "test/test_gzip.py", "unittest/tests/test_case.py", "site-packages/numpy/core.py",
        "encodings/cp037.py", "config-3.11-x86/build.py", "_sysconfigdata__linux.py",
        "sitecustomize.py",
    ):  # fmt: skip
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}\n{long}\f\nmore = 2\n")
    (root / "empty.py").write_text("")
    (root / "latin.py").write_bytes(b"# caf\xe9\n" + long.encode())
    return root


def test_only_the_librarys_own_modules_are_gathered(library):
    paths = {file.path for file in data.gather_sources(library)}
    assert paths == {"gzip.py", "json/__init__.py", "json/decoder.py", "asyncio/queues.py"}
    with_tests = {file.path for file in data.gather_sources(library, tests=True)}
    assert with_tests == paths | {"test/test_gzip.py", "unittest/tests/test_case.py"}


def test_a_new_file_moves_no_other(library):
    before = [file.path for file in data.gather_sources(library)]
    (library / "new.py").write_text("y = 3\n" * 100)
    after = [file.path for file in data.gather_sources(library)]
    assert [path for path in after if path != "new.py"] == before
    assert before != sorted(before)


def test_no_document_holds_the_mark_between_documents(library):
    assert not any("\f" in file.text for file in data.gather_sources(library))


def test_held_out_names_stay_out_of_training(library):
    held = data.about("pystdlib")["documents"]
    assert "gzip.py" in held
    train, rest = data.split_sources(data.gather_sources(library))
    assert "gzip.py" not in {file.path for file in train}
    assert {file.path for file in rest} == {"gzip.py"}


def test_the_corpus_on_disk_is_what_its_facts_say(library, tmp_path):
    facts = data.write_corpus(tmp_path / "corpus", library)
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text()) == facts
    for name in ("train", "heldout"):
        raw = (tmp_path / "corpus" / f"{name}.txt").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == facts[name]["sha256"]
        assert len(raw) == facts[name]["bytes"]
        assert len(raw.decode().split(SEPARATOR)) == facts[name]["documents"]
    assert facts["heldout"]["documents"] == len(data.about("pystdlib")["documents"])
    assert facts["heldout"]["sha256"] == data.about("pystdlib")["unpacked_sha256"]


def test_the_running_pythons_library_is_megabytes_of_text():
    files = data.gather_sources()
    assert sum(len(file.text) for file in files) > 4_000_000
    assert len({file.path for file in files}) == len(files)


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="No Python sources"):
        data.gather_sources(tmp_path)
