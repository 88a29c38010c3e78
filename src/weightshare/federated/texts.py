"""A federation of adapters in this process: every participant is a domain of text."""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from weightshare.errors import UserError
from weightshare.federated.adapters import Adapter, NextToken
from weightshare.federated.config import FederateConfig, LocalConfig
from weightshare.federated.domains import deal_domains, read_domains
from weightshare.federated.local import Examples, LoopTraining
from weightshare.federated.material import ROOT, Material
from weightshare.federated.simulation import Simulation, assemble
from weightshare.federated.vectors import Vector
from weightshare.language.score import evaluating

BATCH = 16
"""Windows at a time when a model is measured."""


def simulate_texts(
    config: FederateConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
) -> Simulation:
    """Build a federation whose participants train an adapter of ``model``, and only that travels.

    Honest participants have the names of their domains; see ``read_domains`` and ``deal_domains``.
    All are measured on the held-out text of all domains.

    Args:
        config: the command's options.
        model: with its adapter, as ``get_peft_model`` makes it; its adapter is overwritten.
        tokenizer: of the model.
        folder: where a strategy of reputation keeps adapters and its log.

    Raises:
        UserError: options that cannot be used, or too little text for them.
    """
    config.check()
    longest = getattr(model.config, "max_position_embeddings", config.length)
    if config.length > longest:
        raise UserError(f"--length is {config.length}; the model takes at most {longest} tokens.")
    dealt = deal_domains(
        read_domains(config.data),
        tokenizer,
        config.length,
        adversaries=config.adversaries,
        root=config.root_samples,
        samples=config.samples,
        seed=config.seed,
    )
    adapter, task = Adapter(model), NextToken(model)
    data = dealt.honest | dealt.adversaries
    device = next(model.parameters()).device
    local = LocalConfig(
        config.epochs, config.batch_size, config.rate(), config.decay, config.seed, "adamw"
    )
    known = data | ({ROOT: dealt.root} if config.root_samples else {})
    moved = {name: (ids.to(device), labels.to(device)) for name, (ids, labels) in known.items()}

    def measure(vectors: Mapping[str, Vector]) -> dict[str, dict[str, float]]:
        found = {}
        for name, vector in vectors.items():
            adapter.write(vector)
            found[name] = next_token_scores(model, dealt.test)
        return found

    def loss(name: str, vector: Vector) -> float:
        adapter.write(vector)
        return next_token_scores(model, moved[name])["loss"]

    material = Material(
        task=task,
        initial=adapter.read(),
        layers=adapter.sizes,
        learner=LoopTraining(task, moved, local, adapter),
        examples={name: len(ids) for name, (ids, _) in data.items()},
        honest=list(dealt.honest),
        adversaries=list(dealt.adversaries),
        measure=measure,
        loss=loss,
        tested=int((dealt.test[1] != -100).sum()),
    )
    return assemble(config, material, folder)


def next_token_scores(model: PeftModel, data: Examples) -> dict[str, float]:
    """``{"accuracy": share of the tokens that are the likeliest, "loss": nats per token}``."""
    device = next(model.parameters()).device
    loss = right = count = 0.0
    with evaluating(model):
        for ids, labels in zip(*(part.split(BATCH) for part in data), strict=True):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
            wanted = labels[:, 1:].to(device)
            loss += float(cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
            right += float((logits.argmax(-1) == wanted).sum())
            count += float((wanted != -100).sum())
    return {"accuracy": right / count, "loss": loss / count}
