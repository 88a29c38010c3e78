"""Who shares which weight, what that saves, and how far the users agree."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "uses": ["SharedWeight", "Use", "View", "find_shared", "tie", "untie"],
        "sizes": ["Size", "size"],
        "grouping": ["contiguous"],
    },
)
