import gzip
import hashlib
import json

import numpy as np
import pytest

from weightshare import data
from weightshare.data import lookup
from weightshare.errors import UserError


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv("WEIGHTSHARE_DATA", raising=False)


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """A sample store of one file, apart from the real one."""
    (tmp_path / "word.txt").write_text("shared")
    digest = hashlib.sha256(b"shared").hexdigest()
    manifest = {"word": {"file": "word.txt", "sha256": digest}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(lookup, "SAMPLES", tmp_path)
    lookup._manifest.cache_clear()
    lookup._sample.cache_clear()
    yield tmp_path
    lookup._manifest.cache_clear()
    lookup._sample.cache_clear()


@pytest.mark.parametrize("name", data.known_samples())
def test_every_sample_is_whole_and_has_its_licence(name, no_folder):
    assert data.locate(name).stat().st_size > 0
    about = data.about(name)
    assert about["license"]
    assert about["source"]
    assert len((lookup.SAMPLES / about["license_file"]).read_text()) > 100


def test_a_path_comes_before_the_folder_before_the_sample(tmp_path, monkeypatch, samples):
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    monkeypatch.setenv("WEIGHTSHARE_DATA", str(home))
    monkeypatch.chdir(tmp_path)
    assert data.locate("word") == samples / "word.txt"
    (home / "texts" / "word.txt.gz").write_bytes(gzip.compress(b"x"))
    assert data.locate("word") == home / "texts" / "word.txt.gz"
    (tmp_path / "word").write_text("here")
    assert data.locate("word").resolve() == tmp_path / "word"


def test_a_changed_sample_is_refused(samples):
    (samples / "word.txt").write_text("shorn")
    with pytest.raises(UserError, match="sha256 differs"):
        data.locate("word")


def test_a_name_that_two_files_answer_to_is_refused(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "piqa.jsonl").write_text("{}")
    monkeypatch.setenv("WEIGHTSHARE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="not clear"):
        data.locate("piqa")
    assert data.locate("a/piqa") == tmp_path / "a" / "piqa.jsonl"


def test_unknown_names_are_told_what_is_known(no_folder):
    with pytest.raises(UserError, match=r"digits, .*pystdlib"):
        data.locate("nothing")


@pytest.mark.parametrize("name", ["weights.pkl", "model.pt", "OWNER/REPO:data.pickle"])
def test_pickles_are_refused_by_name(name, tmp_path):
    with pytest.raises(UserError, match="pickled"):
        data.locate(name, allow_hub=True)


def test_the_hub_is_asked_only_where_it_is_allowed(monkeypatch, tmp_path, no_folder):
    import huggingface_hub

    asked = []

    def download(repository, file, **options):
        asked.append((repository, file, options))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="not allowed"):
        data.locate("owner/texts@v2:train.txt")
    assert not asked
    assert data.locate("owner/texts@v2:train.txt", allow_hub=True) == tmp_path / "train.txt"
    assert asked == [("owner/texts", "train.txt", {"repo_type": "dataset", "revision": "v2"})]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, no_folder):
    import huggingface_hub

    def download(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"could not be had from the hub \(no route\)"):
        data.locate("owner/texts:train.txt", allow_hub=True)


def test_digits_are_all_there():
    digits = data.load_digits()
    assert digits.images.shape == (1797, 8, 8)
    assert digits.images.max() == 1.0
    # The published counts of the ten classes in this part of the set.
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
