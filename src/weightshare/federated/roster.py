"""Who may take part: names bound to the keys with which SuperNodes authenticate.

Reputation goes by these names, never by a node id, a partition id or anything a client says.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from weightshare.errors import UserError


def fingerprint(public_key: bytes) -> str:
    """SHA-256 of a public key as Flower stores it, in hexadecimal."""
    return hashlib.sha256(public_key.strip()).hexdigest()


def fingerprint_of_file(path: str | Path) -> str:
    """Fingerprint of a SuperNode's public key file (OpenSSH form, as ``ssh-keygen`` writes it).

    Raises:
        UserError: the file holds no such key.
    """
    from cryptography.hazmat.primitives import serialization as form

    try:
        key = form.load_ssh_public_key(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no public key ({error}); make one with: "
            "ssh-keygen -t ecdsa -b 384 -N '' -f node."
        ) from error
    # The form in which the SuperLink keeps it.
    return fingerprint(key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))


@dataclass(frozen=True)
class Roster:
    """Fingerprint of each participant's key, by name.

    Raises:
        UserError: no participants, an odd fingerprint, or one key for two names.
    """

    fingerprints: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.fingerprints:
            raise UserError("The roster is empty; give at least one participant and its key.")
        for name, value in self.fingerprints.items():
            if len(value) != 64 or set(value) - set("0123456789abcdef"):
                raise UserError(
                    f"The roster has {value!r} for {name}; give the key's SHA-256 as 64 "
                    "hexadecimal digits."
                )
        if len(set(self.fingerprints.values())) < len(self.fingerprints):
            raise UserError("Two participants of the roster have the same key; give each its own.")

    @classmethod
    def of_keys(cls, keys: Mapping[str, bytes]) -> "Roster":
        """From the public keys themselves."""
        return cls({name: fingerprint(key) for name, key in keys.items()})

    @classmethod
    def load(cls, path: str | Path) -> "Roster":
        """From a JSON file ``{"name": "fingerprint", ...}``.

        Raises:
            UserError: the file cannot be read or is not a roster.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            found = {str(name): str(value) for name, value in content.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not a roster ({error}); give a JSON object of names and fingerprints."
            ) from error
        return cls(found)

    def name_of(self, public_key: bytes) -> str | None:
        """The participant with this key; None where it is not in the roster."""
        wanted = fingerprint(public_key)
        return next((n for n, value in self.fingerprints.items() if value == wanted), None)


def online(
    grid: Grid, roster: Roster, minimum: int, wait: float, sleep: Callable[[float], None]
) -> list[tuple[int, str]]:
    """Nodes of the roster, in the order of names, once ``minimum`` are there or time is up."""
    deadline = time.monotonic() + wait
    while True:
        found: dict[str, int] = {}
        for node in grid.get_nodes():
            name = roster.name_of(node.public_key)
            if name is not None:
                found.setdefault(name, node.node_id)
        if len(found) >= minimum or time.monotonic() >= deadline:
            return [(found[name], name) for name in sorted(found)]
        sleep(1.0)
