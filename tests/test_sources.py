import errno
import hashlib
import io
import os
import pickle
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from d4m_plugin import CIFAR10, CIFAR100, Digits, HuggingFace, ImageFolder, ImageNet, InputError, TinyImageNet
from d4m_plugin.errors import InputWarning
from d4m_plugin.sources import folders
from d4m_plugin.sources.names import imagenet_ids, readable, wordnet


def make_folder(root, count=1, **splits):
    """Write folders by split and class; an image's grey level is its class's number."""
    for split, classes in splits.items():
        for level, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("L", (20, 10), level).save(root / split / name / f"{number}.png")
    return root


def test_hardly_an_image_changes_sides_where_others_come_or_go(tmp_path):
    root = make_folder(tmp_path, 20, photos=["cat", "dog"]) / "photos"
    before = {*ImageFolder(root).test().names.to_pylist()}
    (root / "cat" / "3.png").unlink()
    Image.new("L", (20, 10)).save(root / "dog" / "new.png")
    assert len(before ^ {*ImageFolder(root).test().names.to_pylist()} - {b"cat/3.png", b"dog/new.png"}) <= 2
    assert {*ImageFolder(root, split_seed=1).test().names.to_pylist()} != before
    assert {name.split(b"/")[1] for name in before if name[:3] == b"cat"} != {
        name.split(b"/")[1] for name in before if name[:3] == b"dog"
    }


def test_a_folder_of_images_without_class_folders_is_told(tmp_path):
    root = make_folder(tmp_path, photos=["cat"]) / "photos" / "cat"
    with pytest.raises(InputError, match="which holds no folders; name the folder that has one for each class"):
        ImageFolder(root)


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_folders_are_classes_in_the_order_of_the_labels(tmp_path, test):
    source = ImageFolder(make_folder(tmp_path, train=["b", "a_b"], **{test: ["b", "a_b"]}))
    assert list(source.classes) == ["a b", "b"]
    assert source.train().targets.tolist() == source.test().targets.tolist() == [0, 1]
    image, label = source.train()[0]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (1, 1, 1), 0)  # a_b was written second
    assert source.image_size == 10


def test_where_there_are_no_splits_a_stratified_share_is_set_apart(tmp_path):
    make_folder(tmp_path, 10, photos=["cat", "dog", "owl"])
    (tmp_path / "photos" / "lone").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "photos" / "lone" / "0.png")
    source = ImageFolder(tmp_path / "photos", test_share=0.3)
    train, test = source.train(), source.test()
    assert np.bincount(train.targets).tolist() == [7, 7, 1, 7]  # the only image of a class stays
    assert np.bincount(test.targets, minlength=4).tolist() == [3, 3, 0, 3]
    names = {*train.names.to_pylist()} & {*test.names.to_pylist()}
    assert not names
    again = ImageFolder(tmp_path / "photos", test_share=0.3)
    assert again.fingerprint == source.fingerprint
    assert ImageFolder(tmp_path / "photos", test_share=0.3, split_seed=1).fingerprint != source.fingerprint


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_that_is_none_is_named(tmp_path, share):
    with pytest.raises(InputError, match=f"`test_share` is {share}; it must be above 0 and below 1"):
        ImageFolder(make_folder(tmp_path, photos=["a", "b"]) / "photos", test_share=share)


def test_a_folder_that_has_no_training_split_asks_for_one(tmp_path):
    make_folder(tmp_path, validation=["a", "b"], test=["a", "b"])
    with pytest.raises(
        InputError, match=r"folders test, validation and no training split with .*; name .* `train_folder`"
    ):
        ImageFolder(tmp_path)
    source = ImageFolder(tmp_path, train_folder="validation")
    assert (list(source.classes), source.test().root) == (["a", "b"], tmp_path / "test")


def test_a_test_split_may_lie_beside_the_classes(tmp_path):
    make_folder(tmp_path, photos=["cat", "dog"])
    make_folder(tmp_path / "photos", val=["cat", "dog"])
    for options in ({}, {"test_folder": "val"}, {"test_folder": "./val/"}):
        source = ImageFolder(tmp_path / "photos", **options)
        assert (list(source.classes), source.test().root) == (["cat", "dog"], tmp_path / "photos" / "val")


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("train", "valid"), ("Training", "Testing")])
def test_split_folders_are_known_by_the_names_that_people_give_them(tmp_path, train, test):
    source = ImageFolder(make_folder(tmp_path, **{train: ["a", "b"], test: ["a", "b"]}))
    assert (list(source.classes), len(source.train()), len(source.test())) == (["a", "b"], 2, 2)


def test_folders_beside_a_training_split_are_told(tmp_path):
    make_folder(tmp_path, 2, bus=["low"], train=["diesel", "steam"])
    with pytest.warns(InputWarning, match="has the training split 'train', so other folders in it are left out: bus"):
        source = ImageFolder(tmp_path)
    assert list(source.classes) == ["diesel", "steam"]


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    root = make_folder(tmp_path, photos=["cat", "dog"]) / "photos"
    os.rename(root / "cat", os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(InputError, match="whose name is not UTF-8; rename it"):
        ImageFolder(root)


def test_classes_without_test_images_are_told(tmp_path):
    make_folder(tmp_path, train=["a", "b", "c"], val=["b"])
    with pytest.warns(InputWarning, match="has no folder of a, c, which no accuracy will speak of"):
        assert ImageFolder(tmp_path).test().targets.tolist() == [1]


def test_a_test_folder_that_is_named_is_no_class(tmp_path):
    make_folder(tmp_path, 2, photos=["cat", "dog"])
    make_folder(tmp_path / "photos", holdout=["bird", "cat", "dog"])
    with pytest.raises(InputError, match=r"holdout' has the class folder 'bird', which .*photos' has not"):
        ImageFolder(tmp_path / "photos", test_folder="holdout")


def test_links_that_go_round_are_followed_once(tmp_path):
    root = make_folder(tmp_path, 3, photos=["cat", "dog"]) / "photos"
    shutil.move(root / "cat", tmp_path / "cats")
    (root / "cat").symlink_to(tmp_path / "cats")
    (root / "cat" / "round").symlink_to(".")
    (root / "dog" / "up").symlink_to("..")  # to another class's folder, too
    source = ImageFolder(root, test_share=0.5)
    assert np.bincount(np.concatenate([source.train().targets, source.test().targets])).tolist() == [3, 6]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path, train=["a", "a/deep", "b"], val=["a", "b"])
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"`root` has the folder '.*train/a/deep', which cannot be listed"):
        ImageFolder(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path):
    with pytest.warns(InputWarning, match="has no training split, so test, train in it are taken for classes too"):
        source = ImageFolder(make_folder(tmp_path, 2, photos=["car", "test", "train"]) / "photos", test_share=0.5)
    assert list(source.classes) == ["car", "test", "train"]


def test_folders_of_images_that_are_named_as_splits_are_no_classes(tmp_path):
    for name in ("train", "test"):  # as Kaggle's cats and dogs come
        (tmp_path / name).mkdir()
        Image.new("L", (20, 10)).save(tmp_path / name / "cat.1.jpg")
    with pytest.raises(InputError, match="has the folders test, train and no training split with a folder for each"):
        ImageFolder(tmp_path)


def test_a_test_folder_deep_in_the_root_is_no_class(tmp_path):
    root = make_folder(tmp_path, photos=["cat", "dog", "holdout/test/cat", "holdout/test/dog"]) / "photos"
    assert list(ImageFolder(root, test_folder="holdout/test").classes) == ["cat", "dog"]


def test_a_link_to_the_training_split_is_no_test_split(tmp_path):
    make_folder(tmp_path, train=["a", "b"])
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(InputError, match="`test_folder` is 'val', the training split"):
        ImageFolder(tmp_path)


def test_a_test_folder_without_class_folders_has_no_labels_and_does_not_serve(tmp_path):
    make_folder(tmp_path, 2, train=["a", "b"])
    (tmp_path / "test").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "test" / "1.jpg")
    with pytest.warns(InputWarning, match="other folders in it are left out: test"):
        source = ImageFolder(tmp_path, test_share=0.5)
    assert (len(source.train()), len(source.test())) == (2, 2)


def test_one_image_a_class_leaves_none_to_test_on(tmp_path):
    with pytest.raises(InputError, match="no class has a second image to test on"):
        ImageFolder(make_folder(tmp_path, photos=["a", "b"]) / "photos")


def test_a_dangling_link_is_an_image_that_cannot_be_read(tmp_path):
    make_folder(tmp_path, train=["a"], val=["a"])
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = ImageFolder(tmp_path)
    assert source.fingerprint
    with pytest.raises(InputError, match=r"gone.png' cannot be read as an image"):
        source.train()[1]


@pytest.mark.parametrize("option", ["train_folder", "test_folder"])
def test_a_folder_that_is_not_there_is_named(tmp_path, option):
    with pytest.raises(InputError, match=r"`root` is .*, which has no folder 'x'"):
        ImageFolder(make_folder(tmp_path, train=["a"], val=["a"]), **{option: "x"})
    with pytest.raises(InputError, match=r"`root` is .*, which is no folder"):
        ImageFolder(tmp_path / "nowhere")


def test_a_test_class_that_training_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"val' has the class folder 'c', which .*train' has not"):
        ImageFolder(make_folder(tmp_path, train=["a", "b"], val=["b", "c"]))


def test_test_classes_of_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"val' has the class folder 'A', which .*train' has not"):
        ImageFolder(make_folder(tmp_path, train=["a", "b"], val=["A", "B"]))


def test_hidden_files_and_others_are_left_out_and_counted(tmp_path):
    make_folder(tmp_path, train=["a", "b"], val=["a", "b"])
    for name in (".hidden.png", "Thumbs.db", "notes.txt", "no suffix"):
        (tmp_path / "train" / "a" / name).write_text("no image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "a" / ".thumbnails").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "train" / "a" / ".thumbnails" / "0.png")
    with pytest.warns(
        InputWarning, match=r"5 of 7 files under .*train' are left out: .*\(2 hidden, 1 .db, 1 no suffix, 1 .txt\)"
    ):
        source = ImageFolder(tmp_path)
    assert (list(source.classes), len(source.train())) == (["a", "b"], 2)


@pytest.mark.parametrize("name", ["loose.PNG", "more.tar.gz", "cow.zip"])
def test_files_beside_the_class_folders_are_told(tmp_path, name):
    make_folder(tmp_path, train=["a", "b"], val=["a", "b"])
    (tmp_path / "train" / name).touch()
    (tmp_path / "val" / "labels.txt").touch()
    with pytest.warns(InputWarning) as told:
        ImageFolder(tmp_path)
    (warning,) = told
    assert f"train/{name}' lies beside the class folders and is left out" in str(warning.message)


def test_a_test_folder_without_labels_does_not_serve_unless_it_is_named(tmp_path):
    make_folder(tmp_path, 5, train=["a", "b"], test=["unknown"])
    with pytest.warns(InputWarning, match=r"test' has the one folder 'unknown', of no class"):
        source = ImageFolder(tmp_path)
    assert (len(source.train()), len(source.test())) == (8, 2)
    with pytest.raises(InputError, match=r"test' has the class folder 'unknown'"):
        ImageFolder(tmp_path, test_folder="test")


def test_an_empty_class_folder_is_named(tmp_path):
    (make_folder(tmp_path, train=["a"], val=["a", "b"]) / "train" / "b").mkdir()
    with pytest.raises(InputError, match=r"class folder '.*train/b' has no images; fill or remove it"):
        ImageFolder(tmp_path)
    (tmp_path / "train" / "b" / "1.heic").touch()
    with pytest.raises(InputError, match=r"class folder '.*train/b' has no images but 1 .heic; fill or remove it"):
        ImageFolder(tmp_path)


def test_class_folders_are_searched_to_any_depth_and_names_may_be_any_bytes(tmp_path):
    make_folder(tmp_path, train=["a/x/y", "a/z"], val=["a"])
    strange = (str(tmp_path / "train" / "a" / "é 🦆 ").encode() + b"\xff.png").decode("utf-8", "surrogateescape")
    Image.new("L", (20, 10)).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(strange)
    source = ImageFolder(tmp_path)
    assert [source.train()[index][0].size for index in range(3)] == [(20, 10)] * 3
    assert source.fingerprint


def test_other_images_have_another_fingerprint(tmp_path):
    before = ImageFolder(make_folder(tmp_path, train=["a"], val=["a"])).fingerprint
    assert before == ImageFolder(tmp_path).fingerprint
    Image.new("L", (20, 10)).save(tmp_path / "train" / "a" / "more.png")
    assert ImageFolder(tmp_path).fingerprint != before


def test_the_bytes_of_an_image_are_those_of_its_file(tmp_path):
    make_folder(tmp_path, 2, train=["a", "b"], val=["a", "b"])
    Image.effect_noise((20, 10), 90).save(tmp_path / "train" / "b" / "0.png")
    sizes = [(tmp_path / "train" / name).stat().st_size for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png")]
    assert sizes[2] > sizes[3]
    assert list(ImageFolder(tmp_path).stored_bytes()) == sizes


def test_the_bytes_of_an_image_in_an_array_are_its_share():
    assert set(Digits().stored_bytes()) == {64}
    assert len(Digits().stored_bytes()) == len(Digits().train())


def test_wordnet_ids_become_words():
    assert readable("n01443537") == "goldfish"
    assert readable("n01443537", "all") == "goldfish, Carassius auratus"
    assert readable("n99999999") == "n99999999"
    assert readable("hen_house") == "hen house"
    assert len(wordnet()) > 21000


@pytest.mark.filterwarnings("ignore:.*which no accuracy will speak of")
def test_imagenet_is_called_as_torchvision_calls_it(tmp_path):
    """torchvision's own list is the oracle: 1,000 names in the order of the labels."""
    names = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert [readable(each) for each in imagenet_ids()] == names
    assert sorted(imagenet_ids()) == imagenet_ids()
    make_folder(tmp_path, train=imagenet_ids(), val=imagenet_ids()[:1])
    classes = ImageNet(tmp_path).classes
    assert classes == names
    assert (classes[134], classes[517]) == ("crane bird", "crane")
    assert ImageNet(tmp_path, synonyms="all").classes[1] == "goldfish, Carassius auratus"


def test_imagenet_needs_its_thousand_folders(tmp_path):
    with pytest.raises(InputError, match="whose 2 class folders are not the 1000 WordNet ids of ImageNet-1K"):
        ImageNet(make_folder(tmp_path, train=["n01", "n02"], val=["n01", "n02"]))


def make_tiny_imagenet(root):
    ids = ["n02124075", "n01443537"]  # not in the order of wnids.txt: labels are sorted
    for level, each in enumerate(ids):
        (root / "train" / each / "images").mkdir(parents=True)
        Image.new("L", (64, 64), level).save(root / "train" / each / "images" / f"{each}_0.JPEG")
        (root / "train" / each / f"{each}_boxes.txt").write_text("0 0 1 1")
    (root / "wnids.txt").write_text("\n".join(ids))
    (root / "val" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 9).save(root / "val" / "images" / "val_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02124075\t0\t0\t1\t1\n")
    return root


def test_tiny_imagenet_is_read_as_it_is_distributed(tmp_path):
    root = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    source = TinyImageNet(tmp_path)
    assert list(source.classes) == ["goldfish", "Egyptian cat"]
    assert source.train()[1][0].getpixel((0, 0)) == (0, 0, 0)
    image, label = source.test()[0]
    assert (image.getpixel((0, 0)), label, source.image_size) == ((9, 9, 9), 1, 64)
    with pytest.raises(InputError, match="where Tiny-ImageNet is not; name its folder or set `download`"):
        TinyImageNet(root / "train")


def test_tiny_imagenet_is_read_as_people_rearrange_it(tmp_path):
    root = make_tiny_imagenet(tmp_path)
    rows = root / "val" / "val_annotations.txt"
    rows.write_text(rows.read_text() + "\n")
    assert len(TinyImageNet(root).test()) == 1
    rows.write_text("val_0.JPEG\tn00000000\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match=r"has the row \['val_0.JPEG', 'n00000000'\], which names"):
        TinyImageNet(root)
    shutil.rmtree(root / "val" / "images")
    for level, each in ((8, "n01443537"), (9, "n02124075")):
        (root / "val" / each).mkdir()
        Image.new("L", (64, 64), level).save(root / "val" / each / "0.JPEG")
    test = TinyImageNet(root).test()  # the list may lie there still
    assert [(image.getpixel((0, 0)), label) for image, label in (test[0], test[1])] == [((8,) * 3, 0), ((9,) * 3, 1)]


@pytest.fixture
def address(tmp_path):
    """The address of a server of the files of the test's folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tiny_imagenet_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, address):
    make_tiny_imagenet(tmp_path / "there" / "tiny-imagenet-200")
    archive = Path(shutil.make_archive(str(tmp_path / "tiny-imagenet-200"), "zip", tmp_path / "there"))
    monkeypatch.setattr(folders, "TINY_IMAGENET", f"{address}/{archive.name}")
    with pytest.raises(InputError, match=f"`download` is true, but {address}/{archive.name} cannot be fetched"):
        TinyImageNet(tmp_path / "data", download=True)  # its bytes are not the published ones
    assert not (tmp_path / "data" / "tiny-imagenet-200").exists()
    monkeypatch.setattr(folders, "TINY_IMAGENET_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert list(TinyImageNet(tmp_path / "data", download=True).classes) == ["goldfish", "Egyptian cat"]
    archive.unlink()
    assert len(TinyImageNet(tmp_path / "data", download=True).train()) == 2  # it is there


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """An archive of two images, which torchvision takes for CIFAR-10's."""
    kind, batches = torchvision.datasets.CIFAR10, tmp_path / "there" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    rows = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 0]})
    names = pickle.dumps({"label_names": ["airplane", "automobile"]})
    files = {"data_batch_1": rows, "test_batch": rows, "batches.meta": names}
    for name, content in files.items():
        (batches / name).write_bytes(content)
    archive = Path(shutil.make_archive(str(tmp_path / "cifar"), "gztar", tmp_path / "there"))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": "batches.meta", "md5": sums["batches.meta"]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_cifar_is_downloaded_and_a_failure_told(tmp_path, monkeypatch, address, cifar_archive):
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "url", f"{address}/nothing.tar.gz")
    with pytest.raises(InputError, match=f"`download` is true, but {address}/nothing.tar.gz cannot be fetched"):
        CIFAR10(tmp_path / "data", download=True).train()
    monkeypatch.setattr(kind, "url", f"{address}/{cifar_archive.name}")
    source = CIFAR10(tmp_path / "data", download=True)
    assert (list(source.classes), source.train().targets) == (["airplane", "automobile"], [1, 0])


def test_of_two_that_would_download_one_does(tmp_path, monkeypatch, address, cifar_archive):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{address}/{cifar_archive.name}")
    module = torchvision.datasets.cifar
    download, times = module.download_and_extract_archive, []

    def slowly(*args, **options):
        times.append(time.monotonic())
        time.sleep(0.5)
        download(*args, **options)

    monkeypatch.setattr(module, "download_and_extract_archive", slowly)
    source = CIFAR10(tmp_path / "data", download=True)
    with ThreadPoolExecutor() as threads:
        assert [len(split.result()) for split in (threads.submit(source.train), threads.submit(source.test))] == [2, 2]
    assert len(times) == 1


@pytest.mark.parametrize("source", [CIFAR10, TinyImageNet])
def test_a_root_that_cannot_be_written_is_no_failed_download(source):
    with pytest.raises(InputError, match="`root` is '/dev/null/data', which cannot be written"):
        source("/dev/null/data", download=True).train()


@pytest.mark.parametrize(
    ("source", "name", "folder"),
    [(CIFAR10, "CIFAR10", "cifar-10-batches-py"), (CIFAR100, "CIFAR100", "cifar-100-python")],
)
def test_cifar_that_is_not_there_is_named(tmp_path, source, name, folder):
    fault = f"which holds no folder '{folder}' of {name}; name the one that does, or set `download` to true"
    with pytest.raises(InputError, match=fault):
        source(tmp_path / folder).train()


def test_cifar_100_takes_names_and_order_from_its_own_files(tmp_path, monkeypatch):
    """The authors' prompts are in the order of the superclasses, the labels in that of the alphabet."""
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.zeros((2, 3072), np.uint8)
    for split in ("train", "test"):
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [1, 0], "coarse_labels": [4, 1]}))
    names = {"fine_label_names": ["apple", "aquarium_fish"], "coarse_label_names": ["aquatic_mammals", "fish"]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    source = CIFAR100(tmp_path)
    assert list(source.classes) == ["apple", "aquarium fish"]
    assert [source.train()[0][1], source.test()[1][1]] == [1, 0]
    assert source.stored_bytes() == [3072, 3072]


def test_sources_can_be_sent_to_other_processes(tmp_path):
    folder = ImageFolder(make_folder(tmp_path, train=["a"], val=["a"]))
    assert pickle.loads(pickle.dumps(folder)).classes == folder.classes
    assert pickle.loads(pickle.dumps(CIFAR10(tmp_path))).root == tmp_path


class TestHuggingFace:
    """Datasets written here, as `load_dataset` finds them on the Hub or on a disk."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path_factory, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))

    @staticmethod
    def write(path, labels, feature=None, column="label", images="image", **more):
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        pictures = [Image.new("L", (30, 28), index) for index in range(len(labels))]
        features = {images: ImageFeature(), column: feature or Value("int64")}
        features |= {name: ImageFeature() for name in more}
        rows = {images: pictures, column: labels} | more
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, Features(features)).to_parquet(str(path))

    def test_columns_are_found_by_their_types_and_names_in_the_order_of_the_labels(self, tmp_path):
        from datasets import ClassLabel

        feature = ClassLabel(names=["zebra", "ape"])
        self.write(tmp_path / "pets" / "train.parquet", [1, 0, 1], feature, "animal", "photo")
        self.write(tmp_path / "pets" / "test.parquet", [0], feature, "animal", "photo")
        source = HuggingFace(tmp_path / "pets")
        assert (source.classes, source.image_size, source.name) == (["zebra", "ape"], 28, "pets")
        assert (list(source.train().targets), list(source.test().targets)) == ([1, 0, 1], [0])
        image, label = source.train()[2]
        assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (2, 2, 2), 1)

    def test_labels_with_gaps_and_rows_without_one(self, tmp_path):
        self.write(tmp_path / "train.parquet", [7, 2, None, 7, -1])
        self.write(tmp_path / "validation.parquet", [2, 7])
        source = HuggingFace(tmp_path)
        assert (source.classes, list(source.train().targets)) == (["2", "7"], [1, 0, 1])
        assert source.train()[2][0].getpixel((0, 0)) == (3, 3, 3)
        assert list(source.test().targets) == [0, 1]

    @pytest.mark.parametrize("kind", ["string", "binary"])
    def test_labels_may_be_words(self, tmp_path, kind):
        from datasets import Value

        words = ["dog", "cat", "", "dog", "cat", None]
        words = [word.encode() if word is not None and kind == "binary" else word for word in words]
        self.write(tmp_path / "train.parquet", words, Value(kind))
        source = HuggingFace(tmp_path / "train.parquet", test_share=0.5)
        assert source.classes == ["cat", "dog"]
        assert (sorted(source.train().targets), sorted(source.test().targets)) == ([0, 1], [0, 1])

    def test_labels_that_pandas_made_floats_of_are_whole_numbers(self, tmp_path):
        from datasets import Value

        self.write(tmp_path / "train.parquet", [1.0, 0.0, float("nan"), 1.0, -1.0, None], Value("float32"))
        source = HuggingFace(tmp_path / "train.parquet", test_share=0.5)
        assert source.classes == ["0", "1"]
        assert sorted([*source.train().targets, *source.test().targets]) == [0, 1, 1]

    def test_labels_of_a_database_are_whole_numbers(self, tmp_path):
        from datasets import Value

        labels = [Decimal(label) for label in (1, 0, 1, -1, 0)]
        self.write(tmp_path / "train.parquet", [*labels, None], Value("decimal128(10, 0)"))
        source = HuggingFace(tmp_path / "train.parquet", test_share=0.5)
        assert source.classes == ["0", "1"]
        assert sorted([*source.train().targets, *source.test().targets]) == [0, 0, 1, 1]

    def test_arrays_of_grey_pixels_are_as_bright_as_they_say(self, tmp_path):
        from datasets import Array2D, Dataset, Features, Value

        pixels = np.linspace(0, 250, 24 * 24).reshape(4, 144)[:, :, None].repeat(24, 2).transpose(0, 2, 1)[:, :, :24]
        rows = {"image": list(pixels.astype(np.uint8)), "label": [0, 1, 0, 1]}
        features = Features(image=Array2D((24, 24), "uint8"), label=Value("int64"))
        Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train.parquet"))
        source = HuggingFace(tmp_path / "train.parquet", image_column="image", test_share=0.5)
        found = sorted(
            np.asarray(image)[..., 0].max() for split in (source.train(), source.test()) for image, _ in split
        )
        assert found == [int(each.max()) for each in pixels]

    @pytest.mark.parametrize(
        ("option", "column", "fault"),
        [
            ("image_column", "label", "`image_column` is 'label', of type Value, which holds no images"),
            ("label_column", "image", "`label_column` is 'image', of type Image, where one label a row is needed"),
        ],
    )
    def test_a_column_of_another_kind_is_named(self, tmp_path, option, column, fault):
        self.write(tmp_path / "train.parquet", [0, 1, 0, 1])
        with pytest.raises(InputError, match=fault):
            HuggingFace(tmp_path / "train.parquet", **{option: column})

    def test_an_image_size_of_nothing_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="`image_size` is 0; it must be at least 1"):
            HuggingFace(tmp_path, image_size=0)
        with pytest.raises(InputError, match="`image_size` is 0; it must be at least 1"):
            ImageFolder(tmp_path, image_size=0)

    def test_a_test_split_without_labels_does_not_serve(self, tmp_path):
        self.write(tmp_path / "train.parquet", [0, 0, 0, 1, 1, 1])
        self.write(tmp_path / "test.parquet", [-1, -1])
        source = HuggingFace(tmp_path, test_share=0.34)
        assert (len(source.train()), len(source.test())) == (4, 2)

        with pytest.raises(InputError, match="`test_split` is 'test', of which no row has a label"):
            HuggingFace(tmp_path, test_split="test")
        self.write(tmp_path / "validation.parquet", [1, 0, 1])
        assert list(HuggingFace(tmp_path).test().targets) == [1, 0, 1]

    def test_labels_that_are_none_are_refused(self, tmp_path):
        from datasets import List, Value

        self.write(tmp_path / "none" / "train.parquet", [-1, None])
        with pytest.raises(InputError, match="`label_column` is 'label', in which no row of train has a label"):
            HuggingFace(tmp_path / "none")
        self.write(tmp_path / "many" / "train.parquet", [[0, 1], [1]], List(Value("int64")))
        with pytest.raises(InputError, match="`label_column` is 'label', of type List, where one label a row is"):
            HuggingFace(tmp_path / "many")

    def test_its_name_is_the_last_part_with_the_dots_in_it(self, tmp_path, monkeypatch):
        self.write(tmp_path / "Pets.v2" / "train.parquet", [0, 0, 1, 1])
        monkeypatch.chdir(tmp_path / "Pets.v2")
        assert HuggingFace("train.parquet").name == "train"
        source = HuggingFace(".")
        assert source.name == "pets.v2"
        for path, name in (
            (str(tmp_path / "Pets.v2"), "pets.v2"),
            ("user/Birds-v1.5", "birds-v1.5"),
            ("mnist", "mnist"),
        ):
            source.path = path
            assert source.name == name

    def test_a_row_without_an_image_is_one_that_cannot_be_read(self, tmp_path):

        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        rows = {"image": [None, Image.new("L", (9, 9))], "label": [0, 1]}
        features = Features({"image": ImageFeature(), "label": Value("int64")})
        Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train.parquet"))
        self.write(tmp_path / "test.parquet", [0, 1])
        source = HuggingFace(tmp_path)
        assert source.fingerprint
        with pytest.raises(InputError, match="row 0 has no image"):
            source.train()[0]

    def test_names_are_made_readable(self, tmp_path):
        from datasets import ClassLabel

        feature = ClassLabel(names=["n01443537", "apple_pie", "tench, Tinca tinca", "yes, please"])
        self.write(tmp_path / "train.parquet", [0, 1, 2, 3] * 2, feature)
        assert HuggingFace(tmp_path).classes == ["goldfish", "apple pie", "tench", "yes, please"]
        assert HuggingFace(tmp_path, synonyms="all").classes[::2] == [
            "goldfish, Carassius auratus",
            "tench, Tinca tinca",
        ]

    def test_a_folder_of_images_is_read_by_the_same_road(self, tmp_path):
        source = HuggingFace(make_folder(tmp_path, 2, train=["a", "b"], test=["a", "b"]))
        assert (source.classes, len(source.train()), len(source.test())) == (["a", "b"], 4, 4)
        assert source.train()[3][0].getpixel((0, 0)) == (1, 1, 1)
        before = source.fingerprint
        Image.new("RGB", (20, 11)).save(tmp_path / "train" / "a" / "0.png")
        assert HuggingFace(tmp_path).fingerprint != before

    def test_the_bytes_of_an_image_are_the_encoded_ones(self, tmp_path):
        folder = make_folder(tmp_path / "folder", 2, train=["a", "b"], test=["a", "b"])
        Image.effect_noise((20, 10), 90).save(folder / "train" / "b" / "0.png")
        assert HuggingFace(folder).stored_bytes() == ImageFolder(folder).stored_bytes()

        self.write(tmp_path / "train.parquet", [0, None, 1, 0, 1])
        source = HuggingFace(tmp_path / "train.parquet", test_share=0.5)
        rows = source.train().rows
        encoded = [rows[int(row)]["image"]["bytes"] for row in source.train().indices]
        assert source.stored_bytes() == [len(each) for each in encoded]
        assert len(encoded) == len(source.train()) == 2

    def test_other_labels_have_another_fingerprint(self, tmp_path):
        for name, labels in (("a", [0, 1, 0, 1]), ("b", [1, 0, 1, 0])):
            self.write(tmp_path / name / "train.parquet", labels)
        prints = [HuggingFace(tmp_path / name, test_share=0.5).fingerprint for name in ("a", "a", "b")]
        assert prints[0] == prints[1] != prints[2]

    def test_images_in_an_archive_are_read_there(self, tmp_path):
        (tmp_path / "train").mkdir()

        def fill(level):
            with zipfile.ZipFile(tmp_path / "train" / "images.zip", "w") as archive:
                for number in range(6):
                    png = io.BytesIO()
                    Image.new("L", (16, 16), level + number).save(png, "PNG")
                    archive.writestr(f"{number}.png", png.getvalue())
                rows = [f"{number}.png,{'ab'[number % 2]}" for number in range(6)]
                archive.writestr("metadata.csv", "\n".join(["file_name,label", *rows]))
            return HuggingFace(tmp_path, test_share=0.3)

        source = fill(100)
        seen = sorted(
            images[i][0].getpixel((0, 0))[0] for images in (source.train(), source.test()) for i in range(len(images))
        )
        assert (seen, source.image_size) == ([100, 101, 102, 103, 104, 105], 16)
        assert min(source.stored_bytes()) > 0
        assert source.fingerprint == fill(100).fingerprint

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_column": "x"}, "`image_column` is 'x', but the columns are image, label"),
            ({"label_column": "x"}, "`label_column` is 'x', but the columns are image, label"),
            ({"train_split": "x"}, "`train_split` is 'x', but the splits are train"),
            ({"test_split": "train"}, "`test_split` is 'train', the training split: its images would be both"),
            ({"test_split": "x"}, "`test_split` is 'x', but the splits are train"),
        ],
        ids=str,
    )
    def test_what_is_not_there_is_named(self, tmp_path, options, message):
        self.write(tmp_path / "train.parquet", [0, 1])
        with pytest.raises(InputError, match=message):
            HuggingFace(tmp_path, **options)

    def test_what_is_not_to_be_told_is_asked_for(self, tmp_path):
        self.write(tmp_path / "two" / "train.parquet", [0, 1], mask=[Image.new("L", (3, 3))] * 2)
        with pytest.raises(InputError, match=r"2 columns hold images \(image, mask\); name one as `image_column`"):
            HuggingFace(tmp_path / "two")
        self.write(tmp_path / "other" / "train.parquet", [0, 1] * 2, column="kind")
        with pytest.raises(InputError, match=r"0 columns hold labels \(image, kind\); name one as `label_column`"):
            HuggingFace(tmp_path / "other")
        assert HuggingFace(tmp_path / "other", label_column="kind", test_share=0.5).classes == ["0", "1"]

    @pytest.mark.parametrize("path", ["nowhere/at-all", "notes.txt"])
    def test_what_cannot_be_opened_is_named(self, tmp_path, path):
        (tmp_path / "notes.txt").write_text("no dataset")
        with pytest.raises(InputError, match=f"`path` is .*{path}'"):
            HuggingFace(tmp_path / path if path.endswith("txt") else path)

    def test_workers_read_the_same(self, tmp_path):
        self.write(tmp_path / "train.parquet", [0, 1] * 8)
        images = pickle.loads(pickle.dumps(HuggingFace(tmp_path / "train.parquet").train()))
        loader = torch.utils.data.DataLoader(images, None, num_workers=2)
        assert [label for _, label in loader] == list(images.targets)


def test_a_training_split_is_not_tested_on(tmp_path):
    root = make_folder(tmp_path / "pets", train=["cat", "dog"])
    for options in ({}, {"train_folder": "train"}, {"train_folder": "./train"}):
        with pytest.raises(InputError, match="`test_folder` is 'train', the training split: its images would be both"):
            ImageFolder(root, test_folder="train", **options)


def test_what_a_file_does_not_have_cannot_be_asked_for(tmp_path):
    file = tmp_path / "set.parquet"
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(file)
    with pytest.raises(InputError, match=r"`config` is 'small', but `path` is the file .*, which has none"):
        HuggingFace(file, config="small")
    for path in (file, tmp_path):
        with pytest.raises(InputError, match=r"`revision` is 'v1', but `path` is .*, which lies here"):
            HuggingFace(path, revision="v1")
