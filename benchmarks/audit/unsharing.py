"""Does the audit name what is worth unsharing? On folded language models, at equal budget.

For each model, fold, moment and seed: fold, audit, spend one parameter budget (a share of what the
fold saved) in different ways, train all weights for the same steps on the same batches. Held-out
loss decides. At the moment *folded* the audit comes right after folding; at *cured* the shared
weights have been trained before.

    audit (adam)        most predicted gain within the budget, in Adam's metric
    audit (plain)       the same in the plain metric
    trial               most credit within the budget after a trial of 50 steps that trains all uses
                        apart (weightshare.audit.apart)
    lowest cosine       low-rank deltas where uses agree least
    random              tensors, kinds and groups at random
    first / last        low-rank deltas from the first (last) tensors on, of a rank with which all
                        of them would cost three budgets
    everywhere          low-rank deltas of one rank on every tensor
    scales              private scales on every tensor
    common scales       scales on every tensor that all its uses share: nothing is unshared
    scales and copies   private scales on every tensor, and copies by the trial for what is left
    nothing             the shared weights alone

*Far* follows a prediction to the end of its parabola, and not only as far as a tenth of the
weights' norm. The honesty clause
follows: suggested and random unsharings one at a time, predicted against realised gain, with the
rank correlation, and beside it that of the number of added parameters.

There is more training text than the steps read, so that nothing is seen twice.

    python benchmarks/audit/unsharing.py [--quick] [--device cuda --capture] [--only tiny]

A setting takes 2 minutes on a GPU and 5 to 25 on a CPU core; ``--part i/n --out FILE`` and
``--join`` split them over processes, and every way to spend is a row of its own. Models and texts
are found through WEIGHTSHARE_MODELS and WEIGHTSHARE_DATA (``--only tiny`` needs neither).
"""

import argparse
import copy
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _summary import summary
from _table import Table

from weightshare.audit import Apart, ProbeConfig, Suggestion, Unsharing, apply, audit, probe, spend
from weightshare.audit.honesty import _Cycle, _MeanLoss
from weightshare.audit.language import language_loss, text_batches
from weightshare.audit.suggest import found_groups, predict
from weightshare.cli.console import show_table
from weightshare.folding import Delta, FoldPlan, fold
from weightshare.folding.share import replan
from weightshare.language import load_model, read_documents, windows
from weightshare.sharing import size
from weightshare.training import Captured, GradientUpdate, Loop, LoopConfig

PYTHON = "stdlib", "pystdlib"
STORIES = "tinystories/v2_train.jsonl.gz", "tinystories/v2_valid.jsonl.gz"
CASES = [
    # model, text to train on and held-out text, groups of blocks
    ("tiny", PYTHON, ((2, 3, 4, 5), (6, 7, 8, 9))),
    ("tiny", PYTHON, ((2, 3), (5, 6), (8, 9))),
    ("tiny", PYTHON, ((2, 3, 4, 5, 6, 7, 8, 9, 10),)),
    ("stories260K", STORIES, ((1, 2), (3, 4))),
    ("stories260K", STORIES, ((1, 2, 3),)),
    ("babyllama105", STORIES, ((1, 2), (3, 4))),
]
MOMENTS = ("folded", "cured")
SEEDS = (0, 1, 2)
STEPS = {"cure": 400, "spend": 150, "probe": 30, "trial": 50}
QUICK = {"cure": 10, "spend": 5, "probe": 3, "trial": 3}
RATES = {"tiny": 2e-3, "stories260K": 2e-3, "babyllama105": 1e-3}
"""Learning rates: the best of 1e-3, 2e-3 and 4e-3 without unsharing. At a lower one most of what a
delta gains is that it moves faster than the weight it is added to."""
RANKS = (2, 8, 32)
KINDS = [("unshare", 0), *(("low_rank", rank) for rank in RANKS)]
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="models whose name begins so")
    parser.add_argument("--moment", choices=(*MOMENTS, "both"), default="both")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--budget", type=float, default=0.1, help="share of the saved parameters")
    parser.add_argument("--ways", default="", help="only these, separated by semicolons")
    parser.add_argument("--no-clause", action="store_true", help="without the honesty clause")
    parser.add_argument("--capture", action="store_true", help="training steps as CUDA graphs")
    table = Table("audit_unsharing", __doc__, parser)
    options = table.options
    torch.set_num_threads(1)
    steps = QUICK if table.quick else STEPS
    table.facts["settings"] = {
        "steps": steps,
        "learning_rate": RATES,
        "budget": options.budget,
        "ranks": RANKS,
    }
    if options.join:
        table.facts["command"] = "python benchmarks/audit/unsharing.py, rows of several processes"
    cases = [case for case in CASES if case[0].startswith(options.only)]
    if table.quick:
        cases = [("tiny", ("pystdlib", "pystdlib"), ((3, 4),))]
    moments = MOMENTS if options.moment == "both" else (options.moment,)
    settings = [
        Setting(*case, moment, seed, options)
        for moment in moments
        for seed in (SEEDS[:1] if table.quick else options.seeds)
        for case in cases
    ]
    ways = options.ways.split(";") if options.ways else list(WAYS)
    for number, setting in enumerate(settings, start=1):
        for way in ways:
            table.row(f"{setting}: {way}", lambda s=setting, w=way: s.spent(w), number)
        if not options.no_clause:
            table.row(f"{setting}: clause", setting.clause, number)
        setting.forget()
        if table.rows:
            table.facts |= summary(table.rows, list(WAYS))
            table.write()
    for part, title in (
        ("spent", "bought at one budget"),
        ("against", "paired"),
        ("clause", "predicted and realised"),
    ):
        if rows := table.facts.get(part):
            show_table(title, [{k: _short(v) for k, v in row.items()} for row in rows])
    if table.left_out:
        print("not run for lack of time:", "; ".join(table.left_out))


@lru_cache(1)
def load(name, texts, device, quick):
    """A model, shuffled batches to train on and held-out ones."""
    # Stored in bfloat16, steps of training would vanish in the weights.
    source = load_model(name, dtype="fp32", device=device)
    documents, others = (read_documents(text) for text in texts)
    length, size_of = (64, 4) if quick else (LENGTH, 8)
    random.Random(0).shuffle(documents)
    steps = sum((QUICK if quick else STEPS)[part] for part in ("cure", "spend"))
    train = windows(source.tokenizer, documents, length, limit=steps * size_of)
    train = text_batches(train, len(train) // size_of, size_of, device)
    heldout = windows(source.tokenizer, others, length)
    heldout = text_batches(heldout, 4 if quick else 16, size_of, device)
    return source.model, train, heldout


@dataclass(eq=False)
class Setting:
    """One model, fold, moment and seed; what its rows need in common is worked out when asked."""

    name: str
    texts: tuple[str, str]
    groups: tuple[tuple[int, ...], ...]
    moment: str
    seed: int
    options: argparse.Namespace

    def __str__(self):
        return f"{self.name}, {[list(g) for g in self.groups]}, {self.moment}, seed {self.seed}"

    def forget(self):
        """Free what was worked out."""
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                self.__dict__.pop(name, None)

    @cached_property
    def steps(self):
        return QUICK if self.options.quick else STEPS

    @cached_property
    def loaded(self):
        device = torch.device(self.options.device)
        source, train, heldout = load(self.name, self.texts, device, self.options.quick)
        train = list(train)
        random.Random(self.seed).shuffle(train)
        return source, train, heldout

    @property
    def heldout(self):
        return self.loaded[2]

    @cached_property
    def parts(self):
        """Batches to cure with and to spend with: the latter are also audited."""
        train, cut = self.loaded[1], self.steps["spend"]
        return train[cut:] or train, train[:cut]

    @property
    def audited(self):
        return self.parts[1][: 4 if self.options.quick else 32]

    @cached_property
    def model(self):
        source = self.loaded[0]
        model = fold(source, FoldPlan(source.config.num_hidden_layers, groups=self.groups))
        if self.moment == "cured":
            self.fit(model, self.parts[0], "cure")
        return model

    @cached_property
    def found(self):
        return audit(
            self.model,
            self.audited,
            language_loss,
            per="tensor",
            seed=self.seed,
            suggestions=False,
            draws=50,
        )

    @cached_property
    def offers(self):
        """Every kind of unsharing of every tensor of the blocks and of the head."""
        offers = [
            Unsharing(kind, f.layer, groups, rank)
            for f in self.found.findings
            if (groups := found_groups(f)) is not None
            for kind, rank in KINDS
        ]
        return offers[:8] if self.options.quick else offers

    @cached_property
    def adam(self):
        return self.predicted("adam")

    @cached_property
    def plain(self):
        return self.predicted("plain")

    def predicted(self, metric):
        return predict(self.model, self.audited, language_loss, self.offers, metric=metric, bends=1)

    @cached_property
    def apart(self):
        """A trial on batches that will be trained on, but not those that are audited."""
        train = self.parts[1]
        return Apart(
            self.model,
            train[len(self.audited) :][: self.steps["trial"]] or train,
            self.audited,
            language_loss,
            [f.layer for f in self.found.findings],
            learning_rate=RATES[self.name],
            seed=self.seed,
        )

    @cached_property
    def tried(self):
        """Suggestions by what the trial credits them with."""
        groups = self.apart.groups([f.layer for f in self.found.findings])
        return self.apart.predict(
            [
                Unsharing(kind, layer, mine, rank)
                for layer, mine in groups.items()
                if mine is not None
                for kind, rank in KINDS
            ]
        )

    @cached_property
    def budget(self):
        saved = size(self.model).saved - self.model.get_input_embeddings().weight.numel()
        return int(self.options.budget * saved)

    @cached_property
    def facts(self):
        """What every row says."""
        device = torch.device(self.options.device)
        return {
            "model": self.name,
            "groups": self.groups,
            "moment": self.moment,
            "seed": self.seed,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "dense": held(self.loaded[0], self.heldout),
            "start": held(self.model, self.heldout),
            "budget": self.budget,
        }

    def fit(self, model, batches, purpose):
        config = LoopConfig(
            steps=self.steps[purpose],
            learning_rate=RATES[self.name],
            weight_decay=0.0,
            seed=self.seed,
        )
        update = GradientUpdate.from_config(_MeanLoss(model, language_loss), config)
        update = Captured(update) if self.options.capture else update
        Loop(update, _Cycle(batches), config, progress=False).fit()
        model.eval()

    def spent(self, way):
        """Held-out loss after the budget was spent in one way and all weights were trained."""
        chosen = WAYS[way](self)
        student = copy.deepcopy(self.model)
        for unsharing in chosen:
            apply(student, unsharing, seed=self.seed)
        if way == "common scales":
            give_common_scales(student)
        added = size(student).unique - size(self.model).unique
        self.fit(student, self.parts[1], "spend")
        plain = [s.unsharing if isinstance(s, Suggestion) else s for s in chosen]
        return self.facts | {
            "way": way,
            "added": added,
            "loss": held(student, self.heldout),
            "chosen": [f"{u.layer.name}: {u.kind} {u.rank}" for u in plain],
        }

    def clause(self):
        """Single unsharings, suggested and random: predicted and realised gain."""
        config = ProbeConfig(
            suggested=2 if self.options.quick else 4,
            random=2 if self.options.quick else 6,
            steps=self.steps["probe"],
            learning_rate=RATES[self.name],
            seed=self.seed,
        )
        best = sorted(self.adam, key=lambda s: -s.gain_per_parameter)
        best = [s for s in best if s.unsharing.rank in (0, 8)]
        found = replace(self.found, suggestions=best)
        tried = probe(self.model, self.audited, self.heldout, language_loss, found, config).trials
        trials = [
            t.row()
            | {
                "adam": t.suggestion.predicted,
                "adam, far": far(t.suggestion).predicted,
                "trial": -credited.slope,
                "gain": t.realised,
            }
            for t, credited in zip(
                tried, self.apart.predict([t.suggestion.unsharing for t in tried]), strict=True
            )
        ]
        return self.facts | {
            "trials": trials,
            "agreement": {f.layer.name: round(f.agreement, 3) for f in self.found.findings},
            "advised": [f.layer.name for f in self.found.findings if f.split.advised],
        }

    # Deltas in an order -------------------------------------------------------------------------

    @cached_property
    def disagreeing(self):
        """Low-rank deltas of the tensors of the blocks, the least agreeing first."""
        return [
            u for u in self.offers if (u.kind, u.rank) == ("low_rank", RANKS[0]) and in_block(u)
        ]

    @property
    def by_depth(self):
        return sorted(self.disagreeing, key=lambda u: u.layer.name)

    def of_rank(self, unsharings, rank):
        return [replace(u, rank=rank) for u in unsharings]

    def large(self, unsharings):
        """From the first on, of a rank with which all of them would cost three budgets."""
        wanted = 3 * self.budget
        rank = next(
            (r for r in range(1, 65) if self.cost(self.of_rank(unsharings, r)) >= wanted), 64
        )
        return self.fill(self.of_rank(unsharings, rank))

    def everywhere(self):
        ranks = [
            r for r in range(1, 65) if self.cost(self.of_rank(self.by_depth, r)) <= self.budget
        ]
        return self.of_rank(self.by_depth, max(ranks, default=1))

    def at_random(self):
        """A random choice that spends nine tenths of the budget; else the dearest of a thousand."""
        generator, best = random.Random(self.seed), []
        for _ in range(1000):
            chosen = self.fill(generator.sample(self.offers, len(self.offers)))
            if self.cost(chosen) > self.cost(best):
                best = chosen
            if self.cost(best) >= 0.9 * self.budget:
                break
        return best

    def fill(self, unsharings):
        """Take unsharings of the blocks in order while they fit, each tensor once."""
        chosen, left, taken = [], self.budget, set()
        for unsharing in unsharings:
            if unsharing.layer not in taken and in_block(unsharing):
                cost = self.cost([unsharing])
                if cost <= left:
                    chosen.append(unsharing)
                    taken.add(unsharing.layer)
                    left -= cost
        return chosen

    def cost(self, unsharings):
        for unsharing in unsharings:
            if unsharing not in self.costs:
                self.costs[unsharing] = unsharing.added(self.model)
        return sum(self.costs[unsharing] for unsharing in unsharings)

    @cached_property
    def costs(self):
        return {}

    def scales(self):
        return [replace(u, kind="scale", rank=0) for u in self.by_depth]

    def copies(self, budget):
        return self.buy([s for s in self.tried if s.unsharing.kind == "unshare"], budget)

    def buy(self, suggestions, budget=None):
        offers = [s for s in suggestions if in_block(s.unsharing)]
        return spend(offers, self.budget if budget is None else budget)


def in_block(unsharing):
    return "layers" in unsharing.layer.name


def give_common_scales(model):
    """One scale for all uses of each tensor, in place: a change of parameters, not of sharing."""
    plan = FoldPlan.from_dict(model.config.fold_plan)
    names = [name for name, p in model.model.layers[0].named_parameters() if p.ndim > 1]
    deltas = [Delta(name, group, "scale") for group in plan.shared_groups for name in names]
    replan(model, replace(plan, deltas=tuple(deltas)))


def far(suggestion):
    """The prediction with its parabola followed to the end."""
    return replace(suggestion, longest=math.inf)


WAYS: dict[str, Callable[[Setting], list]] = {
    "nothing": lambda s: [],
    "random": Setting.at_random,
    "everywhere": Setting.everywhere,
    "scales": Setting.scales,
    "common scales": lambda s: [],
    "scales and copies": lambda s: [*s.scales(), *s.copies(s.budget - s.cost(s.scales()))],
    "first": lambda s: s.large(s.by_depth),
    "last": lambda s: s.large(s.by_depth[::-1]),
    "lowest cosine": lambda s: s.large(s.disagreeing),
    "audit (adam)": lambda s: s.buy(s.adam),
    "audit (adam, far)": lambda s: s.buy(map(far, s.adam)),
    "audit (plain)": lambda s: s.buy(s.plain),
    "trial": lambda s: s.buy(s.tried),
}


@torch.no_grad()
def held(model, batches):
    return sum(float(language_loss(model, batch)) for batch in batches) / len(batches)


def _short(value):
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
