"""Save a folded model as a folder that explains itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weightshare import __version__
from weightshare.folding.modeling_folded import FoldedModelMixin
from weightshare.folding.plans import FoldPlan
from weightshare.language import LanguageModel, quiet

LARGEST_SHARD = "5GB"


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str | None = None,
    max_shard_size: str = LARGEST_SHARD,
) -> None:
    """Write weights, configuration, tokenizer and card to ``path`` (safetensors only).

    ``path`` should be temporary (``run.save`` gives one): transformers leaves half a folder behind
    when the disk is full.
    """
    with quiet():
        model.save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    if card is not None:
        (path / "README.md").write_text(card, encoding="utf-8")


def model_card(
    source: LanguageModel, model: PreTrainedModel, plan: FoldPlan, facts: Mapping[str, Any]
) -> str:
    """The card of a folded model: where it comes from, what was done, what was measured."""
    folded = isinstance(model, FoldedModelMixin)
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if source.license:
        header.append(f"license: {source.license}")
    header += [
        f"base_model: {json.dumps(source.name)}",
        "tags: [weight-sharing, weightshare]",
        "---",
    ]
    groups = ", ".join("{" + ", ".join(map(str, g)) + "}" for g in plan.shared_groups) or "none"
    deltas = [
        f"{d.parameter} of {', '.join(map(str, d.blocks)) or 'the head'} ({d.kind}"
        + (f" {d.rank})" if d.rank else ")")
        for d in plan.deltas
    ]
    register = "import weightshare.folding.modeling_folded  # or pass trust_remote_code=True\n"
    load = (
        (register if folded else "") + "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    kind = (
        "Groups of blocks share one set of weights; every use has its own depth and norms."
        if folded
        else "Blocks were removed; this is an ordinary checkpoint of its family."
    )
    return f"""{chr(10).join(header)}

# {Path(source.name).name}, folded

Made from `{Path(source.name).name}` by weightshare {__version__}. {kind}

- blocks of the original: {plan.blocks}
- removed: {", ".join(map(str, plan.removed)) or "none"}
- groups that share weights: {groups}
- representative: {plan.representative}
- of their own all the same: {"; ".join(deltas) or "nothing"}

| figure | value |
|---|---|
{rows}

```python
{load}
```

The licence is that of the original model ({source.license or "see there"}).
"""
