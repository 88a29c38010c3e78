"""How fast rankings and folded models are, against the plain way of doing the same, in one run.

    python benchmarks/folding/speed.py [--quick] [--model tiny] [--device cuda]

Block Influence with a running sum of cosines against the T x T product of which only the diagonal
is read; greedy removal with kept prefixes against whole forward passes; decoding before and after
removing and sharing. Ratios are of medians within this run. ``--shape WIDTHxBLOCKS`` takes a Llama
of random weights instead of a model: speed does not depend on what they are.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.folding import FoldPlan, fold
from weightshare.folding.blocks import BlockLosses
from weightshare.folding.influence import block_influence
from weightshare.folding.search import greedy
from weightshare.language import (
    decode_speed,
    evaluating,
    load_model,
    read_documents,
    windows,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="pystdlib")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", help="width x blocks of a random Llama, as 576x30")
    parser.add_argument("--type", default="bfloat16", help="torch dtype of a random Llama")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a timed generation")
    parser.add_argument("--decode-only", action="store_true", help="leave out the rankings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("folding_speed", __doc__, parser)
    options = table.options
    sequences, repeats = (2, 2) if table.quick else (options.sequences, 5)
    if options.shape:
        with torch.device(options.device):
            model = random_llama(options.shape).to(getattr(torch, options.type)).eval()
        ids = torch.randint(model.config.vocab_size, (sequences, options.length))
    else:
        source = load_model(options.model, dtype=options.dtype, device=options.device)
        model = source.model
        documents = read_documents(options.text)
        ids = windows(source.tokenizer, documents, options.length, limit=sequences).input_ids
    blocks = len(model.model.layers)
    table.facts = {
        "model": options.shape or options.model,
        "dtype": str(model.dtype),
        "blocks": blocks,
        "sequences": sequences,
        "length": options.length,
    }

    def once(work) -> float:
        synchronize(options.device)
        begun = time.perf_counter()
        work()
        synchronize(options.device)
        return time.perf_counter() - begun

    def clock(work) -> float:
        work()
        return statistics.median(once(work) for _ in range(repeats))

    def influence() -> dict[str, float]:
        ours = clock(lambda: block_influence(BlockLosses(model, ids)))
        naive = clock(lambda: naive_influence(model, ids))
        close = max(
            abs(a - b)
            for a, b in zip(
                block_influence(BlockLosses(model, ids)), naive_influence(model, ids), strict=True
            )
        )
        return {"ours": ours, "peer": naive, "ratio": naive / ours, "largest_difference": close}

    def removal() -> dict[str, float]:
        count = min(3, blocks // 4) or 1
        ours, peer = BlockLosses(model, ids), BlockLosses(model, ids)
        first = greedy(ours, count)[0]
        second = plain_greedy(peer, count)
        assert first == second, (first, second)
        seconds, plain = [], []
        for _ in range(2):  # in turns, after the runs above have warmed both up
            seconds.append(once(lambda: greedy(BlockLosses(model, ids), count)))
            plain.append(once(lambda: plain_greedy(BlockLosses(model, ids), count)))
        return {"ours": statistics.median(seconds), "peer": statistics.median(plain),
                "ratio": statistics.median(plain) / statistics.median(seconds),
                "block_runs": ours.block_runs, "peer_block_runs": peer.block_runs}  # fmt: skip

    if not options.decode_only:
        table.row("block influence, one pass / T x T", influence)
        table.row("greedy, prefixes kept / whole passes", removal)
    half = blocks // 2
    plans = {
        "dense": FoldPlan(blocks),
        f"remove {blocks // 3}": FoldPlan(blocks, removed=tuple(range(2, 2 + blocks // 3))),
        "share all in pairs": FoldPlan(
            blocks, groups=tuple((2 * i, 2 * i + 1) for i in range(half))
        ),
    }
    for batch in (1, 8):
        base = None
        for name, plan in plans.items():
            folded = fold(model, plan)

            def decode(folded=folded, batch=batch) -> dict[str, float]:
                speed = decode_speed(folded, ids[0, :12], options.tokens, batch, repeats=repeats)
                return {"tokens_per_second": speed.median,
                        "parameters": sum(p.numel() for p in folded.parameters())}  # fmt: skip

            row = table.row(f"decode, batch {batch}, {name}", decode)
            if row and base is None:
                base = row["tokens_per_second"]
            if row and base:
                row["ratio"] = row["tokens_per_second"] / base
    table.write()
    table.show(["ours", "peer", "ratio", "tokens_per_second"])


def naive_influence(model, ids) -> list[float]:
    """The cosine of every token with every token, of which only the diagonal is kept."""
    states = []
    handles = [
        module.register_forward_pre_hook(lambda _m, args: states.append(args[0]))
        for module in (*model.model.layers, model.model.norm)
    ]
    with evaluating(model):
        model.model(ids.to(model.device), use_cache=False)
        for handle in handles:
            handle.remove()
        scores = []
        for before, after in itertools.pairwise(states):
            a, b = before.float().flatten(0, 1), after.float().flatten(0, 1)
            product = (a @ b.T) / (a.norm(dim=-1)[:, None] * b.norm(dim=-1)[None])
            scores.append(1 - float(product.diagonal().mean()))
    return scores


def plain_greedy(losses: BlockLosses, count: int) -> list[int]:
    """Greedy removal by whole forward passes of the remaining blocks."""
    remaining, order = list(range(losses.blocks)), []
    for _ in range(count):
        costs = {b: losses.of([other for other in remaining if other != b]) for b in remaining}
        order.append(min(costs, key=costs.__getitem__))
        remaining.remove(order[-1])
    return order


def random_llama(shape: str) -> LlamaForCausalLM:
    """A Llama with random weights and the proportions of SmolLM2 (3 query heads per key head)."""
    width, blocks = map(int, shape.split("x"))
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=49_152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
