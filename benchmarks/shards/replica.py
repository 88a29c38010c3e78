"""What sharing shards buys at equal budget: the ladder from pure sharing to the full method.

    python benchmarks/shards/replica.py [--quick] [--preset r1|r2] [--budgets | --users]

A byte-level decoder is pre-trained on the running Python's standard library, frozen, and adapted to
another language (Perl modules, or what ``--target`` names). Every method takes the learning rate
that is best on watched text with seed 0; what is judged is other text. Seeds change the adapter's
start and the order of the text. Rows of equal budget train the same number of parameters; VeRA and
VB-LoRA cannot be brought to it and say what they train. ``r1``: 8 blocks of width 64, for a CPU.
``r2``: 12 blocks of width 512 in bfloat16, for a GPU. ``--budgets`` draws the curve of loss over
parameters instead of the ladder, also below LoRA of rank 1.

``--users``: each text file of the folder ``--target`` is a user, and what is judged is the mean of
the users' losses. A batch holds as many windows of each. What is compared at equal memory for all
users together: one adapter for everybody, an adapter for each, and a public pool for everybody with
a small part for each.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig
from peft.tuners import UniLoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import _users
from _sweep import fit, fuse_norms, put, show, summary, sweep, train_adapter
from _table import Table

from weightshare.data.stdlib import gather_sources
from weightshare.errors import UserError
from weightshare.language import next_token_loss, read_documents
from weightshare.report import replacing
from weightshare.shards import MosConfig
from weightshare.shards.methods import linear_targets
from weightshare.training import EpochBatches, LoopConfig, Losses, Place, Task, Term, held_out

PRESETS = {
    "r1": {"blocks": 8, "width": 64, "inner": 192, "length": 64, "base": 450, "batch": 16},
    "r2": {"blocks": 12, "width": 512, "inner": 1536, "length": 256, "base": 500, "batch": 32},
}
RATES = {
    "r1": (5e-3, 1e-2, 2e-2, 4e-2),
    "r2": (2e-3, 4e-3, 8e-3),
}
BUDGETS = (2, 1, 0.5, 0.25, 4, 8, 16)
PERL = "/usr/share/perl"
USER_BATCH = 4
"""Windows of each user in a batch."""
BESIDE = {"lora": "LoRA r=2", "full": "MoS, all four"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="r1")
    parser.add_argument("--budgets", action="store_true", help="the curve instead of the ladder")
    parser.add_argument("--users", action="store_true", help="many users instead of one")
    parser.add_argument("--base", type=Path, help="pre-trained base, made if it is not there")
    parser.add_argument("--source", type=Path, help="text the base learns")
    parser.add_argument("--target", type=Path, default=Path(PERL), help="text to adapt to")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="methods, separated by semicolons")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table(
        lambda o: (
            f"shards_{'users' if o.users else 'budgets' if o.budgets else 'replica'}_{o.preset}"
        ),
        __doc__,
        parser,
    )
    options = table.options
    size = PRESETS[options.preset]
    if table.quick:
        size = {**size, "width": 32, "inner": 64, "base": 8}
        options.steps, options.seeds = 6, 2
    bench = Bench(size, options)
    rates: dict[str, Sequence[float]]
    beside = _users.BESIDE if options.users else BESIDE
    if options.users:
        table_of_users = _users.users(list(bench.texts), shards=4, rate=RATES[options.preset][1])
        adapts = {name: adapt for name, (adapt, _) in table_of_users.items()}
        rates = {name: (rate, 2 * rate) for name, (_, rate) in table_of_users.items()}
    else:
        configs = budgets(bench) if options.budgets else ladder(bench)
        adapts = {name: put(config) for name, config in configs.items()}
        rates = dict.fromkeys(adapts, RATES[options.preset])
    if options.only:
        adapts = {name: adapts[name] for name in options.only.split(";")}
    elif table.quick:
        adapts = {name: adapts[name] for name in [*list(adapts)[:3], list(adapts)[-1]]}
    if table.quick:
        rates = {name: tried[:2] for name, tried in rates.items()}
    table.facts |= {"preset": options.preset, "steps": options.steps, "base": bench.base_losses}
    print(f"base: {bench.base_losses}", flush=True)
    runs = {name: partial(bench.run, adapt) for name, adapt in adapts.items()}
    sweep(table, runs, rates, options.seeds)
    table.facts["summary"] = summary(table.rows, adapts, options.seeds, beside, not table.quick)
    table.write()
    show(table.facts["summary"], beside)
    print(f"left out: {table.left_out}\nwritten to {table.file.name}")


def ladder(bench: "Bench") -> dict[str, Callable[[], Any]]:
    """The methods by name, in the order in which they are worth having."""
    blocks, budget = bench.size["blocks"], 2
    numbers = budget * bench.unit
    pure = {"rank": budget * blocks, "shards_per_vector": 1, "pair_dissociation": False}

    def mos(**more: Any) -> Callable[[], Any]:
        return partial(shards, **{"equivalent_rank": budget, "rank": 8, **more})

    return {
        "LoRA r=2": lora(2),
        "MoS, all four": mos(private_rank=1),
        "MoS": mos(),
        "pure sharing": mos(**pure),
        "pure sharing, random scaling": mos(**pure, row_scale="random"),
        "subset selection alone": mos(shards_per_vector=1, pair_dissociation=False),
        "all four but vector sharding": mos(private_rank=1, shards_per_vector=1),
        "all four but pair dissociation": mos(private_rank=1, pair_dissociation=False),
        "LoRA r=8 (4x parameters)": lora(8),
        "MoS, whole vectors": mos(shards_per_vector=1),
        "MoS, balanced": mos(index_strategy="balanced"),
        "MoS, scaled by use": mos(scale_by_use=True),
        "MoS, balanced, scaled by use": mos(index_strategy="balanced", scale_by_use=True),
        "MoS, pools by shape": mos(pool_scope="shape"),
        "MoS, one pool": mos(pool_scope="all"),
        "MoS, A 1 and B 3": mos(equivalent_rank=1, output_rank=3),
        "MoS, A 3 and B 1": mos(equivalent_rank=3, output_rank=1),
        "MoS, learned row scale": mos(row_scale="learned"),
        "VB-LoRA": lambda: VBLoRAConfig(
            r=4,
            num_vectors=90,
            vector_length=bench.size["width"] // 2,
            target_modules="all-linear",
        ),
        "VeRA": lambda: VeraConfig(r=256, target_modules="all-linear"),
        "Uni-LoRA": lambda: UniLoraConfig(r=8, theta_d_length=numbers, target_modules="all-linear"),
    }


def budgets(bench: "Bench") -> dict[str, Callable[[], Any]]:
    """LoRA, MoS and Uni-LoRA from a quarter of a rank to sixteen; the middle first."""
    found: dict[str, Callable[[], Any]] = {}
    for e in BUDGETS:
        rank = max(2, round(4 * e))
        fits = min(rank, int(e * bench.size["blocks"]))
        if e >= 1:
            found[f"LoRA r={e}"] = lora(int(e))
        found[f"MoS e={e:g}"] = partial(shards, equivalent_rank=e, rank=fits)
        found[f"MoS, whole vectors e={e:g}"] = partial(
            shards, equivalent_rank=e, rank=fits, shards_per_vector=1, index_strategy="balanced"
        )
        if e <= 2:
            found[f"Uni-LoRA e={e:g}"] = partial(
                UniLoraConfig,
                r=4,
                theta_d_length=round(e * bench.unit),
                target_modules="all-linear",
            )
    return found


def shards(**options: Any) -> MosConfig:
    usual = {"shards_per_vector": 4, "private_rank": 0, "target_modules": "all-linear"}
    return MosConfig(**{**usual, **options})


def lora(rank: int) -> Callable[[], Any]:
    return lambda: LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")


class Bytes(Task):
    """Next-byte loss of windows without padding; each with the adapter that is named for it."""

    def __init__(self, model: Any, names: list[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.named = {} if names is None else {"adapter_names": names}

    def forward(self, ids: Tensor) -> Losses:
        logits = self.model(input_ids=ids, **self.named).logits
        return {"cross_entropy": Term(*next_token_loss(logits, ids))}


@dataclass(frozen=True)
class Text:
    """Windows to learn from, to choose a learning rate by and to be judged on, (n, length)."""

    train: Tensor
    watched: Tensor
    judged: Tensor


class Bench:
    """The frozen base, the texts by user (or "all"), and one training run of adapters."""

    def __init__(self, size: Mapping[str, int], options: argparse.Namespace) -> None:
        self.size, self.options = size, options
        self.device = torch.device(options.device)
        length = size["length"]
        if options.source is None:
            source = "\n".join(
                file.text for file in gather_sources()[: 20 if options.quick else 600]
            )
        else:
            source = "\n".join(read_documents(options.source))
        self.source = byte_windows(source, length)
        if options.users:
            files = sorted(options.target.glob("*.txt"))
            self.texts = {file.stem: cut(read_target(file), length, 64) for file in files}
        else:
            most = 32 if options.quick else 256
            self.texts = {"all": cut(read_target(options.target), length, most)}
        self.share = USER_BATCH if options.users else size["batch"]
        self.base = self.pretrained(options.base)
        self.unit = sum(t.in_features + t.out_features for t in linear_targets(self.base))
        self.base_losses = {
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "source": self.loss(self.base, self.source[-256:]),
            "target": self.held_out(self.base, "judged"),
        }

    def pretrained(self, kept: Path | None) -> LlamaForCausalLM:
        size = self.size
        heads = max(4, size["width"] // 64)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=size["width"],
            intermediate_size=size["inner"],
            num_hidden_layers=size["blocks"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=size["length"],
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "causal"
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(self.device)
        if self.device.type == "cuda":
            fuse_norms(model)
        if kept is not None and kept.is_file():
            model.load_state_dict(load_file(kept), strict=False)
            return model.eval()
        rate = 4e-3 if size["width"] <= 64 else 1e-3
        loop = LoopConfig(steps=size["base"], learning_rate=rate, precision=self.precision)
        batch = 24 if size["width"] <= 64 else 64
        fit(Bytes(model), Batches([self.source[:-256]], batch, 0), loop, self.device)
        if kept is not None:
            with replacing(kept) as path:
                save_file(dict(model.named_parameters()), path)
        return model.eval()

    @property
    def precision(self) -> str:
        return "bf16" if self.options.preset == "r2" else "fp32"

    @property
    def place(self) -> Place:
        return Place(self.device, self.precision)

    def run(self, adapt: Callable[[Any], Any], rate: float, seed: int) -> dict[str, Any]:
        """Train one adapter, or those of all users; held-out losses in nats per byte."""
        torch.manual_seed(seed)
        begun = time.perf_counter()
        model = adapt(self.base)
        rows = None
        if self.options.users:
            _users.activate(model)
            rows = _users.adapters_of_rows(model, list(self.texts), self.share)
        trained = model.get_nb_trainable_parameters()[0]
        batches = Batches((text.train for text in self.texts.values()), self.share, seed)
        try:
            train_adapter(Bytes(model, rows), batches, self.options, self.place, rate, seed)
            watched, judged = (self.held_out(model, part) for part in ("watched", "judged"))
        except UserError:
            watched = judged = float("inf")
        model.base_model.unload()
        seconds = round(time.perf_counter() - begun, 2)
        return {"watched": watched, "judged": judged, "trained": trained, "seconds": seconds}

    def held_out(self, model: Any, part: str) -> float:
        """Mean over the users of the loss on their own text."""
        found = []
        for name, text in self.texts.items():
            if self.options.users and isinstance(model, PeftModel):
                model.set_adapter(_users.adapter_of(model, name))
            found.append(self.loss(model, getattr(text, part)))
        return sum(found) / len(found)

    def loss(self, model: Any, windows: Tensor) -> float:
        with torch.no_grad():
            return held_out(Bytes(model), windows.long().split(64), self.place)["loss"]


class Batches:
    """``batches[step]``: as many windows of every text, as token ids."""

    def __init__(self, texts: Iterable[Tensor], share: int, seed: int) -> None:
        self.parts = [EpochBatches(text, share, seed) for text in texts]

    def __getitem__(self, step: int) -> Tensor:
        return torch.cat([part[step] for part in self.parts]).long()


def cut(text: str, length: int, most: int) -> Text:
    """The last fifth is held out; at most so many windows of it to watch, as many to judge."""
    windows = byte_windows(text, length)
    held = len(windows) // 5
    rest = windows[-held:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
    count = min(most, len(rest) // 2)
    watched, judged = rest[order[:count]], rest[order[count : 2 * count]]
    return Text(windows[:-held], watched, judged)


def byte_windows(text: str, length: int) -> Tensor:
    """Bytes of a text, (n, length)."""
    data = np.frombuffer(text.encode(), np.uint8)
    count = len(data) // length
    return torch.from_numpy(data[: count * length].reshape(count, length).copy())


def read_target(path: Path) -> str:
    """The Perl modules under a folder, or a text."""
    if path.is_dir():
        files = sorted({file.resolve() for file in path.rglob("*.pm")})
        return "\n".join(file.read_text("utf-8", errors="replace") for file in files)[:2_000_000]
    return path.read_text("utf-8")


if __name__ == "__main__":
    main()
