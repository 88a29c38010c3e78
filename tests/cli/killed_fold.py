"""Run ``weightshare`` and kill it (SIGKILL) at a given place.

    python killed_fold.py PLACE LOG ARGUMENTS...

PLACE: ``ranking:N`` in the N-th evaluation, ``cure:N`` in step N, ``checkpoint:N`` while the N-th
checkpoint is being written, ``model`` when half of the model's folder is there, ``never``.
LOG gets a line for every evaluation of the ranking and every step of the cure.
"""

import os
import signal
import sys
from pathlib import Path

place, log, *arguments = sys.argv[1:]
where, _, number = place.partition(":")

import torch  # noqa: E402

import weightshare.folding.card as card  # noqa: E402
from weightshare.cli import main  # noqa: E402
from weightshare.report.memo import Memo  # noqa: E402
from weightshare.training import checkpoint  # noqa: E402
from weightshare.training.gradient_update import GradientUpdate  # noqa: E402

torch.set_num_threads(1)
counts: dict[str, int] = {}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note(kind: str, name: str) -> None:
    counts[kind] = counts.get(kind, 0) + 1
    with Path(log).open("a") as file:
        file.write(f"{kind} {name}\n")
    if where == kind and counts[kind] == int(number or 1):
        die()


ask, apply, save, write = Memo.__call__, GradientUpdate.apply, checkpoint.save, card.save_model


def memo(self, key, compute):
    def noted():
        note("ranking", key)
        return compute()

    return ask(self, key, noted)


def step(self, tensors):
    note("cure", str(counts.get("cure", 0)))
    return apply(self, tensors)


def half_a_checkpoint(folder, *rest, **options):
    if where == "checkpoint":
        counts["checkpoint"] = counts.get("checkpoint", 0) + 1
        if counts["checkpoint"] == int(number):
            import safetensors.torch

            def cut(tensors, path, *more, **options):
                Path(path).write_bytes(b"half")
                die()

            safetensors.torch.save_file = cut
            checkpoint.save_file = cut
    return save(folder, *rest, **options)


def half_a_model(path, model, *rest, **options):
    if where == "model":
        Path(path).mkdir(exist_ok=True)
        model.config.save_pretrained(path)
        die()
    return write(path, model, *rest, **options)


Memo.__call__ = memo
GradientUpdate.apply = step
checkpoint.save = half_a_checkpoint
card.save_model = half_a_model
sys.exit(main(arguments))
