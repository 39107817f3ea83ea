import math

import pytest
import torch
from torchvision.transforms import v2

from d4m_plugin.matching import cutmix, matching_loss, mixup, soften, unmixed


def _reference_loss(student, teacher, temperature):
    """The KL divergence written out: sum over classes of p (log p - log q), mean over the batch."""
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(logit / temperature) for logit in teacher_row]
        q = [math.exp(logit / temperature) for logit in student_row]
        total += sum(a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_loss_is_the_softened_kl_divergence(temperature):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64) * 5
    expected = _reference_loss(student, teacher, temperature)
    assert matching_loss(student, soften(teacher, temperature), temperature).item() == pytest.approx(expected, rel=1e-4)


def test_a_student_like_its_teacher_has_no_loss():
    logits = torch.randn(5, 7)
    assert matching_loss(logits + 3, soften(logits, 20), 20).item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_from_the_teacher():
    """KL is not symmetric: a student that is sure where the teacher is not pays more than the other way round."""
    sure, unsure = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])

    def loss(student, teacher):
        return matching_loss(student, soften(teacher, 1.0), 1.0)

    assert loss(sure, unsure) > 5 * loss(unsure, sure)


@pytest.fixture
def batch():
    """Eight images of 12x10 pixels, each of its own value."""
    return torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 12, 10).contiguous()


def test_cutmix_takes_one_box_from_the_permuted_images(batch):
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        before = batch.clone()
        mixed = cutmix(batch)
        assert torch.equal(batch, before)
        other = batch[mixed.permutation]
        taken = mixed.images == other
        kept = mixed.images == batch
        assert (taken | kept).all()
        moved = mixed.permutation != torch.arange(8)
        shares += [kept[i].float().mean().item() for i in range(8) if moved[i]]
        for i in range(8):
            if moved[i]:
                assert kept[i].float().mean().item() == pytest.approx(mixed.share)
                rows, columns = taken[i, 0].any(1).nonzero(), taken[i, 0].any(0).nonzero()
                assert taken[i, 0].sum() == len(rows) * len(columns)  # a rectangle
    assert min(shares) < 0.4
    assert max(shares) > 0.9


def test_cutmix_keeps_as_much_of_the_images_as_torchvisions():
    """Their mean and spread over many draws, which tell a box of another size."""
    torch.manual_seed(0)
    images, theirs = torch.zeros(2, 3, 32, 32), v2.CutMix(num_classes=2)
    labels = torch.tensor([0, 1])
    ours = torch.tensor([cutmix(images).share for _ in range(1000)])
    of_torchvision = torch.stack([theirs(images, labels)[1][0, 0] for _ in range(1000)])
    assert ours.mean() == pytest.approx(float(of_torchvision.mean()), abs=0.03)
    assert ours.std() == pytest.approx(float(of_torchvision.std()), abs=0.03)


def test_labels_are_those_of_the_larger_part(batch):
    torch.manual_seed(0)
    labels = torch.arange(8)
    seen = set()
    for _ in range(50):
        mixed = cutmix(batch)
        larger = mixed.images.flatten(1).mode(1).values.long()
        if mixed.share != 0.5:
            assert torch.equal(mixed.labels(labels), larger)
            seen.add(mixed.share > 0.5)
    assert seen == {True, False}


def test_mixup_averages_images_and_labels_by_one_share(batch):
    torch.manual_seed(0)
    mixed = mixup(batch)
    own = torch.arange(8.0)
    torch.testing.assert_close(mixed.images[:, 0, 0, 0], mixed.values(own))
    torch.testing.assert_close(mixed.values(own), mixed.share * own + (1 - mixed.share) * own[mixed.permutation])
    assert 0 < mixed.share < 1


def test_an_unmixed_batch_keeps_images_and_labels(batch):
    mixed = unmixed(batch)
    assert torch.equal(mixed.images, batch)
    assert torch.equal(mixed.values(torch.arange(8.0)), torch.arange(8.0))


def test_mixups_shares_are_uniform_and_its_images_another_order():
    torch.manual_seed(0)
    draws = [mixup(torch.arange(8.0).view(8, 1, 1, 1)) for _ in range(500)]
    shares = torch.tensor([each.share for each in draws])
    assert shares.mean() == pytest.approx(1 / 2, abs=0.05)
    assert shares.std() == pytest.approx((1 / 12) ** 0.5, abs=0.02)
    assert sum(torch.equal(each.permutation, torch.arange(8)) for each in draws) < 5
