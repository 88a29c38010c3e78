"""Who shares what, who disagrees, and what it would buy to unshare it."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "examine": ["Audit", "audit"],
        "findings": ["Finding"],
        "layers": ["Layer"],
        "unsharing": ["Unsharing"],
        "suggest": ["Suggestion", "predict"],
        "lookalikes": ["Similar", "similar"],
        "apart": ["Apart", "suggest_apart"],
        "budget": ["scales_first", "spend"],
        "unshare": ["apply", "merge"],
        "honesty": ["Probe", "ProbeConfig", "Trial", "probe"],
    },
)
