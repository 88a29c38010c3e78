"""``weightshare export``: what a run made, for elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

from weightshare.errors import UserError

if TYPE_CHECKING:
    from weightshare.folding.config import ExportConfig

CONFIG = "weightshare.folding.config:ExportConfig"
EXTRA = "shards"
EXAMPLES = """
  weightshare export runs/fold --to stock
  weightshare export runs/fold --to onnx --out model.onnx
  weightshare export runs/tune --to lora
"""


def run(config: "ExportConfig") -> None:
    """Export a folded model or a shard adapter."""
    from weightshare.cli.console import say

    names = {"stock": "stock", "onnx": "model.onnx", "lora": "lora"}
    out = Path(config.out or Path(config.run) / names[config.to])
    if config.to == "lora":
        export_adapter(Path(config.run), out)
    else:
        export_model(config, out)
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.iterdir()))
    say(f"wrote {out} ({size:,} bytes)")


def export_model(config: "ExportConfig", out: Path) -> None:
    """A folded model as a stock checkpoint or as ONNX."""
    from weightshare.cli.models import open_model
    from weightshare.folding.export import export_onnx, export_stock

    source = open_model(config.run, "fp32" if config.to == "onnx" else "auto", "cpu")
    if config.to == "stock":
        export_stock(source, out)
    else:
        export_onnx(source, out)


def export_adapter(run: Path, out: Path) -> None:
    """The adapter of a tune, assembled into a stock LoRA adapter; equal logits, more bytes.

    Raises:
        UserError: the run holds no adapter of shards, or ``out`` exists.
    """
    import yaml

    import weightshare.shards as shards
    from weightshare.cli.models import open_model, with_adapter
    from weightshare.report import replacing

    if not (run / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{run} holds no adapter; give the --out folder of a finished tune.")
    if out.exists():
        raise UserError(f"{out} exists already; give another --out.")
    options = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    source = with_adapter(open_model(options["model"], device="cpu"), run)
    with replacing(out) as folder:
        shards.to_lora(source.model, folder)
