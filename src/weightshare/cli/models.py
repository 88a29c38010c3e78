"""Open the language model that a command names, and put an adapter on it."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightshare.errors import UserError, first_line

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from weightshare.language import LanguageModel


def open_model(name: str, dtype: str = "auto", device: str = "auto") -> "LanguageModel":
    """Load a model for a command; folded models load like any other.

    Raises:
        UserError: the model or the device is not there, or cannot be used.
    """
    # Importing it registers the folded classes with transformers' Auto classes.
    import weightshare.folding.modeling_folded  # noqa: F401
    from weightshare.language import load_model
    from weightshare.training import device_of

    return load_model(name, dtype=dtype, device=device_of(device))


def add_adapter(source: "LanguageModel", config: "PeftConfig", seed: int) -> "PeftModel":
    """The model with a fresh adapter, the same one at every call.

    Raises:
        UserError: the adapter does not fit the model.
    """
    import torch
    from peft import get_peft_model

    config.base_model_name_or_path = str(source.path)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that is going out of use.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(source.model, config)
    except (TypeError, ValueError) as error:
        kind = config.peft_type.value.lower()
        said = str(error).rstrip(".")
        raise UserError(f"{kind} does not fit {source.name}: {said}.") from error


def with_adapter(source: "LanguageModel", folder: str | Path) -> "LanguageModel":
    """The model with a saved PEFT adapter on it, shards or any other; ``folder`` may be a tune's.

    Raises:
        UserError: there is no adapter, or it does not fit the model.
    """
    from peft import PeftModel

    import weightshare.shards  # noqa: F401  makes shard adapters known to PEFT
    from weightshare.language import quiet

    places = [Path(folder), Path(folder) / "adapter"]
    found = [place for place in places if (place / "adapter_config.json").is_file()]
    if not found:
        raise UserError(
            f"{folder} holds no adapter; give the folder of a saved PEFT adapter, "
            "or the --out folder of a finished tune."
        )
    try:
        with quiet():
            # PEFT goes on with what the file lacks left as it begins: an adapter not trained.
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(source.model, found[0]).eval()
    except (KeyError, RuntimeError, TypeError, UserWarning, ValueError) as error:
        raise UserError(
            f"The adapter in {found[0]} does not fit {source.name} ({first_line(error)}); "
            "give the model it was made for."
        ) from error
    return replace(source, model=model)
