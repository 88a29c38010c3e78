"""Open the language model that a command names."""

from typing import TYPE_CHECKING

from weightshare.cli.console import device_of

if TYPE_CHECKING:
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
