"""A federation of adapters: four participants tune one model on their own texts, a fifth attacks.

    python examples/federated_adapters.py --method mos --text corpus.txt --out adapters

The model never travels, only the adapter does: LoRA's factors, or the pools of a mixture of shards.
Each participant ends with an adapter of its own, a folder that PEFT loads. Prints, round by round,
the bytes sent both ways and who is still in.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from weightshare.federated import LocalConfig, ReputationConfig
from weightshare.federated.adapters import Adapter, NextToken
from weightshare.federated.attacks import ATTACKS
from weightshare.federated.federation import run_rounds
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.local import LoopTraining
from weightshare.federated.participant import Cohort
from weightshare.federated.strategy import ReputationStrategy
from weightshare.language import evaluate, load_model, read_documents, windows
from weightshare.shards import MosConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="pystdlib")
    parser.add_argument("--method", choices=("lora", "mos"), default="mos")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32, help="of 128 tokens, each participant")
    parser.add_argument("--out", type=Path, help="where the participants' adapters go")
    options = parser.parse_args()
    torch.set_num_threads(1)

    # 1. One model and one adapter configuration for all.
    source = load_model(options.model)
    torch.manual_seed(0)
    config = MosConfig(equivalent_rank=2, shards_per_vector=2, target_modules="all-linear",
                       task_type="CAUSAL_LM") if options.method == "mos" else LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(source.model, config)
    adapter = Adapter(model)

    # 2. To each its own stretch of the text; the last one is for scoring.
    names = ["p1", "p2", "p3", "p4", "x1"]
    text = windows(source.tokenizer, read_documents(options.text), 128)
    edges = range(0, options.windows * len(names), options.windows)
    parts = {
        name: text[edge : edge + options.windows] for name, edge in zip(names, edges, strict=True)
    }
    data = {name: (part.input_ids, part.labels) for name, part in parts.items()}
    held = text[edges.stop : edges.stop + options.windows]

    # 3. The federation: the attacker sends the negative of what it has learnt.
    local = LocalConfig(epochs=1, batch_size=4, learning_rate=2e-3, optimizer="adamw")
    training = LoopTraining(NextToken(model), data, local, adapter)
    examples = dict.fromkeys(names, options.windows)
    cohort = Cohort(training, len(adapter.read()), examples, {"x1": ATTACKS["sign_flip"]})
    rules = replace(ReputationConfig.robust(), norm=2.0, patience=1)
    strategy = ReputationStrategy(adapter.read(), rules, sizes=examples)
    grid = InProcessGrid(names, cohort.answer)
    whole = 4 * sum(p.numel() for p in model.parameters())
    print(f"adapter {4 * sum(adapter.sizes):,} bytes, model with it {whole:,}")
    before = evaluate(model, held).loss

    def after(number, arrays, metrics):
        live = ", ".join(strategy.standing.live)
        print(f"round {number}: {metrics['bytes-sent']:,} bytes out, "
              f"{metrics['bytes-received']:,} in; live: {live}")  # fmt: skip

    run_rounds(strategy, grid, None, options.rounds, after=after)
    strategy.deliver(grid)

    # 4. What each has now.
    for name in names:
        adapter.write(strategy.model_of(name))
        print(f"{name}: loss on other text {before:.4f} -> {evaluate(model, held).loss:.4f}")
        if options.out:
            model.save_pretrained(options.out / name)


if __name__ == "__main__":
    main()
