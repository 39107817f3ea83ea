"""Prototypes of one class: Mini-Batch k-Means on its latents (D4M, section 3.2)."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH_SIZE = 1024  # latents a k-means update: well above the number of clusters, unlike the authors' chunks
START_SIZE = 256  # latents, at least 3 a cluster, among which k-means++ starts: of more it took most of the time
SKETCH_SIZE = 256  # numbers by which latents of more than four times as many are clustered


@dataclass(frozen=True)
class Prototypes:
    """The prototypes of one class, the largest cluster first.

    Attributes:
        latents: the cluster centres, float32, shape (K, C, h, w), rounded to float16, in which they are stored.
        weights: each cluster's share of the class, float32, shape (K,), summing to 1.
    """

    latents: Tensor
    weights: Tensor


def cluster(latents: Tensor, k: int, seed: int) -> Prototypes:
    """Return k prototypes of one class, fewer where it has fewer different latents.

    The learning rate of a centre is 1/|its cluster so far| (Sculley, WWW 2010), as in the paper. The authors'
    code feeds chunks of about k latents, which leaves most centres on single images; this fits all latents. A centre
    is the running mean of what it drew, also of latents that another cluster has by now; so, last, each becomes the
    mean of its own cluster.

    Latents of more than 1,024 numbers (Stable Diffusion's have 16,384 at 512 pixels) are compared by sketches of 256,
    as clusterings may be by few random sums (Makarychev et al., arXiv:1811.03195); the means are of the latents.

    Args:
        latents: the latents of every image of the class, float32, shape (N, C, h, w), N >= 1.
        k: number of prototypes.
        seed: decides the initial centres and the batches.
    """
    from sklearn.cluster import MiniBatchKMeans

    points = latents.flatten(1).numpy()
    random_state = np.random.RandomState(np.random.PCG64(seed))
    if len(points) > k:
        options = {"batch_size": BATCH_SIZE, "init_size": max(START_SIZE, 3 * k)}
        means = MiniBatchKMeans(k, **options, n_init=1, random_state=random_state)
        with _thread_pools().limit(limits=1):  # as fast as with more, and the next class is encoded beside it
            found = means.fit_predict(_sketched(points, random_state))
        members = _without_empty(points, found, k)
    else:
        members = np.unique(points, axis=0, return_inverse=True)[1]  # each different latent is a cluster
    sizes = np.bincount(members)
    largest_first = [index for index in np.argsort(-sizes, kind="stable") if sizes[index]]
    centres = np.stack([points[members == index].mean(0) for index in largest_first])
    weights = (sizes[largest_first] / len(points)).astype(np.float32)
    rounded = torch.from_numpy(centres).half().float()  # so that a stored prototype is the one that was drawn from
    return Prototypes(rounded.view(-1, *latents.shape[1:]), torch.from_numpy(weights))


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _sketched(points: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
    """Return points, (N, D), or of large ones sketches, (N, `SKETCH_SIZE`), with nearly the same distances.

    A number of a sketch is a sum of the point's, with random signs (Charikar et al., ICALP 2002): one of each 256 in
    turn, which are shifted at random, so that no sum is of one column of a latent alone.
    """
    size = points.shape[1]
    if size <= 4 * SKETCH_SIZE:  # fast as they are
        return points
    signs = random_state.choice(np.array([-1, 1], np.float32), size)
    sums = np.zeros((len(points), 2 * SKETCH_SIZE), np.float32)
    for start in range(0, size, SKETCH_SIZE):
        part = points[:, start : start + SKETCH_SIZE] * signs[start : start + SKETCH_SIZE]
        shift = random_state.randint(SKETCH_SIZE)
        sums[:, shift : shift + part.shape[1]] += part
    return sums[:, :SKETCH_SIZE] + sums[:, SKETCH_SIZE:]  # what was shifted beyond the end begins again


def _without_empty(points: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    """Return the cluster of each point, the farthest points from their centres filling clusters that had none.

    Mini-batches can leave a centre with no point of its own; full k-means moves it so. Where the points have fewer
    than k different values, clusters stay empty.
    """
    members = members.copy()
    for empty in np.flatnonzero(np.bincount(members, minlength=k) == 0):
        distances = np.zeros(len(points))
        for each in np.unique(members):
            own = members == each
            distances[own] = np.square(points[own] - points[own].mean(0, dtype=np.float64)).sum(1)
        if distances.max() == 0:
            break
        members[distances.argmax()] = empty
    return members
