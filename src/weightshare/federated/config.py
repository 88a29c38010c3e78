"""Settings of a federation. Standard library only: ``weightshare federate --help`` reads this."""

from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from weightshare.errors import UserError

PartitionName = Literal["uniform", "power", "classes", "dirichlet", "uni", "pow", "cla"]
SHORT: dict[str, Any] = {"uni": "uniform", "pow": "power", "cla": "classes"}
"""The paper's names of the partitions."""

KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
}


def _check_kinds(config: Any) -> None:
    """Refuse a value that is not what its field is declared to be."""
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise UserError(f"{name} is {value!r}; give one of {', '.join(choices)}.")
        if hint in KINDS:
            kind, said = KINDS[hint]
            if not isinstance(value, kind) or isinstance(value, bool) != (hint is bool):
                raise UserError(f"{name} is {value!r}; give {said}.")


@dataclass(frozen=True)
class ReputationConfig:
    """The rules by which updates become reputations, and reputations rewards.

    Defaults are RFFL's (Xu & Lyu, arXiv 2011.10464) where its text and its code agree, and safer
    where they do not; ``ReputationConfig.reference()`` is the authors' code.

    Args:
        normalisation: clip long updates to norm, or bring every update to exactly that length.
        norm: the length (0.5 for MNIST-sized problems in the paper).
        start: reputation before the first round: zero, uniform, or the attested shares of samples.
        first_weights: weights of the first aggregate: uniform, attested shares of samples, or those
            with none above twice the mean (capped).
        smoothing: share of the old reputation that is kept each round (0.95 in the paper).
        smooth_shares: mix in the cosines' shares, whose sum is one, so that the memory is exactly
            smoothing; otherwise it gets shorter as participants get more.
        falling: share of the old reputation that is kept where a participant's share of the cosines
            is below it, so that reputation falls faster than it rises; 0 is smoothing for both.
        turn: sum of falls of a cosine below its own first rounds, beyond the median participant's
            and 0.1 a round, from which a participant counts as below the threshold: a late turn, or
            staying just above it. 0 does not look; 1 is about two rounds of a flipped sign.
        threshold: a participant below threshold divided by the number of live ones is removed
            (1/3 in the paper).
        patience: rounds a participant is assessed before it can be removed (10 in the paper).
        probation: rounds in which everyone keeps its own updates and is paid nothing; then models
            are examined on trusted samples, and those that pass go on from their mean.
        gate: withhold the whole reward from whoever is below the threshold, from the first round.
        reward: quota of a participant: reputation relative to the best (relative), the same through
            tanh (tanh, as CGSV), or everything (full).
        altruism: slope of the tanh; the larger, the more equal the quotas.
        quota: the largest entries of the whole aggregate (global), or of each tensor (layer, as the
            reference's code).
        keep_own: a participant keeps its own (clipped) update beside the reward.
        subtract_own: take a participant's own share out of its reward.
        leave_one_out: compare an update with the aggregate of the others.
        clamp: least reputation before normalising (0; CGSV's code 0.001).
        duplicates: updates of at least this cosine are copies and share one vote; 0 looks for none.
        copies: copies share one credit as well (share), or get none (none). With none, whoever
            could see another's update within the round could have it removed by copying it.
        longest: an update longer than this many times norm is invalid; 0 is no limit.
        budget: most removals within window rounds; 0 is no limit.
        window: rounds over which the budget counts.
        quorum: live participants below whose number nobody is removed.
        misses: rounds in a row without a valid answer after which a participant is inactive.
        observe: say who would be removed and remove nobody.
    """

    normalisation: Literal["clip", "exact"] = "clip"
    norm: float = 0.5
    start: Literal["zero", "uniform", "attested"] = "zero"
    first_weights: Literal["uniform", "attested", "capped"] = "uniform"
    smoothing: float = 0.95
    smooth_shares: bool = False
    falling: float = 0.0
    turn: float = 0.0
    threshold: float = 1 / 3
    patience: int = 10
    probation: int = 0
    gate: bool = True
    reward: Literal["relative", "tanh", "full"] = "relative"
    altruism: float = 1.0
    quota: Literal["global", "layer"] = "global"
    keep_own: bool = True
    subtract_own: bool = False
    leave_one_out: bool = False
    clamp: float = 0.0
    duplicates: float = 0.0
    copies: Literal["share", "none"] = "share"
    longest: float = 0.0
    budget: int = 0
    window: int = 10
    quorum: int = 1
    misses: int = 5
    observe: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        ranges = {
            "smoothing": (0, 1),
            "falling": (0, self.smoothing),
            "turn": (0, None),
            "threshold": (0, 1),
            "clamp": (0, 1),
            "duplicates": (0, 1),
            "longest": (0, None),
            "patience": (0, None),
            "probation": (0, None),
            "budget": (0, None),
            "window": (1, None),
            "quorum": (1, None),
            "misses": (1, None),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                allowed = f"a number >= {low}" if high is None else f"a number from {low} to {high}"
                raise UserError(f"{name} is {value}; give {allowed}.")
        for name in ("norm", "altruism"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0.")
        if self.normalisation == "exact" and not isfinite(self.norm):
            raise UserError("An infinite norm cannot be exact; give a number, or clip.")
        if self.smoothing == 1 and self.start == "zero":
            raise UserError(
                "smoothing is 1 and reputations start at zero, so they would never move; "
                "give a smoothing below 1 or another start."
            )

    @classmethod
    def reference(cls) -> "ReputationConfig":
        """The authors' code: attested first weights, quota per tensor, nothing withheld early."""
        return cls(first_weights="attested", quota="layer", gate=False)

    @classmethod
    def cgsv(cls, altruism: float = 1.0) -> "ReputationConfig":
        """CGSV (Xu et al., NeurIPS 2021): exact normalisation, no own update, quota by tanh."""
        return cls(
            normalisation="exact",
            start="uniform",
            keep_own=False,
            clamp=1e-3,
            reward="tanh",
            altruism=altruism,
            gate=False,
        )

    @classmethod
    def robust(cls) -> "ReputationConfig":
        """The one setting of our tables: no own update, no self-credit, copies get nothing, and
        first weights from attested sizes (an attacking majority with less data loses by them)."""
        return cls(
            norm=1.0,
            first_weights="attested",
            keep_own=False,
            smooth_shares=True,
            leave_one_out=True,
            duplicates=0.98,
            copies="none",
            longest=1e3,
        )

    @classmethod
    def examined(cls) -> "ReputationConfig":
        """``robust``, and an examination on trusted samples before anybody is paid."""
        return replace(cls.robust(), probation=10)


@dataclass
class FederateConfig:
    """Train a federation in which contribution earns the model and attackers lose it.

    Args:
        data: digits (ships with the library), or mnist, fashion_mnist or movie_reviews in
            WEIGHTSHARE_DATA; with model, a folder with a text file for each participant, or JSON
            lines with "domain" and "text".
        model: a language model of which an adapter is federated: a Hugging Face folder, a GGUF
            file, or a known name (tiny). Each domain of the text is an honest participant.
        adapter: what is trained of the model, all its linear layers: LoRA or a mixture of shards.
        equivalent_rank: with model, as many weights travel as LoRA of this rank has.
        length: with model, tokens of a sample.
        participants: honest participants (with model, as many as there are domains).
        partition: how the samples are dealt: equal parts (uniform, or uni), sizes on a line from 1
            to 16 (power, or pow), 1 to all classes (classes, or cla), or class shares from a
            Dirichlet law.
        attack: what the adversaries do.
        adversaries: how many, beside the honest ones; each holds half an honest share of samples.
        strategy: the server's rule. reputation, reference, cgsv, robust and examined are settings
            of RFFL's; the others send everyone the same model.
        rounds: rounds of training.
        epochs: passes over the own samples in a round.
        batch_size: samples per local step.
        learning_rate: of plain SGD; where it is not given 0.15 (the paper's for MNIST), and 1 for
            digits, on which federated averaging is best so (measured: .970 against .936 at 0.3);
            1 for movie_reviews too (.676 after 10 rounds against .561 at 0.3). Adapters are
            trained by AdamW, at 1e-3 (lora) or 2e-3 (mos).
        decay: of the learning rate, per local epoch.
        hidden: width of the hidden layer; for texts of a word, and kernels of each length.
        samples: training samples over all participants; 0 takes all there are.
        root_samples: trusted samples at the server (fltrust and examined need them; robust uses
            them if given).
        training: one participant after another (loop) or all at once (stacked).
        observe: say who would be removed and remove nobody.
        turn: also remove whoever's cosines have fallen this far below its own first rounds, added
            up; 0 does not look, 1 is about two rounds of a flipped sign.
        checkpoint_every: rounds between the server's checkpoints.
        out: the run directory.
        resume: go on with a run that was interrupted.
        dry_run: say what would be done, and stop.
        seed: of everything random.
        device: where participants are trained all at once; one federation of this size is
            quickest on the CPU.
    """

    data: str
    model: str | None = None
    adapter: Literal["lora", "mos"] = "lora"
    equivalent_rank: int = 2
    length: int = 128
    participants: int = 10
    partition: PartitionName = "uniform"
    attack: Literal[
        "none",
        "free_rider",
        "label_flip",
        "sign_randomise",
        "rescale",
        "value_invert",
        "sign_flip",
        "scaled",
        "inner_product",
        "alie",
        "identical",
        "mimic",
        "replay",
        "zero",
        "late",
        "count_lie",
    ] = "none"
    adversaries: int = 0
    strategy: Literal[
        "reputation",
        "reference",
        "cgsv",
        "robust",
        "examined",
        "fedavg",
        "qfedavg",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "foolsgold",
        "fltrust",
    ] = "reputation"
    rounds: int = 30
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    decay: float = 0.977
    hidden: int = 64
    samples: int = 0
    root_samples: int = 0
    training: Literal["loop", "stacked"] = "stacked"
    observe: bool = False
    turn: float = 0.0
    checkpoint_every: int = 5
    out: str = "runs/federate"
    resume: bool = False
    dry_run: bool = False
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "cpu"

    def __post_init__(self) -> None:
        self.partition = SHORT.get(self.partition, self.partition)

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            UserError: a number out of range, or options that do not go together.
        """
        _check_kinds(self)
        least = {
            "participants": 1,
            "adversaries": 0,
            "rounds": 1,
            "epochs": 1,
            "batch_size": 1,
            "hidden": 1,
            "equivalent_rank": 1,
            "length": 2,
            "samples": 0,
            "root_samples": 0,
            "checkpoint_every": 1,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                option = name.replace("_", "-")
                raise UserError(
                    f"--{option} is {getattr(self, name)}; give a whole number >= {low}."
                )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"--learning-rate is {self.learning_rate}; give a number above 0.")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay is {self.decay}; give a number above 0 and at most 1.")
        if self.adversaries and self.attack == "none":
            raise UserError(
                f"--adversaries is {self.adversaries} but no attack is given; add --attack NAME."
            )
        if self.attack != "none" and not self.adversaries:
            raise UserError(f"--attack {self.attack} needs adversaries; add --adversaries N.")
        if self.strategy in ("fltrust", "examined") and not self.root_samples:
            raise UserError(
                f"{self.strategy} compares with trusted samples at the server; add --root-samples, "
                "as 50."
            )
        if self.strategy == "examined" and self.model:
            raise UserError(
                "examined looks at losses by class, which text has not; choose --strategy robust."
            )
        if self.model and (self.attack == "label_flip" or self.partition != "uniform"):
            option = "--attack label_flip" if self.attack == "label_flip" else "--partition"
            raise UserError(
                f"{option} is for labelled samples, which text by domain has not; leave it out."
            )
        if self.device == "cuda" and self.training == "loop" and not self.model:
            raise UserError(
                "--training loop trains one participant after another on the CPU; leave out "
                "--device cuda, or choose --training stacked."
            )
        if self.rules() is None and (self.observe or self.turn):
            raise UserError(
                f"--{'observe' if self.observe else 'turn'} watches reputations, which "
                f"{self.strategy} has not; leave it out or choose --strategy reputation."
            )

    def rate(self) -> float:
        """The learning rate to use."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.model:
            return {"lora": 1e-3, "mos": 2e-3}[self.adapter]
        return {"digits": 1.0, "movie_reviews": 1.0}.get(Path(self.data).name, 0.15)

    def rules(self) -> ReputationConfig | None:
        """The reputation rules of the strategy; None where it has none."""
        presets = {
            "reputation": ReputationConfig(),
            "reference": ReputationConfig.reference(),
            "cgsv": ReputationConfig.cgsv(),
            "robust": ReputationConfig.robust(),
            "examined": ReputationConfig.examined(),
        }
        found = presets.get(self.strategy)
        return replace(found, observe=self.observe, turn=self.turn) if found else None


@dataclass(frozen=True)
class LocalConfig:
    """How a participant trains between two rounds.

    The learning rate of local epoch e (counted over all rounds) is ``learning_rate * decay ** e``;
    order of samples and rate are functions of the round, so a participant that has lost everything
    but its data goes on as before. Participants in one stack are trained by plain SGD only.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 0.15
    decay: float = 0.977
    seed: int = 0
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name, low in {"epochs": 1, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}; give a whole number >= {low}.")
        if not (self.learning_rate > 0 and 0 < self.decay <= 1):
            raise UserError(
                f"learning_rate is {self.learning_rate} and decay {self.decay}; give a number "
                "above 0, and one above 0 and at most 1."
            )
