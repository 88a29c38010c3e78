"""Open the language model that a command names, and put an adapter on it."""

import warnings
from typing import TYPE_CHECKING

from weightshare.cli.console import device_of
from weightshare.errors import UserError

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
        raise UserError(f"{kind} does not fit {source.name}: {error}.") from error
