"""Robust and fair federated learning (RFFL) on Flower: contribution earns the model.

After "Robust and Fair Federated Learning" (Xu & Lyu, arXiv 2011.10464). Participants end with
different models: one reputation, the smoothed cosine between an update and the aggregate, weighs
the aggregate, says how much of it a participant gets back, and removes attackers, without a
validation set.
"""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["FederateConfig", "LocalConfig", "ReputationConfig"],
        "strategy": ["ReputationStrategy"],
        "roster": ["Roster"],
        "grid": ["InProcessGrid"],
        "participant": ["client_app"],
        "federation": ["run_rounds"],
        "simulation": ["simulate"],
        "rules": ["FLTrust", "FoolsGold", "GeometricMedian"],
        "local": ["Classifier", "LoopTraining"],
        "stacked": ["StackedTraining"],
        "adapters": ["Adapter", "NextToken"],
        "standing": ["Standing"],
        "reputation": ["Assessment", "assess"],
        "rewards": ["Rewards", "entries_for"],
        "attacks": ["ATTACKS", "Attack"],
        "partitions": ["Shards", "deal"],
        "measures": ["Fairness", "fairness"],
    },
)
