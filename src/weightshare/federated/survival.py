"""What of a strategy survives a killed server: its checkpoint, written whole or not at all."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from weightshare.errors import UserError
from weightshare.federated.audit_log import AuditLog
from weightshare.federated.conduct import Conduct
from weightshare.federated.config import ReputationConfig
from weightshare.federated.payout import Payout
from weightshare.federated.repeats import Repeats
from weightshare.federated.standing import Standing
from weightshare.federated.vectors import Vector
from weightshare.training import checkpoint

SCHEMA = 1
"""Version of the checkpoint's content."""
FREE = {"observe", "budget", "window", "quorum", "misses"}
"""Rules that are the operator's to change between sessions."""


class Server(Protocol):
    """What of a ``ReputationStrategy`` a checkpoint holds, and what a restart begins anew."""

    config: ReputationConfig
    folder: Path | None
    log: AuditLog
    initial: Vector
    server: Vector
    models: NDArray[np.float32]
    names: list[str]
    standing: Standing
    conduct: Conduct
    repeats: Repeats
    extra: dict[str, NDArray[Any]]
    _stale: set[str]
    _payout: Payout


def save(strategy: Server, folder: Path, keep: int, extra: Mapping[str, NDArray[Any]]) -> Path:
    """See ``ReputationStrategy.save``."""
    tensors = {"models": strategy.models, "server": strategy.server, "initial": strategy.initial}
    for kind, vectors in _by_name(strategy).items():
        tensors |= {f"{kind}/{name}": value for name, value in vectors.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items()}
    values = {
        "schema": SCHEMA,
        "rules": rules(strategy),
        "names": strategy.names,
        "standing": strategy.standing.state(),
        **strategy.conduct.state(),
    }
    packed = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    return checkpoint.save(folder, strategy.standing.round, packed, values, keep)


def restore(strategy: Server, folder: Path) -> int:
    """See ``ReputationStrategy.restore``."""
    checkpoint.sweep(folder)
    found = checkpoint.checkpoints(folder)
    if not found:
        return 0
    tensors, values = checkpoint.load(found[-1])
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{found[-1]} has schema {values.get('schema')} of a federation, this version reads "
            f"{SCHEMA}; go on with what wrote it."
        )
    models = tensors["models"].numpy()
    if models.shape[1] != len(strategy.initial) or values["rules"] != rules(strategy):
        raise UserError(
            f"{found[-1]} is of a federation with other rules or another model; resume with "
            "the options it was started with."
        )
    if strategy.names and values["names"] != strategy.names:
        raise UserError(
            f"{found[-1]} has the participants {', '.join(values['names'])}, the roster has "
            f"{', '.join(strategy.names)}; resume with the roster it was started with."
        )
    strategy.names = values["names"]
    strategy.models = kept(strategy.folder, models)
    strategy.server = tensors["server"].numpy()
    strategy.initial = tensors["initial"].numpy()
    strategy.standing = Standing.load(values["standing"])
    strategy.conduct.load(values)
    strategy.extra = {}
    for kind, vectors in (_by_name(strategy) | {"extra": strategy.extra}).items():
        vectors.clear()
        vectors |= {
            name.removeprefix(f"{kind}/"): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith(f"{kind}/")
        }
    strategy._stale = set(strategy.names)
    strategy._payout = Payout()
    strategy.log.add("restored", round=strategy.standing.round)
    return strategy.standing.round


def kept(folder: Path | None, models: NDArray[np.float32]) -> NDArray[np.float32]:
    """Everyone's model, ``(N, D)``, to write to: a file in ``folder``, or memory."""
    if folder is None:
        return models.copy()
    folder.mkdir(parents=True, exist_ok=True)
    file = np.memmap(folder / "models.f32", np.float32, "w+", shape=models.shape)
    file[:] = models
    return file


def _by_name(strategy: Server) -> dict[str, dict[str, Vector]]:
    return {"seen": strategy.repeats.seen, "paid": strategy.repeats.paid}


def rules(strategy: Server) -> dict[str, str]:
    """The rules that a checkpoint is bound to."""
    return {k: str(v) for k, v in asdict(strategy.config).items() if k not in FREE}
