"""Run ``weightshare`` and kill it (SIGKILL) at a given place.

    python killed_federation.py PLACE ARGUMENTS...

PLACE: ``asked:N`` when the messages of round N are made, ``judged:N`` when round N is aggregated
and not saved, ``half:N`` while the N-th checkpoint is being written, ``renamed:N`` right after it,
``never``.
"""

import os
import signal
import sys
from pathlib import Path

place, *arguments = sys.argv[1:]
where, _, number = place.partition(":")

import safetensors.torch  # noqa: E402

from weightshare.cli import main  # noqa: E402
from weightshare.federated.strategy import ReputationStrategy  # noqa: E402
from weightshare.training import checkpoint  # noqa: E402

counts: dict[str, int] = {}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def passed(kind: str) -> bool:
    counts[kind] = counts.get(kind, 0) + 1
    return where == kind and counts[kind] == int(number)


ask, judge, save = (
    ReputationStrategy.configure_train,
    ReputationStrategy.aggregate_train,
    checkpoint.save,
)


def asked(self, *rest):
    messages = ask(self, *rest)
    if passed("asked"):
        die()
    return messages


def judged(self, *rest):
    result = judge(self, *rest)
    if passed("judged"):
        die()
    return result


def saved(folder, *rest, **options):
    if passed("half"):

        def cut(tensors, path, *more, **options):
            Path(path).write_bytes(b"half")
            die()

        safetensors.torch.save_file = cut
        checkpoint.save_file = cut
    result = save(folder, *rest, **options)
    if passed("renamed"):
        die()
    return result


ReputationStrategy.configure_train = asked
ReputationStrategy.aggregate_train = judged
checkpoint.save = saved
sys.exit(main(arguments))
