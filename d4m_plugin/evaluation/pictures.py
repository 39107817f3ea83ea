"""Quality, diversity and privacy of distilled pictures, measured by a network that each figure is named after."""

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from d4m_plugin.errors import InputError, first_line
from d4m_plugin.preview import grid
from d4m_plugin.synthesis import of_one_colour
from d4m_plugin.teachers import PRETRAINED, name_of, open_pretrained

NEIGHBOURS = 5  # real ones in the ball around a real image; the authors' choice
BATCH = 100  # images that the network takes at once
SHOWN = 20  # pairs of a distilled image and the real one nearest to it
SUBSET = 100  # features of each side in one estimate of the kernel distance
MOST_FEATURES = 4096  # of which the Fréchet distance is computed: half a minute on two cores


@dataclass(frozen=True)
class PictureFigures:
    """What a network's features say of distilled images beside real ones.

    Attributes:
        network: what the features are of; figures of unlike networks cannot be compared.
        frechet_distance: FID; of fewer images than features it is too large, so compare sets of one size only. None of
            more features than 4,096, with whose cube its time grows.
        kernel_distance: KID, which does not depend on the number of images.
        inception_score: IS, from 1 to the number of the network's classes.
        agreement: share of the distilled images that the network names as their label says; None where its classes are
            not theirs.
        real_agreement: the same of the real images, to compare it with.
        coverage: share of the real images that have a distilled one among their neighbours.
        near_copies: number of distilled images that are very near to one of the real images that are given.
        blank: number of distilled images of one colour.
        nearest: index of the real image nearest to each distilled one, int64, shape (N,).
        nearest_distance: how far that is, in [0, 2], float32, shape (N,).
        made_features, real_features: what the figures are made from, float32, shapes (N, D) and (M, D).
    """

    network: str
    frechet_distance: float | None
    kernel_distance: float
    inception_score: float
    agreement: float | None
    real_agreement: float | None
    coverage: float
    near_copies: int
    blank: int
    nearest: Tensor
    nearest_distance: Tensor
    made_features: Tensor
    real_features: Tensor

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, without the features, as JSON can hold them."""
        figures = {name: each for name, each in vars(self).items() if not name.endswith("features")}
        return {name: each.tolist() if isinstance(each, Tensor) else each for name, each in figures.items()}


def judge(
    network: nn.Module,
    name: str,
    made: Tensor,
    made_labels: Tensor | None,
    real: Tensor,
    real_labels: Tensor | None,
) -> PictureFigures:
    """Return the figures of distilled images.

    Args:
        network: a classifier in evaluation mode, such as a Teacher; see `features_of`.
        name: what the figures name it.
        made: the distilled images, uint8, shape (N, 3, H, W).
        made_labels: their labels, int64, shape (N,); None where they are not among the network's classes.
        real: real training images, uint8, shape (M, 3, H, W).
        real_labels: their labels, int64, shape (M,); or None.

    Raises:
        InputError: where there are fewer than two images of either, or the network has no features.
    """
    for option, images in (("made", made), ("real", real)):
        if len(images) < 2:
            raise InputError(f"`{option}` has {len(images)} images; at least 2 can be judged.")
    made_features, made_logits = features_of(network, made)
    real_features, real_logits = features_of(network, real)
    made_points, real_points = F.normalize(made_features.double()), F.normalize(real_features.double())
    wide = made_features.shape[1]
    distances, indices = neighbours(made_points, real_points)
    own, _ = neighbours(real_points, real_points, min(NEIGHBOURS, len(real) - 1), same=True)
    return PictureFigures(
        network=name,
        frechet_distance=frechet_distance(made_features, real_features) if wide <= MOST_FEATURES else None,
        kernel_distance=kernel_distance(made_features, real_features),
        inception_score=inception_score(made_logits),
        agreement=None if made_labels is None else agreement(made_logits, made_labels),
        real_agreement=None if real_labels is None else agreement(real_logits, real_labels),
        coverage=coverage(neighbours(real_points, made_points)[0][:, 0], own[:, -1]),
        near_copies=near_copies(distances[:, 0], own[:, 0]),
        blank=blank(made),
        nearest=indices[:, 0],
        nearest_distance=distances[:, 0].float(),
        made_features=made_features,
        real_features=real_features,
    )


def features_of(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of images.

    The features are what enters the last linear layer that is run.

    Args:
        network: a classifier in evaluation mode of images in [0, 1]; on any device.
        images: uint8, shape (N, 3, H, W).

    Returns:
        The features, float32, shape (N, D), and the logits, float32, shape (N, C), on the CPU.

    Raises:
        InputError: where no linear layer is run.
    """
    last: deque[Tensor] = deque(maxlen=1)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0])) for linear in linears]
    device = next(network.parameters(), images).device
    features, logits = [], []
    try:
        for batch in images.split(BATCH):
            with torch.inference_mode():
                output = network(batch.to(device) / 255)
            if not last:
                raise InputError(
                    f"the pictures cannot be judged by {name_of(network)}: it has no linear layer, whose input its "
                    "features would be; use another."
                )
            features.append(last.pop().flatten(1).float().cpu())
            logits.append(output.float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(features), torch.cat(logits)


def open_network(name: str) -> nn.Module:
    """Return a network that was trained on other classes, in evaluation mode, of images in [0, 1].

    Args:
        name: `inception`, or another library's classifier, such as `torchvision:resnet18`.

    Raises:
        InputError: where there is none.
    """
    network = _Inception() if name == "inception" else open_pretrained(name, "features")
    if network is None:
        raise InputError(f"`features` is {name!r}; use teacher, inception or {PRETRAINED}.")
    return network


class _Inception(nn.Module):
    """The Inception-v3 by which FID, KID and IS are published, as torchmetrics runs it.

    Its weights, 91 MB, are fetched once to torch's folder.

    Raises:
        InputError: where torch-fidelity, which has the network, is not installed, or the weights cannot be fetched.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        except ImportError as error:
            raise InputError("`features` is 'inception', which needs `pip install torch-fidelity`.") from error
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        try:  # torch-fidelity would unpickle whatever is there
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, weights_only=True, map_location="cpu")
            file = folder / URL_INCEPTION_V3.rpartition("/")[2]
            self.network = NoTrainInceptionV3("inception", ["2048"], str(file))
        except (OSError, RuntimeError, UnpicklingError) as error:
            reason = first_line(error)
            raise InputError(
                f"`features` is 'inception', whose weights cannot be had from {URL_INCEPTION_V3} ({reason}); put that "
                f"file into {str(folder)!r}."
            ) from error
        self.head = nn.Linear(2048, 1008, bias=False)  # the "unbiased logits" of the published IS
        self.head.weight = self.network.fc.weight

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32, shape (B, 1008), of images in [0, 1], shape (B, 3, H, W)."""
        logits: Tensor = self.head(self.network((images * 255).round().to(torch.uint8)))
        return logits


class _Given(nn.Identity):
    """Stands in for the network that torchmetrics would run, where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@contextmanager
def _apart() -> Iterator[None]:
    """Keep what torchmetrics draws and warns of from the rest of the program."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerator too
        yield


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance (FID) of features, float, shapes (N, D) and (M, D), in double precision."""
    metric = FrechetInceptionDistance(_Given(made.shape[1]))
    metric.update(made.double(), real=False)
    metric.update(real.double(), real=True)
    return float(metric.compute())


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """Return the kernel distance (KID) of features, float, shapes (N, D) and (M, D).

    The unbiased estimate with the cubic kernel, the mean of 100 subsets of 100 features of each, or of as many as there
    are of the fewer.
    """
    with _apart():
        metric = KernelInceptionDistance(_Given(made.shape[1]), subset_size=min(SUBSET, len(made), len(real)))
        metric.update(made.double(), real=False)
        metric.update(real.double(), real=True)
        return float(metric.compute()[0])


def inception_score(logits: Tensor) -> float:
    """Return the inception score (IS) of all images at once; logits, float, shape (N, C).

    Splits, of which the score is the mean elsewhere, would hold too few images of a distilled set.
    """
    with _apart():
        metric = InceptionScore(_Given(logits.shape[1]), splits=1)
        metric.update(logits.double())  # a float32 probability that underflows would make it NaN
        return float(metric.compute()[0])


def neighbours(points: Tensor, others: Tensor, count: int = 1, same: bool = False) -> tuple[Tensor, Tensor]:
    """Return the distances to the nearest of other points, and their indices, the nearest first.

    Args:
        points: float64, as float32 cannot tell a copy from an image near to it; shape (N, D).
        others: float64, shape (M, D), M >= count.
        count: how many.
        same: the others are the points, of which none is its own neighbour; then M > count.

    Returns:
        The distances, float64, and the indices, int64, both of shape (N, count).
    """
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(others.numpy())
    distances, indices = search.kneighbors(None if same else points.numpy())
    return torch.from_numpy(distances), torch.from_numpy(indices)


def near_copies(distances: Tensor, own: Tensor) -> int:
    """Return how many distilled images are nearer to a real one than 99 % of the real are to another real one.

    Args:
        distances: from each distilled image to its nearest real one, shape (N,).
        own: from each real image to its nearest other real one, shape (M,).
    """
    farther = len(own) - torch.searchsorted(own.sort().values, distances, right=True)
    return int((100 * farther >= 99 * len(own)).sum())


def coverage(distances: Tensor, radii: Tensor) -> float:
    """Return the share of the real images in whose ball a distilled image lies (Naeem et al., arXiv:2002.09797).

    Args:
        distances: from each real image to its nearest distilled one, shape (M,).
        radii: from each real image to its fifth nearest other real one, shape (M,).
    """
    return float((distances < radii).double().mean())


def blank(images: Tensor) -> int:
    """Return how many images, uint8, shape (N, 3, H, W), are of one colour."""
    return len(of_one_colour(images))


def agreement(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose greatest logit, of shape (N, C), is that of their label, int64, shape (N,)."""
    return float((logits.argmax(1) == labels).double().mean())


def side_by_side(made: Tensor, real: Tensor, nearest: Tensor, distances: Tensor) -> Image.Image:
    """Return a picture of the distilled images that are nearest to a real one, each left of it, with the distance.

    Args:
        made: the distilled images, uint8, shape (N, 3, H, H).
        real: the real ones, uint8, shape (M, 3, H, H).
        nearest: index of the real image nearest to each distilled one, int64, shape (N,).
        distances: how far that is, shape (N,).
    """
    first = distances.argsort(stable=True)[:SHOWN]
    pairs = torch.stack([made[first], real[nearest[first]]], 1)
    return grid(list(pairs), [f"{distance:.3f}" for distance in distances[first].tolist()])
