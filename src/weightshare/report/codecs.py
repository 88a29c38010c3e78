"""How the result of a stage becomes a file and comes back."""

import json
from pathlib import Path
from typing import Any, Protocol

from weightshare.report.store import plain


class Codec(Protocol):
    """Two functions between a value and a path; an optional ``suffix`` ends the file's name."""

    def write(self, path: Path, value: Any) -> None: ...

    def read(self, path: Path) -> Any: ...


class _Json:
    """Numbers, text, lists and string-keyed objects; NaN and the infinities come back as such."""

    suffix = ".json"

    def write(self, path: Path, value: Any) -> None:
        path.write_text(dumps(value) + "\n", encoding="utf-8", newline="\n")

    def read(self, path: Path) -> Any:
        return loads(path.read_text(encoding="utf-8"))


class _Tensors:
    """``dict[str, Tensor]`` as safetensors, read back on the CPU."""

    suffix = ".safetensors"

    def write(self, path: Path, value: Any) -> None:
        import torch
        from safetensors.torch import save_file

        # The format refuses tensors that share memory or are not contiguous.
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in value.items()
        }
        save_file(own, path)

    def read(self, path: Path) -> Any:
        from safetensors.torch import load_file

        return load_file(path)


JSON: Codec = _Json()
TENSORS: Codec = _Tensors()


def dumps(value: Any) -> str:
    """Strict JSON on one line, with ``{"float": "NaN"}`` where a number is not finite."""
    tagged = plain(value, lambda number: {"float": str(number)})
    return json.dumps(tagged, ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Any:
    """Inverse of :func:`dumps`."""
    return json.loads(text, object_hook=_untag)


def _untag(item: dict[str, Any]) -> Any:
    return float(item["float"]) if item.keys() == {"float"} and _tag(item["float"]) else item


def _tag(value: Any) -> bool:
    return isinstance(value, str) and value in {"nan", "inf", "-inf"}
