"""Secrets stay out; ordinary words stay in."""

import pytest

from weightshare.report import redact, redact_arguments, redact_options, redact_text
from weightshare.report.redaction import secret_name

SECRET = """
token hf_token HF_TOKEN api-key apiKey OPENAI_API_KEY password db.password ssl_keyfile key
ssl-ca-certfile root_certificates auth_supernode_private_key client_secret AWS_SECRET_ACCESS_KEY
wandb_api_key auth_tokens token_file credentials session_cookie superlink_key
"""
ORDINARY = """
tokens max_tokens pad_token eos_token special_tokens key_dim keys_per_head query_key_norm seed
private_rank tokenizer monkey keyboard author certain tokens_per_second PWD
"""


@pytest.mark.parametrize("name", SECRET.split())
def test_names_of_secrets(name):
    assert secret_name(name)


@pytest.mark.parametrize("name", ORDINARY.split())
def test_names_of_ordinary_things(name):
    assert not secret_name(name)


PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("use hf_abcdefghijklmnopqrst now", "hf_abcdefghijklmnopqrst"),
        ("ghp_0123456789abcdef0123 x", "ghp_0123456789abcdef0123"),
        (f"a {PEM} b", "MIIEvQIBADANBg"),
        (PEM[:45], "MIIEvQIBADANBg"),
        ("https://ann:pa55word@host/x", "pa55word"),
        ("https://h/x?a=1&token=s3cr3t&b=2", "s3cr3t"),
        ("Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
    ],
)
def test_secrets_are_known_by_their_form(text, secret):
    assert secret in text
    assert secret not in redact_text(text)
    assert "[removed]" in redact_text(text)


def test_values_of_secret_environment_variables_go_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("MY_SERVICE_URL", "plain-and-public")
    text = "x correct-horse-battery y plain-and-public"
    assert redact([{"a": text}]) == [{"a": "x [removed] y plain-and-public"}]


def test_options_lose_secrets_by_name_and_keep_the_rest():
    options = {
        "token": "abc",
        "max_tokens": 512,
        "server": {"certificates": ["A", "B"], "port": 9092},
        "keys": {"ann": "k1"},
        "password": "",
        "token_file": None,
        "pad_token": "<pad>",
    }
    assert redact_options(options) == {
        "token": "[removed]",
        "max_tokens": 512,
        "server": {"certificates": ["[removed]", "[removed]"], "port": 9092},
        "keys": {"ann": "[removed]"},
        "password": "",
        "token_file": None,
        "pad_token": "<pad>",
    }


def test_a_table_of_words_keeps_its_token_column():
    assert redact([{"token": "the", "loss": 1.5}]) == [{"token": "the", "loss": 1.5}]


def test_command_lines_lose_the_values_of_secret_options():
    given = (
        "federate x --hf-token abc --rounds 3 --api-key=def --ssl-keyfile a b --out r k.password=p"
    )
    left = (
        "federate x --hf-token [removed] --rounds 3 --api-key=[removed] --ssl-keyfile [removed] "
        "[removed] --out r k.password=[removed]"
    )
    assert " ".join(redact_arguments(given.split())) == left
