import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from d4m_plugin.augmentation import augment, random_boxes, resize_boxes


def test_boxes_are_enlarged_as_torchvision_does():
    torch.manual_seed(0)
    images = torch.rand(200, 3, 32, 24)
    boxes, mirrored = random_boxes(200, 32, 24, (0.08, 1.0)), torch.rand(200) < 0.5
    ours = resize_boxes(images, boxes, mirrored)
    for index, image in enumerate(images):
        box = [int(edge[index]) for edge in boxes]
        theirs = F.resized_crop(image, *box, [32, 24], antialias=True)
        torch.testing.assert_close(ours[index], theirs.flip(-1) if mirrored[index] else theirs, atol=1e-5, rtol=0)


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    ours = random_boxes(50_000, 32, 32, (0.08, 1.0))
    crop = v2.RandomResizedCrop(32, (0.08, 1.0))
    theirs = [crop.make_params([torch.empty(3, 32, 32)]) for _ in range(10_000)]
    for name in ("top", "left", "height", "width"):
        drawn = torch.tensor([float(box[name]) for box in theirs])
        error = 5 * drawn.std() / len(theirs) ** 0.5
        assert abs(getattr(ours, name).double().mean() - drawn.mean()) < error
        assert abs(getattr(ours, name).double().std() - drawn.std()) < error


def test_the_whole_image_comes_back():
    images = torch.rand(50, 3, 16, 16)
    torch.testing.assert_close(augment(images, (1.0, 1.0), flip=False), images)


def test_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 8, 8).repeat(400, 1, 1, 1)
    mirrored = sum(torch.allclose(image, images[0].flip(-1)) for image in augment(images, (1.0, 1.0), flip=True))
    assert 150 < mirrored < 250
