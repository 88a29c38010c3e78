"""The small networks of our federations."""

import numpy as np
import torch
from torch import Tensor, nn

from weightshare.federated.reviews import WORDS
from weightshare.federated.samples import Samples


def model_for(samples: Samples, hidden: int, seed: int) -> nn.Module:
    """A perceptron for images, a convolutional network for texts; weights from ``seed``."""
    if samples.train.ndim == 2:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return TextNetwork(WORDS, hidden, samples.classes)
    return perceptron(int(np.prod(samples.train.shape[1:])), hidden, samples.classes, seed)


def perceptron(inputs: int, hidden: int, classes: int, seed: int) -> nn.Module:
    """Inputs, one hidden layer of ReLU, classes; weights from ``seed``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )


class TextNetwork(nn.Module):
    """Kim's network for sentences (2014), small: convolutions over words, their largest values.

    Args:
        words: numbers of words; 0 is a blank.
        hidden: width of a word, and kernels of each length.
        classes: outputs.
        lengths: words under a kernel.
    """

    def __init__(
        self, words: int, hidden: int, classes: int, lengths: tuple[int, ...] = (3, 4, 5)
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden)
        # At torch's N(0, 1) plain SGD hardly moves the words: 0.61 after 12 epochs instead of 0.73.
        nn.init.normal_(self.embedding.weight, std=0.1)
        # Written as products over windows: stacked convolutions are slow, stacked products are not.
        self.kernels = nn.ModuleDict({str(n): nn.Linear(n * hidden, hidden) for n in lengths})
        self.head = nn.Linear(len(lengths) * hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, length)`` word numbers to ``(B, classes)`` scores."""
        words = self.embedding(tokens)
        found = [
            kernel(_windows(words, int(n))).relu().amax(1) for n, kernel in self.kernels.items()
        ]
        scores: Tensor = self.head(torch.cat(found, 1))
        return scores


def _windows(words: Tensor, length: int) -> Tensor:
    """``(B, L, E)`` to ``(B, L - length + 1, length · E)``."""
    last = words.shape[1] - length + 1
    return torch.cat([words[:, i : i + last] for i in range(length)], 2)
