"""FoldGPT for Hugging Face causal LMs: remove blocks, share the weights of others, cure.

After the paper "FoldGPT: Simple and Effective Large Language Model Compression Scheme"
(arXiv 2407.00928), which has no official code: what it leaves open is decided here and measured.
"""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "config": ["CureConfig", "FoldConfig", "GateConfig", "RANKINGS"],
        "plans": ["BlockSizes", "FoldPlan"],
        "deltas": ["Delta"],
        "order": ["Ranking"],
        "rankings": ["rank"],
        "planner": ["plan"],
        "gates": ["choose_by_gates", "gated", "learn_gates"],
        "share": ["fold", "replan", "unfold"],
        "curing": ["cure"],
        "influence": ["similarity"],
        "facts": [],
        "figures": [],
    },
)
