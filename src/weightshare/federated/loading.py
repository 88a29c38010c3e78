"""Labelled samples by the name of their data set."""

from weightshare.data import locate
from weightshare.federated.images import digits, mnist
from weightshare.federated.reviews import FILE, reviews
from weightshare.federated.samples import Samples


def load_samples(name: str) -> Samples:
    """``digits``, a folder with MNIST's four files, or one with the movie reviews.

    Raises:
        UserError: there is no such data, or the files are not what they should be.
    """
    if name == "digits":
        return digits()
    folder = locate(name)
    return reviews(folder) if (folder / FILE).exists() else mnist(folder)
