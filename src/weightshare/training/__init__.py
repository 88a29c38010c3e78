"""The one training loop: an update changes weights, the loop owns order and survival."""

from weightshare._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "allocation": ["keep_freed_memory"],
        "batches": ["Batches", "EpochBatches", "Zipped"],
        "captured": ["Captured"],
        "checkpoint": [],
        "config": ["LoopConfig"],
        "gradient_update": ["GradientUpdate"],
        "learning_rate": ["schedule"],
        "loop": ["Fit", "Loop"],
        "losses": ["Losses", "Task", "Term", "held_out", "total"],
        "phase": ["Phase", "RunLike"],
        "place": ["Place", "device_of"],
        "randomness": ["Streams", "reseed", "same_streams_after", "streams"],
        "state": ["State", "join", "part"],
        "trees": ["map_tensors", "split", "to_device"],
        "update": ["Sequence", "Update"],
    },
)
