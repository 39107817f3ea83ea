import json

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional as F

from d4m_plugin.errors import InputError
from d4m_plugin.evaluation import pictures
from d4m_plugin.evaluation.pictures import (
    agreement,
    blank,
    coverage,
    features_of,
    frechet_distance,
    inception_score,
    judge,
    kernel_distance,
    near_copies,
    neighbours,
    side_by_side,
)
from d4m_plugin.seeding import generator_of

FIGURES = [
    "network",
    "frechet_distance",
    "kernel_distance",
    "inception_score",
    "agreement",
    "real_agreement",
    "coverage",
    "near_copies",
    "blank",
    "nearest",
    "nearest_distance",
]


def normal(count, width, seed):
    return torch.randn(count, width, generator=generator_of(seed))


def pixels(count, seed, size=4):
    return torch.randint(256, (count, 3, size, size), generator=generator_of(seed)).to(torch.uint8)


@pytest.fixture
def network():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        for n, weights in enumerate(layers.parameters()):
            weights.copy_(torch.randn(weights.shape, generator=generator_of(n)))
    return layers


def labels(count):
    return torch.arange(count) % 3


def test_the_features_enter_the_last_linear_layer(network, monkeypatch):
    monkeypatch.setattr(pictures, "BATCH", 3)
    images = pixels(7, 0)
    features, logits = features_of(network, images)
    with torch.no_grad():
        torch.testing.assert_close(features, network[:3](images / 255))
        torch.testing.assert_close(logits, network(images / 255))
    assert features.dtype == logits.dtype == torch.float32
    assert not any(each.requires_grad or each.is_inference() for each in (features, logits))
    assert not any(layer._forward_pre_hooks for layer in network)


def test_the_last_linear_layer_is_the_last_to_run():
    class Backwards(nn.Module):
        """Its layers are not in the order in which they run."""

        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(5, 2), nn.Linear(48, 5)

        def forward(self, images):
            return self.head(self.body(images.flatten(1)))

    assert features_of(Backwards().eval(), pixels(2, 0))[0].shape == (2, 5)


def test_a_network_without_a_linear_layer_is_refused():
    convolutions = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten())
    with pytest.raises(InputError, match="Sequential: it has no linear layer"):
        features_of(convolutions, pixels(2, 0))


def test_the_frechet_distance_is_the_closed_form():
    made, real = normal(50, 6, 0) * 2 + 1, normal(80, 6, 1)
    first, second = np.cov(made.double().T), np.cov(real.double().T)
    gap = (made.double().mean(0) - real.double().mean(0)).square().sum().item()
    expected = gap + np.trace(first + second - 2 * scipy.linalg.sqrtm(first @ second).real)
    assert expected > 1
    assert frechet_distance(made, real) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_of_fewer_images_than_features_is_right():
    """Then the covariances are singular; their rows span little, in which the distance can be had alike."""
    made, real = normal(5, 40, 0) + 1, normal(60, 40, 1)
    covariance = np.cov(real.double().T)
    spread = (made.double() - made.double().mean(0)).numpy() / 2  # spreadᵀ spread is the covariance
    roots = np.sqrt(np.linalg.eigvalsh(spread @ covariance @ spread.T).clip(0)).sum()
    gap = (made.double().mean(0) - real.double().mean(0)).square().sum().item()
    expected = gap + (spread**2).sum() + np.trace(covariance) - 2 * roots
    assert frechet_distance(made, real) == pytest.approx(expected, rel=1e-5)


def test_a_set_is_at_no_distance_from_itself():
    features = normal(60, 8, 0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(8, rel=1e-5)


def test_the_kernel_distance_is_the_unbiased_estimate():
    made, real = normal(30, 5, 0) + 0.5, normal(30, 5, 1)

    def kernel(a, b):
        return ((a.double() @ b.double().T) / 5 + 1) ** 3

    def between(a):
        return (kernel(a, a).sum() - kernel(a, a).trace()) / (30 * 29)

    expected = between(made) + between(real) - 2 * kernel(made, real).mean()
    assert kernel_distance(made, real) == pytest.approx(expected.item(), rel=1e-9)


def test_the_kernel_distance_takes_sets_of_unlike_sizes():
    made, real = normal(20, 5, 0), normal(500, 5, 1)
    near, far = kernel_distance(made, real), kernel_distance(made + 1, real)
    assert abs(near) < 0.5 < far
    assert abs(kernel_distance(real, made)) < 0.5
    assert near == kernel_distance(made, real)


def test_the_inception_score_is_the_exponential_of_the_mean_divergence():
    logits = normal(25, 4, 0) * 3
    shares = logits.double().softmax(1)
    divergence = (shares * (shares / shares.mean(0)).log()).sum(1).mean()
    assert inception_score(logits) == pytest.approx(divergence.exp().item(), rel=1e-9)
    assert inception_score(logits) > 1.5


def test_the_inception_score_of_sure_and_varied_names_is_the_number_of_classes():
    sure = torch.eye(3).repeat(5, 1) * 200  # a share of e^-200 is 0 in float32
    assert inception_score(sure) == pytest.approx(3)
    assert inception_score(torch.eye(4)[[0] * 8] * 200) == pytest.approx(1)  # of the same name: not varied
    assert inception_score(torch.zeros(8, 3)) == pytest.approx(1)  # not sure


def test_the_nearest_are_found():
    points = torch.tensor([[0.0, 0.0], [9.0, 0.0]]).double()
    others = torch.tensor([[3.0, 4.0], [0.0, 1.0], [10.0, 0.0], [0.0, 3.0]]).double()
    distances, indices = neighbours(points, others, 2)
    assert indices.tolist() == [[1, 3], [2, 0]]
    torch.testing.assert_close(distances, torch.tensor([[1, 3], [1, 52**0.5]]).double())


def test_no_point_is_its_own_neighbour_but_its_twin_is():
    points = torch.tensor([[0.0], [1.0], [1.0], [5.0]]).double()
    distances, indices = neighbours(points, points, same=True)
    assert distances.flatten().tolist() == [1, 0, 0, 4]
    assert indices[1:3].flatten().tolist() == [2, 1]


def test_a_near_copy_is_nearer_than_99_of_100_real_images_to_each_other():
    own = torch.arange(1, 101).double()
    distances = torch.tensor([0.5, 0.999, 1.0, 1.5, 2.0, 50.0]).double()
    assert near_copies(distances, own.flip(0)) == 4  # 1.0 and 1.5 are as near as one of a hundred; 2.0 as two


def test_coverage_counts_the_real_images_with_a_distilled_one_in_their_ball():
    """Real ones at 0, 1, 3 and 7, each with a ball up to its second neighbour; distilled ones at -1.5 and 20."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).double()
    radii = neighbours(real, real, 2, same=True)[0][:, -1]
    assert radii.tolist() == [3, 2, 3, 6]
    to_made = neighbours(real, torch.tensor([[-1.5], [20.0]]).double())[0][:, 0]
    assert coverage(to_made, radii) == 0.25
    assert coverage(torch.zeros(4), radii) == 1


def test_images_of_one_colour_are_blank():
    images = pixels(5, 0)
    images[1] = 7
    images[3] = torch.tensor([255, 0, 9]).view(3, 1, 1)
    images[4] = 7
    images[4, 2, 3, 3] = 8
    assert blank(images) == 2


def test_agreement_is_the_share_named_as_labelled():
    assert agreement(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_real_images_judged_beside_themselves_are_copies(network):
    real = pixels(150, 0)
    figures = judge(network, "toy", real, labels(150), real, labels(150))
    assert figures.frechet_distance == pytest.approx(0, abs=1e-4)
    assert figures.near_copies == 150
    assert figures.coverage == 1
    assert figures.nearest.equal(torch.arange(150))
    torch.testing.assert_close(figures.nearest_distance, torch.zeros(150), atol=1e-6, rtol=0)
    assert figures.agreement == figures.real_agreement


def test_the_figures_are_those_of_the_network_features(network):
    made, real = pixels(20, 0), pixels(90, 1) // 2
    made[0], made[1] = real[30], 50
    figures = judge(network, "toy", made, labels(20), real, labels(90))
    (features, logits), (real_features, real_logits) = features_of(network, made), features_of(network, real)
    between = torch.cdist(F.normalize(features.double()), F.normalize(real_features.double()))
    own = torch.cdist(*[F.normalize(real_features.double())] * 2).fill_diagonal_(torch.inf)
    assert figures.network == "toy"
    assert figures.frechet_distance == frechet_distance(features, real_features)
    assert figures.kernel_distance == kernel_distance(features, real_features)
    assert figures.inception_score == inception_score(logits)
    assert figures.agreement == agreement(logits, labels(20))
    assert figures.real_agreement == agreement(real_logits, labels(90)) != figures.agreement
    assert figures.coverage == (between.min(0).values < own.kthvalue(5).values).double().mean().item()
    assert 0 < figures.coverage < 1
    assert figures.near_copies == (between.min(1).values < own.min(1).values.min()).sum() >= 1
    assert figures.blank == 1
    assert figures.nearest.equal(between.argmin(1))
    assert figures.nearest[0] == 30
    torch.testing.assert_close(figures.nearest_distance, between.min(1).values.float(), atol=1e-6, rtol=0)


def test_the_same_figures_each_time_and_the_global_generator_untouched(network):
    real = pixels(90, 1), labels(90)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = judge(network, "toy", pixels(20, 0), labels(20), *real)
    assert torch.get_rng_state().equal(before)
    torch.rand(1)
    again = judge(network, "toy", pixels(20, 0), labels(20), *real)
    assert again.as_dict() == first.as_dict()


def test_figures_are_told_in_json_without_a_warning(network, recwarn):
    figures = judge(network, "toy", pixels(2, 0), labels(2), pixels(2, 1), labels(2)).as_dict()
    told = json.loads(json.dumps(figures, allow_nan=False))
    assert told == figures
    assert list(told) == FIGURES
    assert len(told["nearest"]) == len(told["nearest_distance"]) == 2
    assert not recwarn.list


@pytest.mark.parametrize(("made", "real", "named"), [(1, 5, "`made` has 1 "), (5, 1, "`real` has 1 ")])
def test_one_image_cannot_be_judged(network, made, real, named):
    with pytest.raises(InputError, match=named):
        judge(network, "toy", pixels(made, 0), labels(made), pixels(real, 1), labels(real))


def test_the_nearest_pairs_are_shown_side_by_side(monkeypatch):
    monkeypatch.setattr(pictures, "SHOWN", 2)
    made = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (10, 20, 30)])
    real = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (110, 120)])
    picture = side_by_side(made, real, torch.tensor([0, 0, 1]), torch.tensor([0.3, 0.2, 0.1]))
    seen = np.asarray(picture)
    tops, right = (32, 98), picture.width  # the middles of rows of 64 pixels, 2 between them
    assert picture.height == 2 * 66
    assert [[int(seen[y, x, 0]) for x in (right - 100, right - 34)] for y in tops] == [[30, 120], [20, 110]]
