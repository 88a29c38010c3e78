"""Keep keys, certificates, tokens and passwords out of everything a run leaves behind."""

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

REMOVED = "[removed]"

_ALWAYS = re.compile(
    "apikey|auth|authorization|bearer|cert|certfile|certificates?|certs|cookies?|credentials?|jwt|"
    "keyfile|passphrase|passwd|passwords?|pem|secrets?"
)
_KEY_OF = re.compile(
    "access|account|api|auth|ca|client|deploy|encryption|host|license|private|public|root|secret|"
    "server|signing|ssh|ssl|superlink|supernode|tls"
)
_TOKEN_OF_TEXT = re.compile(
    "bos|cls|eos|image|mask|max|min|new|num|pad|per|prompt|sep|special|stop|unk"
)
_PATTERNS = [
    re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL),
    re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA)[\w-]{12,}"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    re.compile(r"(?i)(?<=\bbearer )[\w.~+/=-]{8,}"),
    re.compile(r"(?<=://)[^\s/@]+(?=@)"),
    re.compile(r"(?i)(?<=[?&;]token=)[^\s&;]+|(?<=[?&;]key=)[^\s&;]+"),
    re.compile(r"(?i)(?<=[?&;]api_key=)[^\s&;]+|(?<=[?&;]password=)[^\s&;]+"),
]


@cache
def secret_name(name: str) -> bool:
    """Whether an option, field or environment variable of this name holds a secret.

    >>> [secret_name(n) for n in ("hf_token", "ssl-keyfile", "pad_token", "key_dim")]
    [True, True, False, False]
    """
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", snake) if word]
    if any(map(_ALWAYS.fullmatch, words)):
        return True
    while len(words) > 1 and words[-1] in {"file", "path", "env", "value"}:
        words.pop()
    *before, last = words or [""]
    owner = before[-1] if before else ""
    if last in {"token", "tokens"}:
        return bool(before or last == "token") and not _TOKEN_OF_TEXT.fullmatch(owner)
    return last in {"key", "keys"} and (not before or bool(_KEY_OF.fullmatch(owner)))


def redact(value: Any) -> Any:
    """Apply :func:`redact_text` to every text in JSON-like ``value``."""
    if isinstance(value, dict):
        return {redact_text(key): redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_options(value: Any, name: str = "") -> Any:
    """Redact a configuration: texts under a secret name go whole, whatever they look like.

    Numbers stay: ``max_tokens`` is a count. Tables and samples take :func:`redact` instead, where
    ``token`` is a word of a language.
    """
    if isinstance(value, dict):
        hidden = bool(name) and secret_name(name)
        return {
            redact_text(key): REMOVED if hidden else redact_options(item, key)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact_options(item, name) for item in value]
    return REMOVED if isinstance(value, str) and value and secret_name(name) else redact(value)


def redact_text(text: str) -> str:
    """Replace what has the form of a secret or is the value of a secret environment variable."""
    for pattern in _PATTERNS:
        text = pattern.sub(REMOVED, text)
    for secret in _environment_secrets():
        text = text.replace(secret, REMOVED)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line without the values of secret options (``--token X``, ``--key=X``)."""
    kept: list[str] = []
    hiding = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            hiding = secret_name(name) and not equals
        elif hiding:
            kept.append(REMOVED)
            continue
        named = bool(value) and re.fullmatch(r"[\w.-]+", name) is not None and secret_name(name)
        kept.append(f"{name}={REMOVED}" if named else redact_text(argument))
    return kept


def _environment_secrets() -> list[str]:
    # Shorter values are switches ("1", "true") that would blot out ordinary words.
    found = {v for name, v in os.environ.items() if len(v) >= 8 and secret_name(name)}
    return sorted(found, key=lambda value: (-len(value), value))
