import numpy as np
import torch

from d4m_plugin.prototypes import _sketched, cluster
from d4m_plugin.seeding import generator_of, seed_of


def blobs():
    """30, 20 and 10 points around 0, 10 and 20."""
    noise = torch.randn(60, 2, 2, 2, generator=generator_of(1))
    centres = torch.tensor([0.0] * 30 + [10.0] * 20 + [20.0] * 10)
    return noise * 0.1 + centres.view(-1, 1, 1, 1)


def test_prototypes_are_the_means_of_the_clusters_largest_first():
    latents = blobs()
    prototypes = cluster(latents, 3, seed=0)
    expected = torch.stack([latents[:30].mean(0), latents[30:50].mean(0), latents[50:].mean(0)])
    torch.testing.assert_close(prototypes.latents, expected, atol=0.05, rtol=0)
    torch.testing.assert_close(prototypes.weights, torch.tensor([30, 20, 10]) / 60)
    assert prototypes.latents.dtype == torch.float32
    assert torch.equal(prototypes.latents, prototypes.latents.half().float())  # what is stored is what was drawn from


def test_as_many_prototypes_as_images_are_the_images():
    latents = blobs()[:5]
    found = cluster(latents, 5, seed=0).latents.flatten(1)
    assert torch.equal(found.sort(0).values, latents.half().float().flatten(1).sort(0).values)


def test_one_prototype_is_the_mean():
    latents = blobs()
    torch.testing.assert_close(cluster(latents, 1, seed=0).latents[0], latents.mean(0), atol=0, rtol=1e-3)


def test_the_seed_decides():
    latents = torch.randn(200, 4, 2, 2, generator=generator_of(2))
    first, again, other = (cluster(latents, 10, seed).latents for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_fit_beats_the_authors_small_chunks():
    """Chunks of k latents leave most centres on single images."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    latents = torch.randn(300, 4, 2, 2, generator=generator_of(3))
    points = latents.flatten(1)
    theirs = MiniBatchKMeans(10, random_state=0)
    for chunk in points.split(10):
        theirs.partial_fit(chunk.numpy())

    def inertia(centres):
        return torch.cdist(points, centres).min(1).values.square().sum()

    ours = [inertia(cluster(latents, 10, seed).latents.flatten(1)) for seed in range(5)]
    assert max(ours) < inertia(torch.tensor(theirs.cluster_centers_))
    whole = KMeans(10, n_init=10, random_state=0).fit(points.numpy())
    assert sum(ours) / 5 < 1.03 * inertia(torch.tensor(whole.cluster_centers_))


def test_sketches_keep_the_distances_of_large_points_of_any_structure():
    generator = generator_of(4)
    dense, column, corner = (torch.zeros(4, 40, 40) for _ in range(3))  # 6,400 numbers, no multiple of 256
    dense.copy_(torch.randn(4, 40, 40, generator=generator))
    column[:, :, 7:9] = torch.randn(4, 40, 2, generator=generator)
    corner[:, -4:, -4:] = torch.randn(4, 4, 4, generator=generator)
    points = torch.stack([dense, column, corner, torch.zeros(4, 40, 40)]).flatten(1)
    exact = points.square().sum(1)[:3]
    factors = []
    for seed in range(30):
        sketches = torch.from_numpy(_sketched(points.numpy(), np.random.RandomState(seed)))
        assert sketches.shape == (4, 256)
        factors.append((sketches - sketches[3]).square().sum(1)[:3] / exact)
    factors = torch.stack(factors)
    assert (factors.mean(0) - 1).abs().max() < 0.1
    assert factors.std(0).max() < 0.2
    small = points[:, :1024].numpy()
    assert _sketched(small, np.random.RandomState(0)) is small


def test_large_latents_are_clustered_as_well_as_by_all_their_numbers():
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d

    options = {"patch_size": (37, 37), "max_patches": 150, "random_state": 0}
    patches = [extract_patches_2d(photograph, **options) for photograph in load_sample_images().images]
    latents = torch.from_numpy(np.concatenate(patches)).permute(0, 3, 1, 2) / 255  # 4,107 numbers
    points = latents.flatten(1)

    def inertia(centres):
        return torch.cdist(points, centres).min(1).values.square().sum()

    ours = [inertia(cluster(latents, 10, seed).latents.flatten(1)) for seed in range(3)]
    fits = [KMeans(10, n_init=1, random_state=seed).fit(points.numpy()) for seed in range(3)]
    assert sum(ours) < 1.03 * sum(inertia(torch.tensor(fit.cluster_centers_)) for fit in fits)
    assert torch.equal(cluster(latents, 10, 0).latents, cluster(latents, 10, 0).latents)
    assert not torch.equal(cluster(latents, 10, 0).latents, cluster(latents, 10, 1).latents)
    twice = torch.cat([latents[:6]] * 2)
    assert len(cluster(twice, 6, seed=0).latents) == 6


def test_seeds_of_unlike_keys_differ():
    keys = [(), (0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1,)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_as_many_prototypes_as_asked_for_where_there_are_as_many_different_latents():
    """Mini-batches leave centres without a latent of their own; each k must come out all the same."""
    latents = torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for k in range(1, 15):
        found = cluster(latents, k, seed=0)
        assert len(found.latents) == len(found.weights) == min(k, 12)
        assert found.weights.min() >= 1 / 12 - 1e-6
    twice = torch.cat([latents, latents])
    assert [len(cluster(twice, k, seed=0).latents) for k in (3, 12)] == [3, 12]
    assert 12 <= len(cluster(twice, 20, seed=0).latents) < 20  # no two prototypes of one latent, but for rounding


def test_sketches_of_columns_of_latents_as_wide_as_stable_diffusions():
    column = torch.zeros(4, 64, 64)
    column[:, :, 7:9] = torch.randn(4, 64, 2, generator=generator_of(4))
    points = torch.stack([column, torch.zeros(4, 64, 64)]).flatten(1)
    found = [_sketched(points.numpy(), np.random.RandomState(seed)) for seed in range(30)]
    factors = np.array([((a - b) ** 2).sum() for a, b in found]) / float(column.square().sum())
    assert factors.std() < 0.2
