"""Who shares which weight, what that saves, and how far the users agree."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "uses": ["SharedWeight", "Use", "View", "find_shared", "tie", "untie"],
        "preserve": ["preserved"],
        "sizes": ["Size", "size"],
        "aliases": ["PerUse", "displaced", "per_use", "use"],
        "gradients": [
            "accumulate",
            "all_reduce",
            "by_rows",
            "by_tensor",
            "task_gradients",
            "user_gradients",
        ],
        "sketch": ["CountSketch"],
        "agreement": ["Gram", "mean_agreement", "opposed"],
        "importance": ["Importance", "Joint", "joint", "linear_mix", "mix_for_ess"],
        "grouping": ["Partition", "contiguous", "partition"],
        "splitting": ["Split", "Stable", "split"],
    },
)
