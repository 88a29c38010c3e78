"""The adapter of ``weightshare tune``: built from the options, or refused in one sentence."""

from typing import TYPE_CHECKING

from weightshare.cli.tune_config import TuneConfig
from weightshare.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

    from weightshare.language import LanguageModel


def adapted(config: TuneConfig, source: "LanguageModel") -> "PeftModel":
    """The model with a fresh adapter, the same one at every call."""
    from weightshare.cli.models import add_adapter
    from weightshare.shards import adapter_config
    from weightshare.shards.methods import parse_options

    options = parse_options(config.options)
    if config.method == "mos":
        options = {
            "shards_per_vector": config.shards,
            "private_rank": config.private_rank,
            **options,
        }
    made = adapter_config(
        config.method,
        source.model,
        equivalent_rank=config.equivalent_rank,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=target_modules(config, source),
        options=options,
    )
    return add_adapter(source, made, config.seed)


def target_modules(config: TuneConfig, source: "LanguageModel") -> str | list[str]:
    """The modules to adapt.

    Raises:
        UserError: a name that no module of the model has.
    """
    from weightshare.shards.methods import linear_targets

    names = [part.strip() for part in config.target_modules.split(",") if part.strip()]
    if names == ["all-linear"]:
        return "all-linear"
    modules = [module for module, _ in source.model.named_modules()]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            there = {target.name.rsplit(".", 1)[-1] for target in linear_targets(source.model)}
            raise UserError(
                f"--target-modules names {name!r}, which {config.model} does not have; give "
                f"all-linear, or some of {', '.join(sorted(there))}."
            )
    return names


def said(error: Exception) -> str:
    """The first line of a message, to stand inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
