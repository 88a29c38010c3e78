"""A folded model for elsewhere: an ordinary checkpoint, or ONNX."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.card import save_model
from weightshare.folding.modeling_folded import FoldedModelMixin
from weightshare.folding.share import unfold
from weightshare.language import LanguageModel, cast
from weightshare.report import replacing

FORMATS = ("stock", "onnx")


def export_stock(source: LanguageModel, folder: str | Path) -> PreTrainedModel:
    """Write the model as a checkpoint of its stock class, every block with its own weights.

    For engines that know no shared blocks (llama.cpp, vLLM, MLX): the same function, and the full
    size. A model without shared groups is a stock checkpoint already and is copied.
    """
    model = unfold(source.model) if isinstance(source.model, FoldedModelMixin) else source.model
    cast(model, source.stored_dtype)
    with replacing(_free(folder)) as path:
        save_model(path, model, source.tokenizer)
    return model


class _Logits(nn.Module):
    """(b, t) token ids to (b, t, v) logits, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def export_onnx(source: LanguageModel, file: str | Path) -> None:
    """Write an ONNX graph from token ids to logits; a shared tensor is stored once.

    Batch and length are free. The model has no key/value cache in this form.

    Raises:
        UserError: onnx and onnxscript are not installed, or the file exists.
    """
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "Exporting to ONNX needs onnx and onnxscript; install them with: "
            "pip install 'weightshare[onnx]'."
        ) from error
    model = _Logits(cast(source.model, torch.float32)).eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    free = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.onnx.export(
        model,
        (ids,),
        dynamo=True,
        dynamic_shapes=free,
        input_names=["input_ids"],
        verbose=False,
        # The optimizer turns transposed weights into constants, one copy for every use; ONNX
        # runtimes do their own folding when they load the file.
        optimize=False,
    )
    assert program is not None
    with replacing(_free(file)) as path:
        program.save(str(path))


def _free(path: str | Path) -> Path:
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; give another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
