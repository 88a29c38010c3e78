"""What a training run may be told, with the sources of the defaults."""

from dataclasses import dataclass
from typing import Literal

from weightshare.errors import UserError


@dataclass
class LoopConfig:
    """Options of one training run; the first half builds the update, the second drives the loop.

    ``Loop`` itself reads ``steps``, ``precision``, ``seed`` and everything from ``log_every`` on;
    ``GradientUpdate.from_config`` reads the rest.
    """

    steps: int = 1000
    """Updates in the whole run, those before a resume counted in."""
    learning_rate: float = 3e-4
    """Peak of the schedule (AdamW; the usual start for models under a billion parameters)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course after warm-up (cosine: Loshchilov & Hutter 2017)."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the rate rises linearly from zero (Stanford Alpaca's recipe)."""
    final_fraction: float = 0.0
    """Rate at the last step, as a share of the peak (0: Loshchilov & Hutter 2017)."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices; vectors are never decayed (AdamW, Loshchilov & Hutter 2019)."""
    clip: float | None = 1.0
    """Largest global gradient norm (GPT-3, Brown et al. 2020, appendix B); None: no clipping."""
    ema_decay: float | None = None
    """Decay of the running average of the weights that is evaluated and kept; None: no average."""
    accumulate: int = 1
    """Parts in which a batch is differentiated one after another, to save memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward passes under autocast; weights and optimizer keep their own type."""
    seed: int = 0
    """Start of every random stream of the run."""

    log_every: int = 10
    """Steps between two lines of metrics, each the mean over these steps."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only after the last step."""
    watch: str = "loss"
    """Held-out metric by which weights are compared."""
    higher_is_better: bool = False
    """Direction of the watched metric."""
    keep_best: bool = False
    """End with the weights of the best evaluation; ``patience`` implies it."""
    patience: int | None = None
    """Evaluations in a row without improvement after which training stops; None: never."""
    checkpoint_every: int = 100
    """Steps between checkpoints: what a killed run repeats at most; 0: only after the last step."""
    keep_checkpoints: int = 2
    """Checkpoints left on disk."""

    def __post_init__(self) -> None:
        at_least = {"steps": 0, "accumulate": 1, "log_every": 1, "keep_checkpoints": 1}
        at_least |= {"evaluate_every": 0, "checkpoint_every": 0, "learning_rate": 0}
        at_least |= {"weight_decay": 0, "seed": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise UserError(f"{name} is {getattr(self, name)}; give a number >= {least}.")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a share from 0 to 1.")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip is {self.clip}; give a norm above 0, or None for no clipping.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; give a number between 0 and 1.")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience is {self.patience}; give a number >= 1, or None.")
        choices = {"schedule": ("cosine", "linear", "constant"), "precision": ("fp32", "bf16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; give {' or '.join(allowed)}.")
