"""What the training tables of shard adapters share: one run on the device, rates, seeds, summary.

Every method is swept over learning rates with seed 0, judged on watched data; the grid grows while
the best rate lies at its edge. When all are swept, other seeds run at those rates, one seed of
every method after the other. What is compared is the loss on other, judged data, paired by seed.
With ``--part`` the methods, not the rows, are split over processes, because the best rate must be
known before the seeds run.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from _table import Table, spread
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from weightshare.errors import UserError
from weightshare.training import Captured, GradientUpdate, LoopConfig, Place

Run = Callable[[float, int], Mapping[str, Any]]
"""Learning rate and seed to figures: ``watched``, ``judged``, ``trained``, ``seconds``."""
STEPS_OUT = 3
"""How often the grid of rates may grow at either end."""


def sweep(
    table: Table, methods: Mapping[str, Run], rates: Mapping[str, Sequence[float]], seeds: int
) -> None:
    """Rows ``method | rate | seed`` of every method of this process's part."""
    part, parts = table.part, table.parts
    table.parts = 1
    mine = [name for number, name in enumerate(methods) if number % parts == part % parts]
    best = {name: best_rate(table, name, methods[name], rates[name]) for name in mine}
    for seed in range(1, seeds):
        for name, rate in best.items():
            if rate is not None:
                run = partial(methods[name], rate, seed)
                table.row(f"{name} | {rate:g} | {seed}", run)


def best_rate(table: Table, name: str, run: Run, rates: Sequence[float]) -> float | None:
    """The rate of the lowest watched loss with seed 0; None where the time was too short."""
    most = 0 if table.quick else STEPS_OUT
    found: dict[float, float] = {}
    waiting = sorted(rates)
    grown = 0
    while waiting:
        rate = waiting.pop(0)
        row = table.row(f"{name} | {rate:g} | 0", partial(run, rate, 0))
        if row is None:
            return None
        found[rate] = row["watched"]
        best = min(found, key=found.__getitem__)
        if not waiting and grown < most and best in (min(found), max(found)):
            waiting.append(best * 2 if best == max(found) else best / 2)
            grown += 1
    return min(found, key=found.__getitem__)


def summary(
    rows: Mapping[str, Any],
    methods: Iterable[str],
    seeds: int,
    beside: Mapping[str, str],
    finished: bool = True,
) -> dict[str, Any]:
    """By method: best rate, mean over seeds with its interval, and paired differences.

    With ``finished``, a method whose best rate is the lowest or highest tried is left out: its
    sweep was cut short, and its loss says little.

    ``beside`` names the methods to be compared with: ``{"lora": "LoRA r=2"}`` gives ``to_lora``
    with the half width of its 95 % interval and the p value of the paired t test.
    """
    from scipy.stats import ttest_rel

    found: dict[str, Any] = {}
    for name in methods:
        swept = {}
        for key, row in rows.items():
            method, rate, seed = key.split(" | ")
            if method == name and seed == "0":
                swept[rate] = row["watched"]
        if not swept:
            continue
        best = min(swept, key=swept.__getitem__)
        if finished and best in (min(swept, key=float), max(swept, key=float)):
            continue
        keys = [f"{name} | {best} | {seed}" for seed in range(seeds)]
        runs = [rows[key]["judged"] for key in keys if key in rows]
        over = spread(runs)
        found[name] = {
            "trained": rows[keys[0]]["trained"],
            "rate": float(best),
            "loss": over["mean"],
            "half_width": over["half_width"],
            "seeds": len(runs),
            "runs": runs,
        }
    for short, other in beside.items():
        if other not in found:
            continue
        base = found[other]["runs"]
        for name, figures in found.items():
            pairs = list(zip(figures["runs"], base, strict=False))
            if name == other or len(pairs) < 2:
                continue
            over = spread([one - two for one, two in pairs])
            figures[f"to_{short}"] = over["mean"]
            figures[f"to_{short}_half_width"] = over["half_width"]
            figures[f"to_{short}_p"] = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return found


def show(found: Mapping[str, Any], beside: Iterable[str]) -> None:
    """Print a summary."""
    titles = "".join(f"{f'to {short}':>26}" for short in beside)
    print(f"\n{'method':<36}{'trained':>10}{'rate':>9}{'loss':>18}{'seeds':>6}{titles}")
    for name, row in found.items():
        cells = ""
        for short in beside:
            if f"to_{short}" in row:
                difference = f"{row[f'to_{short}']:+.4f} ± {row[f'to_{short}_half_width']:.4f}"
                cells += f"{difference:>18} p={row[f'to_{short}_p']:.3f}"
            else:
                cells += f"{'-':>26}"
        loss = f"{row['loss']:.4f} ± {row['half_width']:.4f}"
        print(f"{name:<36}{row['trained']:>10,}{row['rate']:>9g}{loss:>18}{row['seeds']:>6}{cells}")


def put(config: Callable[[], Any]) -> Callable[[Any], Any]:
    """A function that adapts a base model as ``config()`` says."""
    return lambda base: get_peft_model(base, config())


def train_adapter(
    task: nn.Module,
    batches: Any,
    options: argparse.Namespace,
    place: Place,
    rate: float,
    seed: int,
    warmup: float = 0.0,
) -> float:
    """Train an adapter for ``options.steps`` with linear decay; seconds without the first steps."""
    config = LoopConfig(
        steps=options.steps,
        learning_rate=rate,
        schedule="linear",
        warmup_fraction=warmup,
        weight_decay=0.0,
        precision=place.precision,
        seed=seed,
    )
    return fit(task, batches, config, place.device, not options.eager)


def fit(
    task: nn.Module, batches: Any, config: LoopConfig, device: torch.device, captured: bool = True
) -> float:
    """Train ``task`` on ``batches[step]``; on a GPU as one CUDA graph. Seconds without the first
    steps."""
    # Nothing here has dropout, so both modes compute the same, but training VB-LoRA looks at its
    # logits on the host at every step (no graph could be recorded), and PEFT mixes users in
    # evaluation mode only.
    task.eval()
    update: Any = GradientUpdate.from_config(task, config)
    if captured and device.type == "cuda":
        update = Captured(update)
    update.move(Place(device, config.precision))
    begun = time.perf_counter()
    for step in range(config.steps):
        if step == 4:
            wait(device)
            begun = time.perf_counter()
        metrics = update.apply(update.prepare(batches[step], step))
    wait(device)
    if not all(torch.isfinite(value) for value in metrics.values()):
        raise UserError("the loss became not finite")
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention without a mask: while a CUDA graph is recorded transformers would write the
    mask out, which rules the fast kernels out. Shared heads are repeated, which takes half the time
    of ``enable_gqa``."""
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)


def fuse_norms(model: nn.Module) -> None:
    """Root-mean-square norms as one kernel. Written out, as transformers does, they and their
    gradients are a sixth of a step of a narrow model."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(fused_norm, module)


def fused_norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    # Computes in float32 inside; autocast would have it write float32 too.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
