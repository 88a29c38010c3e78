"""What it costs to tell the uses of a weight apart.

1. A measuring step (forward, one backward with a gradient per use, Gram matrix) against a training
   step (forward, backward, AdamW) of the same model and batch, in time and peak memory: at sizes
   where arithmetic takes the time, and at one where launching kernels does.
2. The Gram matrix of K losses on a net that shares nothing, against TorchJD's Gram engine, where
   that package is installed.
3. The error of a sketched cosine against the size of the sketch, on real gradients.
4. Peak memory against the number of users.

    python benchmarks/sharing/cost.py [--quick] [--device cuda] [--only steps,users]

Peak memory is only reported on a GPU, where PyTorch counts it.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from weightshare.cli.console import show_table
from weightshare.report.environment import environment
from weightshare.sharing import CountSketch, Gram, by_rows, per_use, task_gradients, tie

RESULTS = Path(__file__).parents[1] / "results"


class Folded(nn.Module):
    """A transformer whose blocks are tied in groups, as a folded language model's are."""

    def __init__(self, depth: int, group: int, width: int, vocabulary: int = 4096) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        names = [n for n, p in self.blocks[0].named_parameters() if p.ndim > 1]
        for start in range(0, depth, group):
            block = range(start, min(start + group, depth))
            if len(block) > 1:
                tie(self, [[f"blocks.{i}.{name}" for i in block] for name in names])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, ids):
    logits = model(ids)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def shared_names(model):
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [found[0] for found in names.values() if len(found) > 1]


class Steps:
    """The steps that are compared, ``BATCHES`` of each on one model and one batch."""

    def __init__(self, model, ids, dtype=torch.float32):
        self.model, self.ids = model, ids
        self.autocast = torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.names = shared_names(model)

    def loss(self):
        with self.autocast:
            return loss_of(self.model, self.ids)

    def train(self):
        for _ in range(BATCHES):
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self, keep=None, factors=False):
        grams = {}
        with per_use(self.model, self.names, keep=keep, factors=factors) as uses:
            for _ in range(BATCHES):
                self.compare(uses.gradients(self.loss()), grams)
        close(grams)

    def compare(self, found, grams):
        """One Gram matrix per group of blocks and context, as an audit keeps them."""
        by_group = {}
        for name, each in found.items():
            users = {use.module.split(".")[1]: g for use, g in each.items()}
            by_group.setdefault(tuple(users), {})[name] = users
        for users, tensors in by_group.items():
            grams.setdefault(users, Gram(users)).update(tensors)

    def measure_while_training(self, keep):
        grams = {}
        with per_use(self.model, self.names, keep=keep) as uses:
            for _ in range(BATCHES):
                self.loss().backward()
                self.compare(uses.take(), grams)
                self.optimizer.step()
                self.optimizer.zero_grad()
        close(grams)


def close(grams):
    for gram in grams.values():
        gram.close()


BATCHES = 3
"""Batches in one context, as an audit has them: opening it is not part of every step."""


def race(variants, device, repeats, batches=1):
    """Least seconds per batch and peak bytes; rounds alternate, so that load hits all alike."""
    cuda = device.type == "cuda"
    seconds, peaks = dict.fromkeys(variants, math.inf), dict.fromkeys(variants)
    for number in range(repeats + 1):
        for name, step in variants.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if number:  # the first round warms up
                taken = (time.perf_counter() - began) / batches
                seconds[name] = min(seconds[name], taken)
    return {name: (seconds[name], peaks[name]) for name in variants}


# width, blocks, uses per weight, sequences, tokens of each, type
QUICK = [(64, 4, 2, 2, 64, "float32"), (64, 4, 4, 2, 64, "bfloat16")]
CPU = [
    (256, 6, 2, 8, 128, "float32"),
    (256, 6, 6, 8, 128, "float32"),
    (512, 6, 6, 1, 64, "float32"),
]
GPU = [
    (512, 12, 4, 8, 256, "float32"),
    (2048, 12, 4, 1, 128, "float32"),
    (1024, 12, 12, 16, 512, "float32"),
    (1024, 24, 24, 32, 1024, "bfloat16"),
    (2048, 12, 12, 4, 512, "float32"),
    (2048, 12, 4, 16, 512, "bfloat16"),
    (2048, 24, 24, 16, 512, "bfloat16"),
]


def steps_table(device, quick):
    for size in QUICK if quick else GPU if device.type == "cuda" else CPU:
        width, depth, group, batch, length, dtype = size
        torch.manual_seed(0)
        ids = torch.randint(4096, (batch, length), device=device)
        with device:
            model = Folded(depth, group, width)
        steps = Steps(model, ids, getattr(torch, dtype))
        sketch = CountSketch(4096)
        variants = {
            "training step": steps.train,
            "measure, whole gradients": steps.measure,
            "measure, sketches": lambda s=steps, k=sketch: s.measure(k),
            "train and measure, sketches": lambda s=steps, k=sketch: s.measure_while_training(k),
        }
        if 2 * batch * length <= width:  # factors pay for few tokens only
            variants["measure, factors"] = lambda s=steps: s.measure(factors=True)
        found = race(variants, device, 2, BATCHES)
        base = found["training step"]
        where = f"width {width}, {depth} blocks, {group} uses, {batch} x {length} {dtype}"
        for name, (seconds, peak) in found.items():
            yield {
                "step": f"{where}: {name}",
                "ms": round(1e3 * seconds, 1),
                "time_ratio": round(seconds / base[0], 2),
                "peak_MB": peak and round(peak / 1e6),
                "memory_ratio": peak and round(peak / base[1], 2),
            }
        del model, steps, variants


def torchjd_table(device, quick):
    """K losses (one per sequence) on a net that shares nothing: the same Gram matrix, two ways."""
    tasks = 4 if quick else 8
    torch.manual_seed(0)
    width = 64 if quick else 512 if device.type == "cpu" else 2048
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(width, width), nn.GELU())])
    model = model.to(device)
    x = torch.randn(tasks, width, device=device)
    parameters = dict(model.named_parameters())

    def ours(keep=None):
        losses = model(x).square().mean(1)
        found = task_gradients({i: losses[i] for i in range(tasks)}, parameters, keep)
        return Gram(range(tasks)).update(found).products("paper")

    def by_owner():
        with per_use(model, factors=True) as uses:
            found = by_rows(uses.gradients(model(x).square().mean(1).sum()), range(tasks))
        return Gram(range(tasks)).update(found).products("paper")

    sketch = CountSketch(4096)
    variants = {
        "ours, whole gradients": ours,
        "ours, sketches": lambda: ours(sketch),
        "ours, by rows": by_owner,
    }
    assert float((by_owner() - ours()).abs().max() / ours().abs().max()) < 1e-3
    if importlib.util.find_spec("torchjd"):
        from torchjd.autogram import Engine

        for dim in (None, 0):
            net = copy.deepcopy(model)  # an engine hooks into its modules: one engine per net
            engine = Engine(net, batch_dim=dim)

            def theirs(engine=engine, net=net):
                return engine.compute_gramian(net(x).square().mean(1))

            name = "TorchJD engine" + (", batched" if dim == 0 else "")
            error = float((theirs().double().cpu() - ours()).abs().max() / ours().abs().max())
            assert error < 1e-3, error
            variants[name] = theirs
    for name, (seconds, peak) in race(variants, device, 5 if quick else 20).items():
        yield {
            "Gram_matrix_by": f"{tasks} losses: {name}",
            "ms": round(1e3 * seconds, 2),
            "peak_MB": peak and round(peak / 1e6),
        }


def sketch_table(device, quick):
    """Root mean square error of sketched cosines on the gradients of a folded transformer."""
    torch.manual_seed(0)
    width = 64 if quick else 512
    model = Folded(4, 4, width).to(device)
    ids = torch.randint(4096, (4, 64), device=device)
    with per_use(model, shared_names(model)) as uses:
        found = uses.gradients(loss_of(model, ids))
    for size in (64, 256, 1024, 4096, 16384):
        errors, expected = [], []
        for seed in range(3 if quick else 10):
            sketch = CountSketch(size, seed)
            for name, each in found.items():
                exact = Gram(each).update({name: each}).cosine()
                small = {name: {use: sketch(name, g) for use, g in each.items()}}
                upper = torch.triu(torch.ones_like(exact), 1).bool()
                errors += (Gram(each).update(small).cosine() - exact)[upper].tolist()
                expected += (1 - exact[upper].square()).tolist()
        rms = math.sqrt(statistics.fmean(e * e for e in errors))
        theory = math.sqrt(statistics.fmean(e * e for e in expected)) / math.sqrt(size)
        yield {"size": size, "rms_error": round(rms, 4), "(1-c²)/√size": round(theory, 4)}


def users_table(device, quick):
    """A loop that runs more and more often: the same weights, more users."""
    width = 64 if quick else 512
    ids = torch.randint(4096, (2, 64), device=device)
    for users in (2, 4, 8, 16) if quick else (2, 4, 8, 16, 32):
        torch.manual_seed(0)
        with device:
            model = Folded(users, users, width)
        steps = Steps(model, ids)
        variants = {
            "training": steps.train,
            "whole": steps.measure,
            "sketched": lambda s=steps: s.measure(CountSketch(4096)),
        }
        row = {"users": users}
        for name, (seconds, peak) in race(variants, device, 3, BATCHES).items():
            row |= {f"{name}_ms": round(1e3 * seconds, 1), f"{name}_MB": peak and round(peak / 1e6)}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small nets: under a minute on a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="steps,torchjd,sketch,users", help="these tables")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    name = "sharing_cost" if device.type == "cpu" else "sharing_cost_cuda"
    file = options.out or folder / f"{name}.json"
    result = {
        "command": " ".join(["python", "benchmarks/sharing/cost.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread",
        "torch": torch.__version__,
        "environment": environment(),
    }
    tables = {
        "steps": ("measuring against training", steps_table),
        "torchjd": ("the Gram matrix of K losses, nothing shared", torchjd_table),
        "sketch": ("error of a sketched cosine", sketch_table),
        "users": ("growth with the number of users", users_table),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    for key, (title, table) in tables.items():
        if key not in options.only.split(","):
            continue
        result[key] = []
        for row in table(device, options.quick):
            result[key].append(row)
            file.write_text(json.dumps(result, indent=1) + "\n")
        show_table(title, result[key])


if __name__ == "__main__":
    main()
