"""What sharing shards buys at equal budget: the ladder from pure sharing to the full method.

    python benchmarks/shards/replica.py [--quick] [--preset r1|r2] [--source TEXT] [--target TEXT]

A byte-level decoder is pre-trained on the running Python's standard library, frozen, and adapted to
another language (Perl modules, or what ``--target`` names). Every method takes the learning rate
that is best on watched text with seed 0, out of four; what is judged is other text. Seeds change
the adapter's start and the order of the text. Rows of equal budget train the same number of
parameters; VeRA and VB-LoRA cannot be brought to it and say what they train. ``r1``: 8 blocks of
width 64, for a CPU. ``r2``: 12 blocks of width 512 in bfloat16, for a GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from peft.tuners import UniLoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.data.stdlib import gather_sources
from weightshare.errors import UserError
from weightshare.language import read_documents
from weightshare.shards import MosConfig
from weightshare.shards.methods import linear_targets
from weightshare.shards.tuning import TuneTask
from weightshare.training import Captured, EpochBatches, GradientUpdate, LoopConfig, held_out

PRESETS = {
    "r1": {"blocks": 8, "width": 64, "inner": 192, "length": 64, "base": 450, "batch": 16},
    "r2": {"blocks": 12, "width": 512, "inner": 1536, "length": 256, "base": 1500, "batch": 32},
}
RATES = (5e-3, 1e-2, 2e-2, 4e-2)
PERL = "/usr/share/perl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="r1")
    parser.add_argument("--source", type=Path, help="text the base learns")
    parser.add_argument("--target", type=Path, default=Path(PERL), help="text to adapt to")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="methods, separated by semicolons")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parsed, _ = parser.parse_known_args()
    table = Table(f"shards_replica_{parsed.preset}", __doc__, parser)
    options = table.options
    size = PRESETS[options.preset]
    if table.quick:
        size = {**size, "blocks": 4, "width": 32, "inner": 64, "base": 8}
        options.steps, options.seeds = 4, 2
    rates = RATES[1:3] if table.quick else RATES
    bench = Bench(size, options)
    table.facts |= {"preset": options.preset, "steps": options.steps, "base": bench.base_losses}
    print(f"base: {bench.base_losses}", flush=True)
    methods = ladder(bench)
    if table.quick:
        methods = {name: methods[name] for name in list(methods)[:3]}
    if options.only:
        methods = {name: methods[name] for name in options.only.split(";")}
    for name, make in methods.items():
        swept = {}
        for rate in rates:
            key = f"{name} | {rate:g} | 0"
            row = table.row(key, lambda make=make, rate=rate: bench.run(make, rate, 0))
            if row is not None:
                swept[rate] = row["watched"]
        if not swept:
            continue
        best = min(swept, key=swept.__getitem__)
        for seed in range(1, options.seeds):
            key = f"{name} | {best:g} | {seed}"
            table.row(key, lambda make=make, rate=best, seed=seed: bench.run(make, rate, seed))
        table.facts["summary"] = summary(table.rows, list(methods), options.seeds)
        table.write()
    show(table.facts["summary"])
    table.show(["judged"]) if table.quick else print(f"written to {table.file.name}")


def ladder(bench: "Bench") -> dict[str, Callable[[], Any]]:
    """The methods by name, in the order in which they are worth having."""
    blocks, budget = bench.size["blocks"], 2
    numbers = budget * bench.unit

    def mos(**more: Any) -> Callable[[], Any]:
        usual = {"equivalent_rank": budget, "rank": 8, "shards_per_vector": 4, "private_rank": 0}
        return lambda: MosConfig(target_modules="all-linear", **{**usual, **more})

    def lora(rank: int) -> Callable[[], Any]:
        return lambda: LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")

    pure = {"rank": budget * blocks, "shards_per_vector": 1, "pair_dissociation": False}
    return {
        "LoRA r=2": lora(2),
        "MoS": mos(),
        "pure sharing": mos(**pure),
        "MoS, private rank 1": mos(private_rank=1),
        "LoRA r=8 (4x parameters)": lora(8),
        "subset selection alone": mos(shards_per_vector=1, pair_dissociation=False),
        "pure sharing, random scaling": mos(**pure, row_scale="random"),
        "MoS, whole vectors": mos(shards_per_vector=1),
        "MoS, A and B paired": mos(pair_dissociation=False),
        "MoS, balanced": mos(index_strategy="balanced"),
        "MoS, balanced, scaled by use": mos(index_strategy="balanced", scale_by_use=True),
        "MoS, learned row scale": mos(row_scale="learned"),
        "MoS, pools by shape": mos(pool_scope="shape"),
        "MoS, A 1 and B 3": mos(equivalent_rank=1, output_rank=3),
        "Uni-LoRA": lambda: UniLoraConfig(r=8, theta_d_length=numbers, target_modules="all-linear"),
        "VB-LoRA": lambda: VBLoRAConfig(
            r=4,
            num_vectors=90,
            vector_length=bench.size["width"] // 2,
            target_modules="all-linear",
        ),
        "VeRA": lambda: VeraConfig(r=256, target_modules="all-linear"),
    }


class Bench:
    """The frozen base, its texts, and one training run of an adapter."""

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
        target = read_target(options.target)
        self.source = byte_windows(source, length)
        windows = byte_windows(target, length)
        held = len(windows) // 5
        self.train, rest = windows[:-held], windows[-held:]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))
        count = 32 if options.quick else min(256, len(rest) // 2)
        self.watched, self.judged = rest[order[:count]], rest[order[count : 2 * count]]
        self.base = self.pretrained()
        self.unit = sum(t.in_features + t.out_features for t in linear_targets(self.base))
        self.base_losses = {
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "source": self.loss(self.base, self.source[-256:]),
            "target": self.loss(self.base, self.judged),
        }

    def pretrained(self) -> LlamaForCausalLM:
        size = self.size
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=size["width"],
            intermediate_size=size["inner"],
            num_hidden_layers=size["blocks"],
            num_attention_heads=max(4, size["width"] // 64),
            num_key_value_heads=max(4, size["width"] // 64),
            max_position_embeddings=size["length"],
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(self.device)
        rate = 4e-3 if size["width"] <= 64 else 1e-3
        loop = LoopConfig(steps=size["base"], learning_rate=rate, precision=self.precision)
        self.fit(model, self.source[:-256], loop, 24 if size["width"] <= 64 else 64)
        return model.eval()

    @property
    def precision(self) -> str:
        return "bf16" if self.options.preset == "r2" else "fp32"

    def run(self, make: Callable[[], Any], rate: float, seed: int) -> dict[str, Any]:
        """Train one adapter; held-out losses in nats per byte."""
        torch.manual_seed(seed)
        begun = time.perf_counter()
        model = get_peft_model(self.base, make())
        config = LoopConfig(
            steps=self.options.steps,
            learning_rate=rate,
            schedule="linear",
            warmup_fraction=0.0,
            weight_decay=0.0,
            precision=self.precision,
            seed=seed,
        )
        trained = model.get_nb_trainable_parameters()[0]
        try:
            self.fit(model.train(), self.train, config, self.size["batch"])
            watched, judged = (self.loss(model, part) for part in (self.watched, self.judged))
        except UserError:
            watched = judged = float("inf")
        model.base_model.unload()
        seconds = round(time.perf_counter() - begun, 2)
        return {"watched": watched, "judged": judged, "trained": trained, "seconds": seconds}

    def fit(self, model: Any, windows: Tensor, config: LoopConfig, batch: int) -> None:
        update: Any = GradientUpdate.from_config(TuneTask(model), config)
        place = type(update.place)(self.device, config.precision)
        update = Captured(update) if self.device.type == "cuda" else update
        update.move(place)
        batches = EpochBatches(windows, batch, config.seed)
        for step in range(config.steps):
            update.apply(update.prepare(columns(batches[step]), step))

    def loss(self, model: Any, windows: Tensor) -> float:
        parts = [columns(part.to(self.device)) for part in windows.split(64)]
        with torch.no_grad():
            return held_out(TuneTask(model), parts)["loss"]


def columns(windows: Tensor) -> dict[str, Tensor]:
    ids = windows.long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


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


def summary(rows: Mapping[str, Any], methods: list[str], seeds: int) -> dict[str, Any]:
    """By method: best rate, mean over seeds with its interval, and the paired difference to LoRA of
    equal budget."""
    found: dict[str, Any] = {}
    for name in methods:
        of = {k.split(" | ")[1]: r for k, r in rows.items() if k.startswith(f"{name} | ")}
        swept = {k: rows[f"{name} | {k} | 0"]["watched"] for k in of if f"{name} | {k} | 0" in rows}
        if not swept:
            continue
        best = min(swept, key=swept.__getitem__)
        keys = [f"{name} | {best} | {seed}" for seed in range(seeds)]
        runs = [rows[key]["judged"] for key in keys if key in rows]
        figures = spread(runs)
        found[name] = {
            "trained": rows[keys[0]]["trained"],
            "rate": float(best),
            "loss": figures["mean"],
            "half_width": figures["half_width"],
            "seeds": len(runs),
            "runs": runs,
        }
    base = found.get("LoRA r=2")
    for figures in found.values():
        if base is not None and len(figures["runs"]) == len(base["runs"]) > 1:
            pairs = zip(figures["runs"], base["runs"], strict=True)
            paired = spread([one - other for one, other in pairs])
            figures["to_lora"] = paired["mean"]
            figures["to_lora_half_width"] = paired["half_width"]
    return found


def show(found: Mapping[str, Any]) -> None:
    print(f"\n{'method':<32}{'trained':>9}{'rate':>7}{'nats/byte':>18}{'to LoRA r=2':>20}")
    for name, row in found.items():
        difference = (
            f"{row['to_lora']:+.4f} ± {row['to_lora_half_width']:.4f}" if "to_lora" in row else "-"
        )
        loss = f"{row['loss']:.4f} ± {row['half_width']:.4f}"
        print(f"{name:<32}{row['trained']:>9,}{row['rate']:>7g}{loss:>18}{difference:>20}")


if __name__ == "__main__":
    main()
