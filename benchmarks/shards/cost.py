"""What an adapter costs: step time, memory, file, loading, decoding, against PEFT's own methods.

    python benchmarks/shards/cost.py [--quick] [--width 1024] [--blocks 24]

One random Llama of about 300 million parameters (no weights are needed for time), all linear layers
adapted. Every method takes the same steps in one run; a round measures all methods in turn, and
what is kept is the median over rounds, so that a slow spell of the machine hits all alike. Step
time is forward and backward with gradient checkpointing off and on, on a GPU under autocast to
bfloat16 (PEFT's own methods would else compute in float32). ``deep`` is a step of 64 blocks, the
ratio to one of 32, and that of the backward pass alone. ``mixed`` is a forward pass of a batch in
which every row has another adapter, with one token a row and with 64.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, get_peft_model
from peft.tuners import UniLoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.language import decode_speed
from weightshare.shards import MosConfig
from weightshare.shards.methods import linear_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--users", type=int, default=16, help="adapters in a mixed batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table(
        lambda options: "shards_cost" + "_gpu" * options.device.startswith("cuda"), __doc__, parser
    )
    options = table.options
    if table.quick:
        options.width, options.blocks, options.rounds, options.users = 64, 4, 2, 4
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # On the GPU enough tokens that it, and not Python, is what takes the time.
    shape = (16, 1024) if device.type == "cuda" else (2, 64)
    base = make(options.width, options.blocks, device, dtype)
    ids = torch.randint(0, base.config.vocab_size, shape, device=device)
    numbers = 2 * sum(t.in_features + t.out_features for t in linear_targets(base))
    table.facts |= {
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "tokens_per_step": ids.numel(),
        "dtype": str(dtype),
    }
    methods: dict[str, Callable[[], Any]] = {
        "MoS e=2 r=8": lambda: MosConfig(target_modules="all-linear", rank=8),
        "LoRA r=8": lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        "LoRA r=2": lambda: LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"),
        "Uni-LoRA r=8": lambda: UniLoraConfig(
            r=8, theta_d_length=numbers, target_modules="all-linear"
        ),
        "VB-LoRA r=8": lambda: VBLoRAConfig(
            r=8, num_vectors=90, vector_length=32, target_modules="all-linear"
        ),
    }
    models: dict[str, PeftModel] = {}
    for checkpointing in (False, True):
        part = f"step{' with checkpointing' if checkpointing else ''}"
        if all(f"{name}, {part}" in table.rows for name in methods):
            continue
        models = models or {name: adapted(base, config()) for name, config in methods.items()}
        for model in models.values():
            switch(model, checkpointing)
        times = rounds(models, ids, options.rounds, device)
        for name, model in models.items():
            key = f"{name}, {part}"
            table.row(
                key,
                lambda name=name, model=model, times=times: {
                    "milliseconds": statistics.median(times[name]) * 1e3,
                    "to_lora_r8": statistics.median(
                        one / other
                        for one, other in zip(times[name], times["LoRA r=8"], strict=True)
                    ),
                    "peak_megabytes": peak(model, ids, device),
                },
            )
    for name, config in methods.items():
        table.row(
            f"{name}, serving", lambda config=config: serve(base, adapted(base, config()), device)
        )
    # The models of the steps would leave the deep ones no room.
    models.clear()
    for name in ("MoS e=2 r=8", "LoRA r=8"):
        table.row(f"{name}, deep", lambda name=name: growth(methods[name], options, device, dtype))
    for name in ("MoS e=2 r=8", "LoRA r=8"):
        table.row(f"{name}, mixed", lambda name=name: mixed(base, methods[name], options.users))
    for part in ("step", "step with checkpointing", "serving", "deep", "mixed"):
        table.facts[part.replace(" ", "_")] = {
            name.removesuffix(f", {part}"): row
            for name, row in table.rows.items()
            if name.endswith(f", {part}")
        }
    table.write()
    table.show(
        [
            "milliseconds",
            "to_lora_r8",
            "peak_megabytes",
            "file_bytes",
            "load_seconds",
            "tokens_per_second",
            "backward_ratio",
            "milliseconds_1_token",
        ]
    )


def make(width: int, blocks: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000 if width >= 512 else 256,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 32 * 32,
        num_hidden_layers=blocks,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(4, width // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype)


def adapted(base: LlamaForCausalLM, config: Any) -> PeftModel:
    """An adapter on a model that shares the base's weights."""
    memo = {id(p): p for p in base.parameters()}
    return get_peft_model(copy.deepcopy(base, memo), config)


def switch(model: PeftModel, checkpointing: bool) -> None:
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.base_model.model.gradient_checkpointing_disable()
    model.train()


def step(model: PeftModel, ids: torch.Tensor) -> float:
    """Forward and backward; the seconds of the latter."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    wait(ids.device)
    begun = clock(ids.device)
    loss.backward()
    wait(ids.device)
    took = clock(ids.device) - begun
    model.zero_grad(set_to_none=True)
    return took


def rounds(
    models: dict[str, PeftModel], ids: torch.Tensor, count: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step of every model, in turn."""
    inner = 2 if device.type == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in models}
    # A collection of the garbage of all models would fall on the same one in every round.
    gc.collect()
    gc.freeze()
    gc.disable()
    for turn in range(count + 1):
        for name, model in models.items():
            gc.collect()
            wait(device)
            begun = clock(device)
            for _ in range(inner):
                step(model, ids)
            wait(device)
            if turn:
                times[name].append((clock(device) - begun) / inner)
    gc.enable()
    gc.unfreeze()
    return times


def peak(model: PeftModel, ids: torch.Tensor, device: torch.device) -> float | None:
    """Memory of one step above what stays, in megabytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(model, ids)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def serve(base: LlamaForCausalLM, model: PeftModel, device: torch.device) -> dict[str, Any]:
    """Bytes and seconds of the saved adapter, and unmerged decoding."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        fresh = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        wait(device)
        begun = time.perf_counter()
        PeftModel.from_pretrained(fresh, folder)
        wait(device)
        loading = time.perf_counter() - begun
    model.eval()
    prompt = list(range(1, 17))
    keep = getattr(model.base_model, "assembled", None)
    new = 24 if device.type == "cuda" else 8
    plain = decode_speed(model, prompt, new, repeats=2).median
    figures = {
        "trained": model.get_nb_trainable_parameters()[0],
        "file_bytes": size,
        "load_seconds": loading,
        "tokens_per_second": plain,
    }
    if keep is not None:
        with keep():
            figures["tokens_per_second_assembled"] = decode_speed(
                model, prompt, new, repeats=2
            ).median
    return figures


def mixed(base: LlamaForCausalLM, config: Callable[[], Any], users: int) -> dict[str, Any]:
    """Milliseconds of a forward pass of as many rows as users."""
    model = adapted(base, config())
    names = ["default", *(f"user{number}" for number in range(1, users))]
    for name in names[1:]:
        model.add_adapter(name, config())
    model.eval()
    keep = getattr(model.base_model, "assembled", nullcontext)
    found = {}
    for tokens in (1, 64):
        ids = torch.randint(0, 256, (users, tokens), device=base.device)
        times = []
        with torch.no_grad(), keep():
            for _ in range(6):
                wait(base.device)
                begun = clock(base.device)
                model(input_ids=ids, adapter_names=names)
                wait(base.device)
                times.append(clock(base.device) - begun)
        found[f"milliseconds_{tokens}_token"] = statistics.median(times[1:]) * 1e3
    return found


def growth(
    config: Callable[[], Any], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds of a step of a model of 32 and of 64 blocks; 2 is linear.

    Narrow on a CPU. On a GPU so wide that it, and not Python, is what takes the time."""
    cuda = device.type == "cuda"
    width, few = (64, 4) if options.quick else (1024 if cuda else 128, 32)
    shape = (4, 1024) if cuda else (2, 64)
    ids = torch.randint(0, 256, shape, device=device)
    whole, backward = {}, {}
    models = {
        blocks: adapted(make(width, blocks, device, dtype), config()).train()
        for blocks in (few, 2 * few)
    }
    for turn in range(6):
        for blocks, model in models.items():
            begun = clock(device)
            took = step(model, ids)
            if turn:
                backward.setdefault(blocks, []).append(took)
                whole.setdefault(blocks, []).append(clock(device) - begun)
    middle = statistics.median
    return {
        "milliseconds": middle(whole[2 * few]) * 1e3,
        "ratio": middle(whole[2 * few]) / middle(whole[few]),
        "backward_milliseconds": middle(backward[2 * few]) * 1e3,
        "backward_ratio": middle(backward[2 * few]) / middle(backward[few]),
    }


def clock(device: torch.device) -> float:
    """Seconds; on a CPU those of this process, which other work on the machine does not stretch."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
