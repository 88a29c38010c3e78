"""A small folded language model, with batches and a loss."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from small_models import make

from weightshare.folding import FoldPlan, fold

sys.path.insert(0, str(Path(__file__).parent))  # for quadratics.py
sys.path.insert(0, str(Path(__file__).parents[1] / "sharing"))  # for models.py

PLAN = FoldPlan(6, removed=(2,), groups=((1, 3, 4),))


@pytest.fixture(scope="session")
def _folded_models():
    return {}


@pytest.fixture
def folded(_folded_models, request):
    """A model of six blocks, one removed and three shared, of the family asked for."""
    family = getattr(request, "param", "llama")
    if family not in _folded_models:
        _folded_models[family] = fold(make(family, tie_word_embeddings=True), PLAN)
    return copy.deepcopy(_folded_models[family])


@pytest.fixture(scope="session")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (4, 12), generator=generator) for _ in range(6)]


@pytest.fixture(scope="session")
def loss():
    return lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss
