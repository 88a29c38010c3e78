"""A real model on real tasks, where both are on the machine: the figures are independent of us."""

import pytest

from weightshare.errors import UserError
from weightshare.language import load_model, model_path, read_task, zero_shot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    try:
        model_path("smollm2-135m")
        read_task("piqa")
    except UserError as missing:
        pytest.skip(str(missing))
    return load_model("smollm2-135m")


def test_smollm2_scores_what_an_independent_scorer_found(smollm2):
    """First 100 examples; accuracy, and accuracy by likelihood per character. Counts within one
    example: near ties fall either way with the order of summation."""
    published = {"piqa": (0.65, 0.69), "arc_easy": (0.49, 0.43), "copa": (0.62, 0.60)}
    scores = zero_shot(smollm2.model, smollm2.tokenizer, list(published), limit=100)
    for name, (acc, acc_norm) in published.items():
        assert scores[name].acc == pytest.approx(acc, abs=0.011)
        assert scores[name].acc_norm == pytest.approx(acc_norm, abs=0.011)


def test_smollm2_calls_itself_an_ordinary_model(smollm2):
    assert smollm2.license == "apache-2.0"
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert smollm2.path.suffix == ".gguf"
    smollm2.model.half().float()
