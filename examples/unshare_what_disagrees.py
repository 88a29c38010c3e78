"""Fold a language model, audit it, give the uses that disagree something of their own, cure, save.

    python examples/unshare_what_disagrees.py --out runs/unshared

One fold is cured twice, alike: once as it is, and once after a tenth of the parameters that it
saved were given back: private scales on every shared tensor, and weights of their own where a trial
says so. A few minutes on a CPU with the model that ships.
"""

import argparse
import copy

from weightshare.audit import apply, audit, spend
from weightshare.audit.language import language_loss, text_batches
from weightshare.folding import CureConfig, FoldPlan, cure, fold
from weightshare.language import evaluate, load_model, read_documents, windows
from weightshare.sharing import size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="stdlib", help="more of it than the cure reads")
    parser.add_argument("--heldout", default="pystdlib")
    parser.add_argument("--groups", default="2,3,4,5;6,7,8,9", help="blocks that share weights")
    parser.add_argument("--steps", type=int, default=100, help="of each cure")
    parser.add_argument("--out", help="folder for the unshared model")
    options = parser.parse_args()

    source = load_model(options.model)
    needed = 8 * options.steps + 4 * (16 + 50)
    train = windows(source.tokenizer, read_documents(options.text), 128, limit=needed)
    heldout = windows(source.tokenizer, read_documents(options.heldout), 128)

    groups = tuple(tuple(map(int, group.split(","))) for group in options.groups.split(";"))
    plain = fold(source.model, FoldPlan(source.model.config.num_hidden_layers, groups=groups))
    batches = text_batches(train, 16 + 50, 4)
    found = audit(plain, batches[:16], language_loss, per="tensor", trial=batches[16:])
    budget = (size(plain).saved - plain.get_input_embeddings().weight.numel()) // 10
    scales = [s for s in found.suggestions if s.unsharing.kind == "scale"]
    copies = [s for s in found.suggestions if s.unsharing.kind == "unshare" and s.beyond_chance]
    unshared = copy.deepcopy(plain)
    for suggestion in [*scales, *spend(copies, budget - sum(s.added for s in scales))]:
        apply(unshared, suggestion)
        print(f"{suggestion.row()['do']:<25} {suggestion.unsharing.layer.name}")

    config = CureConfig(steps=options.steps)
    for name, model in (("shared", plain), ("unshared", unshared)):
        before = evaluate(model, heldout).loss
        cure(model, source.model, train, config=config)
        after = evaluate(model, heldout).loss
        print(f"{name}: {size(model).unique:,} parameters, loss {before:.4f} -> {after:.4f}")
    if options.out:
        unshared.save_pretrained(options.out)
        source.tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
