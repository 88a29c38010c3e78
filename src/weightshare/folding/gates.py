r"""Learnable gates: one number per block that says whether the block is needed, learnt together.

The gated forward pass is

.. math:: h_{i+1} = (1 - g_i)\,h_i + g_i\,f_i(h_i), \qquad
          g_i = G_\varepsilon(\theta_i) = \frac{\theta_i^2}{\theta_i^2 + \varepsilon},

the smoothed L0 gate of GDP (ICCV 2021). All weights are frozen; only the N parameters theta train,
on the task loss and the constraint that the gates add up to the blocks that may stay. Because all
gates train at once, two blocks that can replace each other are not both thrown away: as one closes,
the other's gradient grows. Scores that judge every block alone cannot see that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightshare.folding.blocks import BlockLosses, Memo, no_memo
from weightshare.folding.config import GateConfig
from weightshare.folding.families import blocks_of
from weightshare.folding.order import Ranking, ascending
from weightshare.language import distillation_loss, evaluating, next_token_loss

GateLoss = Callable[[Tensor, int], Tensor]
"""``loss(gates, step)``: differentiable scalar of the gates (N,)."""

RAMP = 0.6
"""Share of the steps over which the target moves from all blocks to those that may stay."""
MULTIPLIER_RATE = 0.02
"""Step of the Lagrange multiplier on the constraint gap, in blocks. Gates answer some 20 steps late
(a saturated gate has no slope), so a faster multiplier overshoots and all gates swing."""
SCALE_DECAY = 0.98
"""Of the running maximum of the task gradient, so that the penalty means the same on any model."""
SYMMETRY_NOISE = 0.1
"""Standard deviation of the noise on the initial theta: twins must differ for one to close."""
LATE = 0.2
"""Share of the last steps over which a gate is averaged for its rank: it may still swing at the end
(redundant pairs behind a saturation: 60 of 60 seeds right, 57 of 60 by the last value)."""
CHUNK = 20
"""Steps computed between two memos."""


def gate(theta: Tensor, epsilon: float) -> Tensor:
    """``theta^2 / (theta^2 + epsilon)``; exactly 0 at theta = 0, towards 1 for large theta."""
    square = theta.square()
    return square / (square + epsilon)


def gate_slope(theta: Tensor, epsilon: float) -> Tensor:
    """Derivative of ``gate``: ``2 theta eps / (theta^2 + eps)^2``, largest at sqrt(eps / 3)."""
    return 2 * theta * epsilon / (theta.square() + epsilon).square()


def epsilon_at(step: int, config: GateConfig) -> float:
    """Constant for the first half, then geometric to ``epsilon_end``: annealed too early, the slope
    of a half-open gate vanishes and a wrong choice is frozen."""
    second_half = max(0.0, step / max(1, config.steps - 1) - 0.5) * 2
    return config.epsilon_start * (config.epsilon_end / config.epsilon_start) ** second_half


@contextmanager
def gated(
    model: PreTrainedModel,
    gates: Tensor | Sequence[float] | None,
    mode: Literal["open", "soft", "hard"] = "soft",
) -> Iterator[PreTrainedModel]:
    """Run ``model`` with a gate on every block inside the context.

    Args:
        model: a causal language model; its weights and modes stay as they are.
        gates: (N,) gate values.
        mode: ``open`` bypasses the gates: the model itself, bit for bit. ``soft`` interpolates.
            ``hard`` takes a gate above one half as 1 and the others as 0, literally: bit for bit
            the model without those blocks.
    """
    handles = []
    try:
        if mode != "open":
            assert gates is not None
            for index, block in enumerate(blocks_of(model)):
                handles.append(_gate_block(block, gates[index], mode))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _gate_block(block: nn.Module, value: Any, mode: str) -> Any:
    def apply(_: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any], out: Tensor) -> Any:
        before = inputs[0] if inputs else kwargs["hidden_states"]
        if mode == "hard":
            return out if float(value) > 0.5 else before
        # lerp, because before + g * (out - before) is not out at g = 1 in half precision.
        return torch.lerp(before, out, torch.as_tensor(value).to(out))

    return block.register_forward_hook(apply, with_kwargs=True)


@dataclass
class GateRun:
    """One seed's gates, averaged over the last steps, and their course: one row of N a step."""

    gates: list[float]
    theta: list[float]
    history: list[list[float]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def learn_gates(
    loss: GateLoss,
    blocks: int,
    remove: int,
    config: GateConfig | None = None,
    seed: int = 0,
    costs: Sequence[float] | None = None,
    memo: Memo = no_memo,
) -> GateRun:
    r"""Learn the gates of one seed.

    Minimises ``loss / scale + multiplier * gap + penalty / 2 * gap^2`` (augmented Lagrangian) with
    ``gap = sum_i c_i g_i - target`` in blocks; the multiplier grows by 0.02 gap a step, the target
    moves from all blocks to those that stay, and ``scale`` is a running maximum of the largest task
    gradient of a gate.

    Args:
        loss: the task loss as a function of the gates and the step.
        blocks: number of gates N.
        remove: how many blocks are to go.
        config: see ``GateConfig``.
        seed: of the noise that tells twins apart.
        costs: relative cost of each block, all equal by default.
        memo: keeps the state every ``CHUNK`` steps.
    """
    config = config or GateConfig()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(blocks, generator=generator, dtype=torch.float64) * SYMMETRY_NOISE
    weight = (
        torch.ones(blocks, dtype=torch.float64) if costs is None else torch.tensor(costs).double()
    )
    weight = weight / weight.mean()
    state: dict[str, Any] = {
        "theta": (config.start + noise).tolist(),
        "adam": [[0.0] * blocks, [0.0] * blocks],
        "multiplier": 0.0,
        "scale": 0.0,
        "room": None,
        "history": [],
        "loss": [],
    }
    for start in range(0, config.steps, CHUNK):
        stop = min(start + CHUNK, config.steps)

        def advance(state: dict[str, Any] = state, start: int = start, stop: int = stop) -> Any:
            return _advance(state, loss, weight, remove, config, start, stop)

        state = memo(f"gates of seed {seed} up to step {stop}", advance)
    late = torch.tensor(
        state["history"][-max(1, round(LATE * config.steps)) :], dtype=torch.float64
    )
    return GateRun(late.mean(0).tolist(), state["theta"], state["history"], state["loss"])


def _advance(
    state: dict[str, Any],
    loss: GateLoss,
    weight: Tensor,
    remove: int,
    config: GateConfig,
    start: int,
    stop: int,
) -> dict[str, Any]:
    """Steps ``start`` to ``stop``. State in and out is plain data, so it can be written down."""
    theta = torch.tensor(state["theta"], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=config.learning_rate)
    first, second = (torch.tensor(moment, dtype=torch.float64) for moment in state["adam"])
    adam.state[theta] = {"step": torch.tensor(float(start)), "exp_avg": first, "exp_avg_sq": second}
    multiplier, scale, room = state["multiplier"], state["scale"], state["room"]
    history, course = list(state["history"]), list(state["loss"])
    blocks = len(theta)
    for step in range(start, stop):
        epsilon = epsilon_at(step, config)
        gates = gate(theta.detach(), epsilon).requires_grad_()
        task = loss(gates, step)
        (slope,) = torch.autograd.grad(task, gates)
        slope = slope.double().cpu()
        scale = max(float(slope.abs().max()), SCALE_DECAY * scale)
        done = min(1.0, (step + 1) / max(1.0, RAMP * config.steps))
        opened = float((weight * gates.detach()).sum())
        room = room if room is not None else opened
        gap = opened - (room + done * (blocks - remove - room))
        pressure = max(0.0, multiplier + config.penalty * gap) * weight
        theta.grad = (slope / max(scale, 1e-30) + pressure) * gate_slope(theta.detach(), epsilon)
        adam.step()
        multiplier = max(0.0, multiplier + MULTIPLIER_RATE * gap)
        history.append([round(value, 6) for value in gates.tolist()])
        course.append(float(task.detach()))
    moments = [adam.state[theta]["exp_avg"].tolist(), adam.state[theta]["exp_avg_sq"].tolist()]
    return {
        "theta": theta.detach().tolist(),
        "adam": moments,
        "multiplier": multiplier,
        "scale": scale,
        "room": room,
        "history": history,
        "loss": course,
    }


def average_ranks(runs: Sequence[GateRun]) -> list[float]:
    """Mean rank over seeds of every gate's late average, 0 for the gate that closed most."""
    ranks = torch.zeros(len(runs[0].gates), dtype=torch.float64)
    for run in runs:
        order = torch.tensor(run.gates, dtype=torch.float64).argsort(stable=True)
        ranks[order] += torch.arange(len(order), dtype=torch.float64)
    return (ranks / len(runs)).tolist()


def choose_by_gates(
    loss: GateLoss,
    blocks: int,
    remove: int,
    config: GateConfig | None = None,
    seed: int = 0,
    *,
    protect: Sequence[int] = (),
    judge: Callable[[list[int]], float] | None = None,
    memo: Memo = no_memo,
    loss_of_seed: Callable[[int], GateLoss] | None = None,
) -> tuple[list[int], list[float], list[GateRun]]:
    """Blocks in the order of removal, by the gates of ``config.seeds`` seeds.

    The ranks of the seeds are averaged. As seeds can disagree about which of two redundant blocks
    is the one to drop, the set by averaged ranks and each seed's own set are then judged once by
    the loss without those blocks, and the best of them goes first: seeds + 1 evaluations.

    Args:
        loss: the task loss as a function of the gates and the step.
        blocks, remove, config, seed, memo: as in ``learn_gates``.
        protect: blocks that stay.
        judge: loss without the given blocks; by default ``loss`` at hard gates.
        loss_of_seed: in place of ``loss``, another one for every seed (its own draw of the text).

    Returns:
        (order, averaged ranks, one run per seed).
    """
    config = config or GateConfig()

    def at_hard_gates(removed: list[int]) -> float:
        gates = torch.ones(blocks, dtype=torch.float64)
        gates[removed] = 0
        return float(loss(gates, config.steps).detach())

    judge = judge or at_hard_gates
    seeds = range(seed, seed + config.seeds)
    runs = [
        learn_gates(
            loss_of_seed(one) if loss_of_seed else loss, blocks, remove, config, one, memo=memo
        )
        for one in seeds
    ]
    ranks = average_ranks(runs)
    candidates: list[list[int]] = []
    for scores in (ranks, *(run.gates for run in runs)):
        order = ascending(scores, protect)
        if sorted(order[:remove]) not in [sorted(other[:remove]) for other in candidates]:
            candidates.append(order)
    best = min(candidates, key=lambda order: judge(order[:remove])) if remove else candidates[0]
    return best, ranks, runs


def rank_by_gates(
    losses: BlockLosses,
    remove: int,
    protect: Sequence[int],
    config: GateConfig,
    seed: int,
    say: Callable[[str], None],
) -> Ranking:
    """Gates on a model's blocks; which set is removed is judged on the whole calibration text."""
    model, calibration = losses.model, torch.cat(list(losses.batches))

    def loss_of_seed(one: int) -> GateLoss:
        say(f"gates, seed {one - seed + 1} of {config.seeds}, {config.steps} steps")
        return _model_loss(model, calibration, config, one, protect)

    def judge(removed: list[int]) -> float:
        return losses.of([block for block in range(losses.blocks) if block not in removed])

    with frozen(model), evaluating(model), torch.enable_grad():
        order, ranks, runs = choose_by_gates(
            _model_loss(model, calibration, config, seed, protect),
            losses.blocks,
            remove,
            config,
            seed,
            protect=protect,
            judge=judge,
            memo=losses.memo,
            loss_of_seed=loss_of_seed,
        )
    share = config.sequences / len(losses.batches[0])
    losses.block_runs += round(3 * share * config.steps * config.seeds * losses.blocks)
    return Ranking("gates", ranks, order, {"runs": [asdict(run) for run in runs]})


def _model_loss(
    model: PreTrainedModel,
    calibration: Tensor,
    config: GateConfig,
    seed: int,
    protect: Sequence[int],
) -> GateLoss:
    """The gated model's loss on a few calibration sequences drawn anew each step."""
    fixed = torch.zeros(len(blocks_of(model)), dtype=torch.bool)
    fixed[list(protect)] = True

    def loss(gates: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randperm(len(calibration), generator=generator)[: config.sequences]
        ids = calibration[rows].to(model.device)
        # A protected block stays open whatever its gate says; it gets no task gradient.
        used = torch.where(fixed, torch.ones_like(gates), gates).to(model.device)
        with gated(model, used):
            logits = model(input_ids=ids, use_cache=False).logits
        if config.objective == "ce":
            total, count = next_token_loss(logits, ids)
        else:
            with torch.no_grad():
                teacher = model(input_ids=ids, use_cache=False).logits
            total, count = distillation_loss(
                logits, teacher, torch.ones_like(ids, dtype=torch.bool)
            )
        return total / count

    return loss


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
