"""What sharing shards buys on a pretrained model: SmolLM2-135M learns to follow instructions.

    python benchmarks/shards/instructions.py --data dolly15k.jsonl.gz [--users] [--quick]

Every row adapts all linear layers (where it names none) on databricks-dolly-15k in the model's chat
form, packed to 512 tokens; only responses are learnt from. Every 20th row is held out: half of them
choose the learning rate of each method with seed 0, the other half are judged, in nats per response
token. Seeds change the adapter's start and the order of the data.

``--users``: the eight categories of the data are eight users, each judged on its own category, the
figure is their mean. A batch holds as many windows of each. What is compared at equal memory for
all users together: one adapter for everybody, an adapter for each, and a public pool for everybody
with a small part for each.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig
from peft.tuners import UniLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import _users
from _sweep import fuse_norms, put, show, summary, sweep, train_adapter
from _table import Table
from _users import Method

from weightshare.errors import UserError
from weightshare.language import encode_instructions, load_model
from weightshare.language.instructions import Instruction
from weightshare.language.text import IGNORED
from weightshare.report import replacing
from weightshare.shards import MosConfig
from weightshare.shards.methods import linear_targets
from weightshare.shards.tuning import _packed
from weightshare.training import EpochBatches, Losses, Place, Task, Term, held_out

LENGTH = 512
HELD_OUT = 20
BESIDE = {"lora2": "LoRA r=2", "small": "LoRA r=1 on q and v (e=0.19)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="dolly-15k as JSON lines")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=Path, help="tokenised data, made if it is not there")
    parser.add_argument("--users", action="store_true", help="eight users instead of one")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods, separated by semicolons")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table(lambda o: "shards_users" if o.users else "shards_instructions", __doc__, parser)
    options = table.options
    if options.data is None:
        print("not run: give dolly-15k as --data")
        return
    if table.quick:
        options.steps, options.seeds, options.batch = 2, 1, 8
    bench = Bench(options, 256 if table.quick else LENGTH, 80 if table.quick else None)
    beside = _users.BESIDE if options.users else BESIDE
    methods = _users.users(bench.names, shards=1, rate=1e-3) if options.users else single(bench)
    if options.only:
        methods = {name: methods[name] for name in options.only.split(";")}
    elif table.quick:
        methods = {name: methods[name] for name in [*list(methods)[:2], list(methods)[-1]]}
    table.facts |= {"steps": options.steps, "batch": options.batch, "data": bench.facts}
    print(bench.facts, flush=True)
    runs = {name: partial(bench.run, make) for name, (make, _) in methods.items()}
    rates = {
        name: (rate,) if table.quick else (rate, 2 * rate) for name, (_, rate) in methods.items()
    }
    sweep(table, runs, rates, options.seeds)
    table.facts["summary"] = summary(table.rows, methods, options.seeds, beside, not table.quick)
    table.write()
    show(table.facts["summary"], beside)
    print(f"left out: {table.left_out}\nwritten to {table.file.name}")


def single(bench: "Bench") -> dict[str, Method]:
    """One adapter for all the data, at budgets from eight ranks down to a tenth of one."""
    unit = bench.unit

    def mos(e: float, rank: int, rate: float, shards: int = 1, **more: Any) -> Method:
        config = {"equivalent_rank": e, "rank": rank, "shards_per_vector": shards, **more}
        return put(
            partial(MosConfig, **{"private_rank": 0, "target_modules": "all-linear", **config})
        ), rate

    def lora(rank: int, rate: float, targets: Any = "all-linear") -> Method:
        return put(partial(LoraConfig, r=rank, lora_alpha=16, target_modules=targets)), rate

    def uni(e: float, rate: float) -> Method:
        config = partial(
            UniLoraConfig, r=4, theta_d_length=round(e * unit), target_modules="all-linear"
        )
        return put(config), rate

    return {
        "LoRA r=2": lora(2, 1e-3),
        "LoRA r=1": lora(1, 1e-3),
        "MoS e=2": mos(2, 8, 2e-3),
        "MoS e=1": mos(1, 4, 2e-3),
        "MoS e=0.5": mos(0.5, 4, 2e-3),
        "MoS e=0.2": mos(0.2, 4, 4e-3),
        "LoRA r=1 on q and v (e=0.19)": lora(1, 2e-3, ["q_proj", "v_proj"]),
        "MoS e=0.1": mos(0.1, 3, 4e-3),
        "Uni-LoRA e=0.2": uni(0.2, 4e-3),
        "LoRA r=8": lora(8, 5e-4),
        "MoS e=2, 4 shards, private rank 1": mos(2, 8, 2e-3, 4, private_rank=1),
        "MoS e=0.2, 4 shards": mos(0.2, 4, 4e-3, 4),
        "MoS e=0.2, balanced": mos(0.2, 4, 4e-3, index_strategy="balanced"),
        "pure sharing e=2": mos(2, 60, 1e-3, pair_dissociation=False),
        "Uni-LoRA e=2": uni(2, 4e-3),
        "Uni-LoRA e=1": uni(1, 4e-3),
        "VeRA": (put(partial(VeraConfig, r=256, target_modules="all-linear")), 1e-2),
        "VB-LoRA": (
            put(
                partial(
                    VBLoRAConfig, r=4, num_vectors=90, vector_length=64, target_modules="all-linear"
                )
            ),
            4e-3,
        ),
    }


class Bench:
    """The frozen model, its windows, and one training run of an adapter."""

    def __init__(self, options: argparse.Namespace, length: int, most: int | None) -> None:
        self.options, self.device = options, torch.device(options.device)
        cuda = self.device.type == "cuda"
        source = load_model(options.model, dtype="bf16" if cuda else "fp32", device=self.device)
        self.base = source.model
        self.base.config._attn_implementation = "causal"
        self.base.config.use_cache = False
        fuse_norms(self.base)
        self.base.set_output_embeddings(Chosen(self.base.get_output_embeddings()))
        self.unit = sum(t.in_features + t.out_features for t in linear_targets(self.base))
        self.data = cut(source.tokenizer, options, length, most)
        self.names = sorted(self.data) if options.users else ["all"]
        self.precision = "bf16" if cuda else "fp32"
        self.place = Place(self.device, self.precision)
        self.facts = {
            "unit": self.unit,
            "windows": {name: len(part["train"]) for name, part in self.data.items()},
            "base": self.losses(self.base, "judged"),
        }

    def run(self, adapt: Callable[[Any], Any], rate: float, seed: int) -> dict[str, Any]:
        """Train one adapter, or those of all users; held-out losses in nats per response token."""
        torch.manual_seed(seed)
        begun = time.perf_counter()
        model = adapt(self.base)
        if self.options.users:
            _users.activate(model)
        trained = model.get_nb_trainable_parameters()[0]
        for layer in model.modules():
            # Autocast rounds a layer's input to bfloat16 anyway; PEFT would first widen it.
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = self.precision != "bf16"
        rows = None
        if self.options.users:
            share = self.options.batch // len(self.names)
            rows = _users.adapters_of_rows(model, self.names, share)
        task = Responses(model, rows)
        found: dict[str, Any] = {}
        took = 0.0
        try:
            took = train_adapter(
                task, Batches(self, seed), self.options, self.place, rate, seed, warmup=0.05
            )
            for part in ("watched", "judged"):
                by_user = self.losses(model, part)
                found[part] = sum(by_user.values()) / len(by_user)
        except UserError:
            found |= {"watched": float("inf"), "judged": float("inf"), "diverged": True}
        model.base_model.unload()
        seconds = {"seconds": time.perf_counter() - begun, "training_seconds": took}
        return found | {"trained": trained, **{k: round(v, 2) for k, v in seconds.items()}}

    def losses(self, model: Any, part: str) -> dict[str, float]:
        """Held-out loss of each user."""
        found = {}
        for name in self.names:
            pieces = [chosen(x, y) for x, y in rows_of(self.data[name], part)]
            task = Responses(model)
            if self.options.users and isinstance(model, PeftModel):
                model.set_adapter(_users.adapter_of(model, name))
            with torch.no_grad():
                found[name] = held_out(task, pieces, self.place)["loss"]
        return found


class Chosen(nn.Linear):
    """The output layer, at ``places`` of the flattened batch only: most tokens are read, not
    learnt, and their logits would be the largest tensors of a step."""

    places: Tensor | None = None

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        if self.places is None:
            return super().forward(hidden)
        return super().forward(hidden.flatten(0, 1).index_select(0, self.places))


class Responses(Task):
    """Loss of the response tokens; each row with the adapter that is named for it."""

    def __init__(self, model: Any, names: list[str] | None = None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        head = self.model.get_output_embeddings()
        head.places = batch["places"]
        named = {} if self.names is None else {"adapter_names": self.names}
        logits = self.model(input_ids=batch["ids"], **named).logits
        head.places = None
        loss = F.cross_entropy(logits.float(), batch["targets"], reduction="sum")
        return {"cross_entropy": Term(loss, (batch["targets"] >= 0).sum().float())}


class Batches:
    """``batches[step]``: windows of all users alike, with the places that are learnt from."""

    def __init__(self, bench: Bench, seed: int) -> None:
        share = bench.options.batch // len(bench.names)
        data = [bench.data[name] for name in bench.names]
        self.parts = [EpochBatches((d["ids"], d["train"]), share, seed) for d in data]
        # As many places in every batch, for the graph: those of the fullest.
        counts = [EpochBatches(d["train"][:, 1:].ge(0).sum(1), share, seed) for d in data]
        steps = range(bench.options.steps)
        self.most = max(sum(int(part[step].sum()) for part in counts) for step in steps)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        pairs = [part[step] for part in self.parts]
        ids, labels = (torch.cat(columns) for columns in zip(*pairs, strict=True))
        return chosen(ids, labels, self.most)


def chosen(ids: Tensor, labels: Tensor, most: int | None = None) -> dict[str, Tensor]:
    """A batch with the places whose next token is learnt, filled up to ``most``."""
    targets = F.pad(labels.long()[:, 1:], (0, 1), value=IGNORED).flatten()
    places = targets.ge(0).nonzero().flatten()
    missing = 0 if most is None else most - len(places)
    targets = F.pad(targets[places], (0, missing), value=IGNORED)
    return {"ids": ids.long(), "places": F.pad(places, (0, missing)), "targets": targets}


def rows_of(
    data: Mapping[str, Tensor], part: str, size: int = 32
) -> Sequence[tuple[Tensor, Tensor]]:
    ids, labels = data[f"{part}_ids"], data[f"{part}_labels"]
    return list(zip(ids.split(size), labels.split(size), strict=True))


def cut(
    tokenizer: Any, options: argparse.Namespace, length: int, most: int | None
) -> dict[str, dict[str, Tensor]]:
    """Windows by user (or "all"): ``ids``, labels ``train``, and those of both held-out parts."""
    kept = options.windows
    if kept is not None and kept.is_file():
        with np.load(kept) as arrays:
            held = {key: torch.from_numpy(arrays[key].astype(np.int32)) for key in arrays.files}
    else:
        held = {}
        with gzip.open(options.data, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if most is not None:
            rows = [row for row in rows if len(row["prompt"]) < 2 * length]
        for name in sorted({row["category"] for row in rows}):
            of = [row for row in rows if row["category"] == name][:most]
            for part, chosen_rows in parts(of).items():
                texts = [Instruction(row["prompt"], row["response"]) for row in chosen_rows]
                packed = _packed(encode_instructions(tokenizer, texts, length), length)
                ids = np.zeros((len(packed), length), np.uint16)
                labels = np.full((len(packed), length), IGNORED, np.int32)
                for line, (one, wanted) in enumerate(packed):
                    ids[line, : len(one)], labels[line, : len(one)] = one, wanted
                held[f"{name}/{part}/ids"] = torch.from_numpy(ids.astype(np.int32))
                held[f"{name}/{part}/labels"] = torch.from_numpy(labels)
        if kept is not None:
            with replacing(kept) as path, path.open("wb") as file:
                np.savez_compressed(file, **{key: value.numpy() for key, value in held.items()})
    names = sorted({key.split("/")[0] for key in held})
    titles = {"train": ("ids", "train")} | {
        part: (f"{part}_ids", f"{part}_labels") for part in ("watched", "judged")
    }
    data = {
        name: {
            title: held[f"{name}/{part}/{kind}"]
            for part, both in titles.items()
            for kind, title in zip(("ids", "labels"), both, strict=True)
        }
        for name in names
    }
    if options.users:
        return data
    columns = next(iter(data.values()))
    return {"all": {c: torch.cat([data[name][c] for name in names]) for c in columns}}


def parts(rows: list[Any]) -> dict[str, list[Any]]:
    """Every 20th row is held out, in turn to choose the rate and to be judged."""
    held = rows[::HELD_OUT]
    train = [row for number, row in enumerate(rows) if number % HELD_OUT]
    return {"train": train, "watched": held[::2], "judged": held[1::2]}


if __name__ == "__main__":
    main()
