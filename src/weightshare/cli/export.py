"""``weightshare export``: what a run made, for elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightshare.folding.config import ExportConfig

CONFIG = "weightshare.folding.config:ExportConfig"
EXTRA = "folding"
EXAMPLES = """
  weightshare export runs/fold --to stock
  weightshare export runs/fold --to onnx --out model.onnx
"""


def run(config: "ExportConfig") -> None:
    """Export a folded model."""
    from weightshare.cli.console import say
    from weightshare.cli.models import open_model
    from weightshare.folding.export import export_onnx, export_stock, run_model

    folder = run_model(config.run)
    out = Path(config.out or Path(config.run) / {"stock": "stock", "onnx": "model.onnx"}[config.to])
    source = open_model(str(folder), "fp32" if config.to == "onnx" else "auto", "cpu")
    if config.to == "stock":
        export_stock(source, out)
    else:
        export_onnx(source, out)
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.iterdir()))
    say(f"wrote {out} ({size:,} bytes)")
