import pickle

import pytest
from PIL import Image

from d4m_plugin import CIFAR10, ImageFolder, ImageNet, InputError


def make_folder(root, **splits):
    """Write folders by split and class with one image each; the image's grey level is its class's number."""
    for split, classes in splits.items():
        for level, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            Image.new("L", (20, 10), level).save(root / split / name / "image.png")
    return root


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_folders_are_classes_in_the_order_of_the_labels(tmp_path, test):
    source = ImageFolder(make_folder(tmp_path, train=["b", "a_b"], **{test: ["b", "a_b"]}), image_size=8)
    assert list(source.classes) == ["a b", "b"]
    assert source.train().targets == source.test().targets == [0, 1]
    image, label = source.train()[0]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (1, 1, 1), 0)  # a_b was written second


def test_splits_of_other_classes_are_refused(tmp_path):
    source = ImageFolder(make_folder(tmp_path, train=["a", "b", "c"], val=["b", "c"]))
    with pytest.raises(InputError, match="train and val differ in the class folders a;"):
        source.test()


@pytest.mark.parametrize("splits", [{}, {"train": ["a"]}, {"val": ["a"]}], ids=str)
def test_a_folder_without_splits_is_named(tmp_path, splits):
    with pytest.raises(InputError, match=r"`root` is .* which needs the folders train and one of val, test"):
        ImageFolder(make_folder(tmp_path, **splits))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_image_is_named(tmp_path, content):
    source = ImageFolder(make_folder(tmp_path, train=["a"], val=["a"]))
    (tmp_path / "train" / "a" / "image.png").write_bytes(content)
    with pytest.raises(InputError, match=r"image.png' cannot be read as an image"):
        source.train()[0]


def test_other_images_have_another_fingerprint(tmp_path):
    before = ImageFolder(make_folder(tmp_path, train=["a"], val=["a"])).fingerprint
    assert before == ImageFolder(tmp_path).fingerprint
    Image.new("L", (20, 10)).save(tmp_path / "train" / "a" / "more.png")
    assert ImageFolder(tmp_path).fingerprint != before


def test_imagenet_needs_its_thousand_folders(tmp_path):
    with pytest.raises(InputError, match="whose train has 2 folders, not ImageNet's 1,000"):
        ImageNet(make_folder(tmp_path, train=["n01", "n02"], val=["n01", "n02"]))


def test_the_two_cranes_of_imagenet_are_told_apart(tmp_path):
    ids = [f"n{number:08}" for number in range(1000)]
    for name in ids:
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "val").mkdir()
    classes = ImageNet(tmp_path).classes
    assert (len(set(classes)), classes[134], classes[517]) == (1000, "crane bird", "crane")


def test_cifar_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="where CIFAR-10 is not; name its folder or set `download` to true"):
        CIFAR10(tmp_path).train()


def test_sources_can_be_sent_to_other_processes(tmp_path):
    folder = ImageFolder(make_folder(tmp_path, train=["a"], val=["a"]))
    folder.train()
    assert pickle.loads(pickle.dumps(folder)).classes == folder.classes
    assert list(pickle.loads(pickle.dumps(CIFAR10(tmp_path))).classes)[:2] == ["airplane", "automobile"]
