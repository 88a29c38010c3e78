"""A small random model of every family that can be folded."""

import pytest
from small_models import FAMILIES, make
from transformers import PreTrainedModel


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return make(family)
