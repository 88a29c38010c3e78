"""A small random model with a tokenizer, saved as a person would have it, and a text."""

import random
import re
from pathlib import Path

import pytest
from small_models import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from weightshare.language import quiet

SENTENCE = "the weights of a network can serve more than one use and that is what we share here"
WORDS = re.findall(r"\w+", SENTENCE)


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n".join(" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(count))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n\f\n\n".join(sentences(30, seed) for seed in range(30)))
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text_file.read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    model = make(
        "llama", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0
    )
    with quiet():
        model.save_pretrained(folder)
    return folder
