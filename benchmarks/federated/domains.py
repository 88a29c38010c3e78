"""A federation of adapters: domains of text as participants, with and without an attacker.

    python benchmarks/federated/domains.py [--quick] [--minutes 20] [--device cpu]

Five domains (tales, plays, an encyclopaedia, stories for children, Python sources; all but the last
in WEIGHTSHARE_DATA) train an adapter of the model that ships, one epoch a round; the attacker has
text of all of them, half a share. ``loss`` is the mean of the honest participants on held-out text
of all domains, in nats per token; ``alone`` what they reach by themselves in as many epochs;
``adversary`` the attacker's own loss; ``untuned`` the model's before.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, found_or_leave

from weightshare.cli.federate import federation
from weightshare.data import locate
from weightshare.federated.config import FederateConfig
from weightshare.language import read_documents

SOURCES = {
    "tales": "grimm/grimms_fairy_tales",
    "plays": "tinyshakespeare/input",
    "encyclopaedia": "wikitext2/valid",
    "stories": "tinystories/v2_valid",
    "python": "pystdlib",
}
CHARACTERS = 60_000
"""Of each domain."""
STRATEGIES = ("fedavg", "reputation", "robust")
ATTACKS = ("none", "sign_flip", "free_rider")


def write_domains(file: Path) -> None:
    """All domains as JSON lines."""
    with file.open("w", encoding="utf-8") as lines:
        for domain, source in SOURCES.items():
            left = CHARACTERS
            for text in read_documents(locate(source)):
                lines.write(json.dumps({"domain": domain, "text": text[:left]}) + "\n")
                left -= len(text)
                if left <= 0:
                    break


def figures(config: FederateConfig, alone: dict[str, float] | None) -> dict[str, float | None]:
    """One federation; ``alone`` holds the losses where they are known."""
    here = federation(config)
    untuned = here.material.measure({"none": here.initial})["none"]["loss"]
    if alone is None:
        vectors = dict.fromkeys(here.honest, here.initial)
        for number in range(1, config.rounds + 1):
            vectors = here.training.train(vectors, number)
        alone = {n: row["loss"] for n, row in here.material.measure(vectors).items()}
    here.run()
    found = here.accuracies()
    removed = here.reputation.standing.expelled if here.reputation else {}
    return {
        "untuned": untuned,
        "alone": float(np.mean(list(alone.values()))),
        "loss": float(np.mean([found[name]["loss"] for name in here.honest])),
        "adversary": max((found[name]["loss"] for name in here.adversaries), default=None),
        "removed_adversaries": sum(name in here.adversaries for name in removed),
        "removed_honest": sum(name in here.honest for name in removed),
        "weights": len(here.initial),
        "alone_by_domain": alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    table = Table("federated_domains", __doc__, parser)
    torch.set_num_threads(1)
    rounds, samples, attacks = (2, 40, ATTACKS[:2]) if table.quick else (12, 200, ATTACKS)
    file = Path(tempfile.mkdtemp()) / "domains.jsonl"
    found_or_leave(lambda: write_domains(file))
    table.facts = {"setting": {"rounds": rounds, "samples": samples, "model": "tiny"}}
    for adapter in ("lora", "mos"):
        known: dict[int, dict[str, float]] = {}
        for attack in attacks:
            for strategy in STRATEGIES:
                count = int(attack != "none")
                config = FederateConfig(
                    str(file), model="tiny", adapter=adapter, length=64, rounds=rounds, epochs=1,
                    batch_size=8, samples=samples, attack=attack, adversaries=count,
                    strategy=strategy, device=table.options.device,
                )  # fmt: skip
                row = table.row(
                    f"{adapter}, {attack.replace('_', '-')}, {strategy}",
                    lambda c=config, n=count, k=known: figures(c, k.get(n)),
                )
                if row:
                    known[count] = row["alone_by_domain"]
    table.write()
    table.show(["untuned", "alone", "loss", "adversary", "removed_adversaries", "removed_honest"])


if __name__ == "__main__":
    main()
