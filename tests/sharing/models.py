"""Models that share weights in every way there is, each with a twin that shares nothing."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weightshare.sharing import tie, use


class Looped(nn.Module):
    """ALBERT-style: one block runs four times."""

    def __init__(self, depth: int = 4, checkpointing: bool = False, unshared: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 6)
        blocks = [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks if unshared else blocks[:1])
        self.depth, self.checkpointing = depth, checkpointing
        self.reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for i in range(self.depth):
            block = self.blocks[i % len(self.blocks)]
            if self.checkpointing:
                x = x + torch.tanh(checkpoint(block, x, use_reentrant=self.reentrant))
            else:
                x = x + torch.tanh(block(x))
        return x


class Recurrent(nn.Module):
    """One encoder layer runs three times; its attention reads the weights of a child it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for _ in range(3):
            x = self.layer(x)
        return x


class TwoModules(nn.Module):
    """Two modules hold one Parameter."""

    def __init__(self, checkpointing: bool = False, unshared: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.checkpointing = checkpointing
        if not unshared:
            tie(self, [["a.weight", "b.weight"]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing:
            return checkpoint(lambda x: self.b(torch.tanh(self.a(x))), x, use_reentrant=False)
        return self.b(torch.tanh(self.a(x)))


class TiedHead(nn.Module):
    """The head reads the embedding's matrix, transposed, from another module."""

    def __init__(self, checkpointing: bool = False, unshared: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Embedding(11, 5) if unshared else None
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.embedding if self.head is None else self.head).weight
        hidden = self.embedding(x.abs().mul(3).long())
        if self.checkpointing:
            hidden = checkpoint(self.mix, hidden, use_reentrant=False)
        else:
            hidden = self.mix(hidden)
        assert weight.shape == (11, 5)  # reading a property is not a use
        return hidden @ weight.T


class Cropped(nn.Module):
    """Two operations read centre crops of one kernel."""

    def __init__(self, checkpointing: bool = False, unshared: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 1, 5))
        self.second = nn.Parameter(torch.randn(1, 1, 5)) if unshared else None
        self.checkpointing = checkpointing

    def shared_uses(self):
        if self.second is not None:
            return {}
        return {"weight": {"3": lambda w: w[..., 1:4], "5": lambda w: w}}

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        small = use(self.weight, "3") if self.second is None else self.weight
        large = use(self.weight, "5") if self.second is None else self.second
        x = torch.tanh(F.conv1d(x, small[..., 1:4], padding=1))
        return F.conv1d(x, large, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten()[None, None]
        if self.checkpointing:
            return checkpoint(self.convolve, x, use_reentrant=False)
        return self.convolve(x)


class Sliced(nn.Module):
    """Two widths of one layer: the narrow one reads the first rows and columns of the weight."""

    def __init__(self, checkpointing: bool = False, unshared: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.second = nn.Parameter(torch.randn(3, 3)) if unshared else None
        self.checkpointing = checkpointing

    def shared_uses(self):
        if self.second is not None:
            return {}
        return {"weight": {"narrow": lambda w: w[:2, :2], "wide": lambda w: w}}

    def widths(self, x: torch.Tensor) -> torch.Tensor:
        narrow = use(self.weight, "narrow") if self.second is None else self.weight
        wide = use(self.weight, "wide") if self.second is None else self.second
        return torch.tanh(x @ wide.T)[:, :2] @ narrow[:2, :2].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointing:
            return checkpoint(self.widths, x, use_reentrant=False)
        return self.widths(x)


# model, name of the shared weight, the names that take its place in the unshared twin, use by use
SHARED = [
    (Looped, "blocks.0.1.weight", [f"blocks.{i}.1.weight" for i in range(4)]),
    (Looped, "blocks.0.0.bias", [f"blocks.{i}.0.bias" for i in range(4)]),
    (TwoModules, "a.weight", ["a.weight", "b.weight"]),
    (TiedHead, "embedding.weight", ["embedding.weight", "head.weight"]),
    (Cropped, "weight", ["weight", "second"]),
    (Sliced, "weight", ["weight", "second"]),
]


def twins(kind, name, places, checkpointing=False):
    """A shared model and its unshared twin with equal weights, in double precision."""
    torch.manual_seed(0)
    shared = kind(checkpointing=checkpointing).double()
    unshared = kind(unshared=True).double()
    source = dict(shared.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for full, parameter in unshared.named_parameters():
            if full in places:
                parameter.copy_(source[name])
            elif full in source:
                parameter.copy_(source[full])
            else:  # another block of the looped model
                parameter.copy_(source[f"blocks.0.{full.split('.', 2)[2]}"])
    return shared, unshared


def batch(seed=0, rows=5, dtype=torch.float64):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, x):
    return model(x).square().mean() + model(x.flip(0)).sin().mean()
