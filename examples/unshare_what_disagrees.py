"""Fold a language model, audit it, give the uses that disagree something of their own, cure, save.

    python examples/unshare_what_disagrees.py --out runs/unshared

One fold is cured twice, alike: once as it is, and once after a tenth of the parameters that it
saved were given back where the audit says. A few minutes on a CPU with the model that ships.
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
    parser.add_argument("--text", default="pystdlib")
    parser.add_argument("--groups", default="2,3,4,5;6,7,8,9", help="blocks that share weights")
    parser.add_argument("--steps", type=int, default=100, help="of each cure")
    parser.add_argument("--out", help="folder for the unshared model")
    options = parser.parse_args()

    source = load_model(options.model)
    documents = read_documents(options.text)
    cut = len(documents) * 4 // 5
    train = windows(source.tokenizer, documents[:cut], 128)
    heldout = windows(source.tokenizer, documents[cut:], 128)

    groups = tuple(tuple(map(int, group.split(","))) for group in options.groups.split(";"))
    plain = fold(source.model, FoldPlan(source.model.config.num_hidden_layers, groups=groups))
    found = audit(plain, text_batches(train, 16, 4), language_loss, per="tensor")
    saved = size(plain).saved - plain.get_input_embeddings().weight.numel()
    unshared = copy.deepcopy(plain)
    for suggestion in spend([s for s in found.suggestions if s.beyond_chance], saved // 10):
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
