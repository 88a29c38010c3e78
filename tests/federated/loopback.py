"""A real deployment on this machine: SuperLink and SuperNodes over TLS, with authenticated nodes.

    python loopback.py FOLDER [--rounds 5]

Three nodes are registered and in the roster; a fourth has a key that nobody registered; a fifth is
registered but not in the roster. Everything (keys, certificates, logs, results) goes to FOLDER, and
every process that was started is stopped at the end.
"""

import argparse
import datetime
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec

from weightshare.federated.roster import fingerprint_of_file

BIN = Path(sys.executable).parent
RUN = {"data": "digits", "participants": 3, "epochs": 1, "samples": 150, "seed": 0}


def private(key):
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())


def certificates(folder: Path) -> None:
    """A certificate authority, and a certificate of 127.0.0.1 that it has signed."""
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback authority")])
    me = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])

    def base(subject, public):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
        )

    authority = (
        base(ca, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA384())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    mine = (
        base(me, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    (folder / "ca.crt").write_bytes(authority.public_bytes(form.Encoding.PEM))
    (folder / "server.pem").write_bytes(mine.public_bytes(form.Encoding.PEM))
    (folder / "server.key").write_bytes(private(key))


def node_keys(folder: Path, name: str) -> None:
    """What ``ssh-keygen -t ecdsa -b 384`` makes."""
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    )
    (folder / f"{name}.pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def app(folder: Path, rounds: int) -> Path:
    """A Flower app that names ours."""
    home = folder / "app"
    (home / "loopback_app").mkdir(parents=True)
    (home / "loopback_app" / "__init__.py").write_text("")
    for part in ("server", "client"):
        (home / "loopback_app" / f"{part}.py").write_text(
            f"from weightshare.federated.apps import {part}\n\napp = {part}\n"
        )
    settings = RUN | {
        "rounds": rounds,
        "roster": str(folder / "roster.json"),
        "folder": str(folder / "server"),
        "observe": False,
        "readmit": "",
    }
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    (home / "pyproject.toml").write_text(
        f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "loopback-app"
version = "1.0.0"
description = "A federation on this machine."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "weightshare"

[tool.flwr.app.components]
serverapp = "loopback_app.server:app"
clientapp = "loopback_app.client:app"

[tool.flwr.app.config]
{lines}
"""
    )
    return home


def deploy(folder: Path, rounds: int = 5, seconds: float = 400) -> dict:
    """Run the federation; returns the server's result, and the states of the nodes as listed."""
    folder.mkdir(parents=True, exist_ok=True)
    certificates(folder)
    names = ["p01", "p02", "p03", "unregistered", "outside"]
    for name in names:
        node_keys(folder, name)
    roster = {name: fingerprint_of_file(folder / f"{name}.pub") for name in names[:3]}
    (folder / "roster.json").write_text(json.dumps(roster))
    port = free_port()
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "tls"\n\n[superlink.tls]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder / "ca.crt"}"\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    started = []

    def start(name, *command):
        log = (folder / f"{name}.log").open("wb")
        started.append(
            subprocess.Popen(
                [BIN / command[0], *map(str, command[1:])],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )

    def ask(*command):
        return subprocess.run(
            [BIN / "flwr", *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    until = time.monotonic() + seconds
    try:
        start(
            "superlink", "flower-superlink", "--ssl-ca-certfile", folder / "ca.crt",
            "--ssl-certfile", folder / "server.pem", "--ssl-keyfile", folder / "server.key",
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--database", folder / "state.db", "--port", port,
        )  # fmt: skip
        for name in ("p01", "p02", "p03", "outside"):
            while (done := ask("supernode", "register", folder / f"{name}.pub", "tls")).returncode:
                if time.monotonic() > until:
                    raise TimeoutError(done.stdout + done.stderr)
                time.sleep(1)
        for name in names:
            part = name if name in roster else "p01"
            start(
                name, "flower-supernode", "--root-certificates", folder / "ca.crt",
                "--superlink", f"127.0.0.1:{port}", "--auth-supernode-private-key",
                folder / f"{name}.key", "--node-config", f'participant="{part}"',
                "--port", free_port(),
            )  # fmt: skip
        ran = ask("run", app(folder, rounds), "tls")
        (folder / "run.log").write_text(ran.stdout + ran.stderr)
        if ran.returncode:
            raise RuntimeError(ran.stdout + ran.stderr)
        result = folder / "server" / "result.json"
        while not result.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"no result after {seconds} s; the logs are in {folder}")
            time.sleep(1)
        listed = ask("supernode", "list", "tls", "--format", "json")
        return {**json.loads(result.read_text()), "nodes": json.loads(listed.stdout)}
    finally:
        for process in reversed(started):
            try:
                os.killpg(process.pid, 15)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                process.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    found = parser.parse_args()
    print(json.dumps(deploy(found.folder.resolve(), found.rounds), indent=2))
