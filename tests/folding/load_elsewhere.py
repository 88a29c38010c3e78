"""Load saved folders in a fresh process and say what came out, as JSON.

    python load_elsewhere.py with|without FOLDER...

``without`` blocks the library and trusts the code in the folder instead.
"""

import json
import sys
from pathlib import Path

how, *folders = sys.argv[1:]
if how == "without":
    sys.modules["weightshare"] = None  # any import of it now raises

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
options = {"trust_remote_code": True} if how == "without" else {}
if how == "with":
    import weightshare.folding.modeling_folded  # noqa: F401

results = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    ids = torch.tensor(json.loads((Path(folder) / "ids.json").read_text()))
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.frombuffer(
        bytearray((Path(folder) / "logits.bin").read_bytes()), dtype=torch.float32
    )
    ties = getattr(model, "block_ties", {})
    stock = "loaded"
    try:
        bases = type(model).__mro__
        stock_class = next(b for b in bases if b.__module__.startswith("transformers.models."))
        stock_class.from_pretrained(folder)
    except Exception as error:
        stock = type(error).__name__
    results[Path(folder).name] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "equal": bool(torch.equal(logits.flatten(), expected)),
        "tied": all(model.get_parameter(u) is model.get_parameter(s) for u, s in ties.items()),
        "ties": len(ties),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stock": stock,
    }
print(json.dumps(results))
