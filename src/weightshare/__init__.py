"""Weight sharing in neural networks: find it, measure it, use it.

``sharing`` says for any PyTorch model which weights are shared by whom and whether their users
agree; every other package is one way of sharing weights. Nothing heavy loads until it is used.
"""

from weightshare._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "sharing": [],
        "audit": [],
        "folding": [],
        "shards": [],
        "equivariant": [],
        "federated": [],
        "language": [],
        "training": [],
        "data": [],
        "report": [],
        "errors": ["UserError"],
    },
)
