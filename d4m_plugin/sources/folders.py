"""Images in folders by class."""

import hashlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
from PIL import Image

from d4m_plugin.cache import make_writable
from d4m_plugin.checking import check_least, content_of
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.sources.base import IndexedSource
from d4m_plugin.sources.images import natural_size, picture_formats, read_image, size_of
from d4m_plugin.sources.names import Synonyms, imagenet_ids, readable
from d4m_plugin.sources.splits import check_share
from d4m_plugin.units import in_turn

SHOWN_KINDS = 5
ASKING, ASKED_AT_ONCE = 32, 1000  # threads that ask for the sizes of files, and of how many in a turn
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("val", "valid", "validation", "test", "testing")
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class ImageFolder(IndexedSource):
    """Images under `root/CLASS/`, or under `root/train/CLASS/` and `root/val/CLASS/` (or `validation`, `test`).

    A class folder is searched to any depth, each folder once, whatever links lead to it. Hidden files, and files that
    are no images by their names, are left out and counted; images and archives beside the class folders are left out
    with a warning. Folders named by WordNet id get words, underscores become spaces.

    Args:
        root: the folder.
        image_size: edge in pixels of the images that students see; by default their own, at most 224.
        train_folder: the folder in `root` of the training split; by default `train` or `training`, in any case of
            letters, where it is there.
        test_folder: the folder in `root` of the images that accuracies are measured on; by default `val`, `valid`,
            `validation`, `test` or `testing`, likewise; where none is there, `test_share` of the training images are
            set apart.
        test_share: share of each class that is set apart where there is no test folder, in (0, 1).
        split_seed: decides which images are set apart.
        synonyms: of WordNet's names, the `first` or `all`.

    Warns:
        InputWarning: where files or folders are left out, or a class has no test images.

    Raises:
        InputError: where a folder is not there or cannot be listed, a class folder has no images, or the test folder is
            that of the training split.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        train_folder: str | None = None,
        test_folder: str | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        synonyms: Synonyms = "first",
    ) -> None:
        check_least(1, image_size=image_size)
        self.root = Path(root).expanduser()
        check_share(test_share)
        train, folders, test = _find_splits(self.root, train_folder, test_folder)
        self.classes = self._names(folders, synonyms)
        if test is not None:  # first, as it is mostly smaller, and finds what does not go together
            self._test = _index_test(test, train, folders)
        self._train = index(train, folders)
        if test is None:
            self._set_apart(test_share, split_seed)
        self.image_size = image_size or natural_size(self._train)

    @property
    def name(self) -> str:
        """The folder's name, in lower case."""
        return self.root.resolve().name.lower()

    def _names(self, folders: Sequence[str], synonyms: Synonyms) -> Sequence[str]:
        return [readable(folder, synonyms) for folder in folders]


class ImageNet(ImageFolder):
    """ImageNet-1K: `root/train` and `root/val`, with a folder for each of the 1,000 WordNet ids.

    The class names are torchvision's: 134 is the crane that flies, "crane bird", and 517 the one that lifts.

    Args:
        root: the folder.
        image_size: edge in pixels of the images that students see.
        synonyms: of the names, the `first` or `all`.

    Raises:
        InputError: where a folder is not there, or the class folders are not ImageNet's.
    """

    license = "other"
    citation = "J. Deng et al.: ImageNet: A Large-Scale Hierarchical Image Database, CVPR 2009"

    def __init__(self, root: str | Path, image_size: int = 224, synonyms: Synonyms = "first") -> None:
        super().__init__(root, image_size, train_folder="train", test_folder="val", synonyms=synonyms)

    def _names(self, folders: Sequence[str], synonyms: Synonyms) -> Sequence[str]:
        _check_ids(self.root, folders, imagenet_ids(), "ImageNet-1K")
        return super()._names(folders, synonyms)


class TinyImageNet(ImageFolder):
    """Tiny-ImageNet: 200 classes of 500 training images of 64x64 pixels, and 50 each to test on.

    As it is distributed: `root/tiny-imagenet-200/train/ID/images` and `val/val_annotations.txt`, or its `val` with a
    folder for each class, as many rearrange it. Its own test images have no labels, so `val` serves.

    Args:
        root: the folder that holds, or is, `tiny-imagenet-200`.
        download: fetch it (240 MB) where it is not there.
        synonyms: of the names, the `first` or `all`.

    Raises:
        InputError: where it is not there, or its files are in neither way.
    """

    license = "other"
    citation = "Y. Le, X. Yang: Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N, 2015"

    def __init__(self, root: str | Path = "data", download: bool = False, synonyms: Synonyms = "first") -> None:
        base = Path(root).expanduser()
        folder = base if (base / "wnids.txt").is_file() else base / "tiny-imagenet-200"
        if download and not folder.is_dir():
            make_writable(base, "root")
            with in_turn(folder, "downloads Tiny-ImageNet"):
                if not folder.is_dir():
                    _download_tiny_imagenet(base)
        if not (folder / "wnids.txt").is_file():
            raise InputError(
                f"`root` is {str(root)!r}, where Tiny-ImageNet is not; name its folder or set `download` to true."
            )
        self.root, self.image_size = folder, 64
        ids = class_folders(folder / "train")
        _check_ids(folder, ids, sorted((folder / "wnids.txt").read_text().split()), "Tiny-ImageNet")
        self.classes = [readable(each, synonyms) for each in ids]
        self._train = index(folder / "train", [f"{each}/images" for each in ids])
        val = folder / "val"
        rearranged = not {*_folders_in(val)}.isdisjoint(ids)  # the list may lie there still
        self._test = _index_test(val, folder / "train", ids) if rearranged else _annotated(val, ids)


def _annotated(val: Path, ids: Sequence[str]) -> "_Files":
    """Return the test images of Tiny-ImageNet, each named in a row of a list with its WordNet id."""
    file = val / "val_annotations.txt"
    rows = [line.split("\t")[:2] for line in content_of(file).decode().splitlines() if line.strip()]
    label_of = {each: label for label, each in enumerate(ids)}
    for row in rows:
        if len(row) < 2 or row[1] not in label_of:
            raise InputError(f"{str(file)!r} has the row {row}, which names no image and WordNet id of a class.")
    labels = np.array([label_of[each] for _, each in rows])
    return _Files(val / "images", pa.array([name.encode() for name, _ in rows]), labels)


def _download_tiny_imagenet(base: Path) -> None:
    """Fetch and unpack the archive aside, so that a folder that is there is whole."""
    from torchvision.datasets.utils import download_and_extract_archive

    aside = base / ".tiny-imagenet-200.partial"
    try:
        download_and_extract_archive(TINY_IMAGENET, str(base), str(aside), md5=TINY_IMAGENET_MD5)
    except (OSError, RuntimeError) as error:
        raise InputError(f"`download` is true, but {TINY_IMAGENET} cannot be fetched: {error}") from error
    (aside / "tiny-imagenet-200").replace(base / "tiny-imagenet-200")
    aside.rmdir()


class _Files:
    """Image files as labelled images: a few bytes a file in memory, whatever their number."""

    def __init__(self, root: Path, names: pa.Array, targets: np.ndarray) -> None:
        self.root, self.names, self.targets = root, names, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = os.path.join(self.root, os.fsdecode(self.names[index].as_py()))  # a Path takes a tenth of the reading
        return read_image(path, path), int(self.targets[index])

    def only(self, chosen: Sequence[int]) -> "_Files":
        """Return some of them."""
        return _Files(self.root, self.names.take(pa.array(chosen, pa.int64())), self.targets[chosen])

    @property
    def keys(self) -> list[bytes]:
        """The names."""
        names: list[bytes] = self.names.to_pylist()
        return names

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes and labels."""
        digest = hashlib.sha256(self.targets.astype(np.int64).tobytes())
        for name, size in zip(self.names, self.stored_bytes(), strict=True):
            digest.update(name.as_py() + f"\0{size}\0".encode())
        return digest.hexdigest()

    def stored_bytes(self) -> list[int]:
        """Return the size of each file."""
        paths = [os.path.join(self.root, os.fsdecode(name)) for name in self.keys]
        parts = [paths[start : start + ASKED_AT_ONCE] for start in range(0, len(paths), ASKED_AT_ONCE)]
        with ThreadPoolExecutor(ASKING) as pool:  # a network's file system answers many as soon as one
            return list(chain.from_iterable(pool.map(lambda part: list(map(size_of, part)), parts)))


def _find_splits(root: Path, train_folder: str | None, test_folder: str | None) -> tuple[Path, list[str], Path | None]:
    """Return the training folder, its class folders, and the test folder, None where images have to be set apart."""
    if not root.is_dir():
        raise InputError(f"`root` is {str(root)!r}, which is no folder.")
    for folder in (train_folder, test_folder):
        if folder is not None and not (root / folder).is_dir():
            raise InputError(f"`root` is {str(root)!r}, which has no folder {folder!r}.")
    # As they stand in a list of folders: a shell completes `val` to `val/`.
    train_folder, test_folder = (each and os.path.normpath(each) for each in (train_folder, test_folder))
    there = _folders_in(root)
    order = [*TRAIN_FOLDERS, *TEST_FOLDERS]
    splits = [name for name in there if name.lower() in order and _folders_in(root / name)]
    splits.sort(key=lambda name: order.index(name.lower()))
    trains = [name for name in splits if name.lower() in TRAIN_FOLDERS]
    tests = [test_folder] if test_folder else [name for name in splits if name not in (*trains, train_folder)]
    if train_folder is None and trains:
        train_folder = trains[0]
        if others := sorted({*there} - {*splits, *tests}):
            sentence = f"{str(root)!r} has the training split {train_folder!r}, so other folders in it are left out"
            warnings.warn(f"{sentence}: {', '.join(others)}.", InputWarning, stacklevel=2)
    if train_folder and tests and (root / train_folder).samefile(root / tests[0]):
        raise InputError(f"`test_folder` is {tests[0]!r}, the training split: its images would be both.")
    if train_folder is not None:
        classes, test = class_folders(root / train_folder), root / tests[0] if tests else None
        if test and test_folder is None and len(own := _folders_in(test)) == 1 and own[0] not in classes:
            sentence = f"{str(test)!r} has the one folder {own[0]!r}, of no class, so training images are set apart"
            warnings.warn(f"{sentence}; name another as `test_folder`.", InputWarning, stacklevel=2)
            test = None
        return root / train_folder, classes, test
    # No training split: `root` has the classes, and beside them perhaps a test split of the same classes.
    if test_folder is None:
        tests = [name for name in tests if set(_folders_in(root / name)) <= {*there} - {*splits}]
    classes = [name for name in there if name not in {Path(test).parts[0] for test in tests}]
    like_splits = [name for name in classes if name.lower() in order]
    if not {*classes} - {*like_splits}:
        if not like_splits:
            raise InputError(
                f"`root` is {str(root)!r}, which holds no folders; name the folder that has one for each class."
            )
        raise InputError(
            f"`root` is {str(root)!r}, which has the folders {', '.join(like_splits)} and no training split with a "
            "folder for each class; name the one to distil as `train_folder`."
        )
    if like_splits:
        sentence = f"{str(root)!r} has no training split, so {', '.join(like_splits)} in it are taken for classes too"
        warnings.warn(f"{sentence}; name `train_folder` or `test_folder` if they are none.", InputWarning, stacklevel=2)
    return root, classes, root / tests[0] if tests else None


def _folders_in(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        _refuse(error)
    for name in names:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise InputError(f"`root` has the folder {str(folder / name)!r}, whose name is not UTF-8; rename it.")
    return names


def _refuse(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be listed, whose images would be missing without a word."""
    raise InputError(f"`root` has the folder {error.filename!r}, which cannot be listed ({error.strerror}).") from error


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted.

    Raises:
        InputError: where there are none.
    """
    names = _folders_in(folder)
    if not names:
        raise InputError(f"`root` has the folder {str(folder)!r}, which holds no class folders.")
    return names


def index(root: Path, folders: Sequence[str]) -> _Files:
    """Return the images of class folders, in order; count what else lies there."""
    suffixes = _image_suffixes()
    archives = tuple(suffix for _, of_format, _ in shutil.get_unpack_formats() for suffix in of_format)
    for name in sorted(entry.name for entry in os.scandir(root) if not entry.is_dir()):
        if name[0] != "." and name.lower().endswith((*suffixes, *archives)):
            sentence = f"{str(root / name)!r} lies beside the class folders and is left out, as all such files are"
            warnings.warn(f"{sentence}; an image's class is its folder.", InputWarning, stacklevel=2)
            break
    chunks: list[pa.Array] = []
    left_out: Counter[str] = Counter()
    for folder in folders:
        names = []
        others: Counter[str] = Counter()
        for file, hidden in _files_under(root, folder):
            suffix = os.path.splitext(file)[1].lower()
            if hidden:
                others["hidden"] += 1
            elif suffix not in suffixes:
                others[suffix or "no suffix"] += 1
            else:
                names.append(os.fsencode(file))
        if not names:
            found = f" but {_told(others)}" if others else ""
            raise InputError(f"the class folder {str(root / folder)!r} has no images{found}; fill or remove it.")
        chunks.append(pa.array(names, pa.binary()))
        left_out += others
    targets = np.repeat(np.arange(len(folders)), [len(chunk) for chunk in chunks])
    if left_out:
        files = left_out.total() + len(targets)
        sentence = (
            f"{left_out.total()} of {files} files under {str(root)!r} are left out: hidden, or by their names no "
            f"images that Pillow reads ({_told(left_out)})."
        )
        warnings.warn(sentence, InputWarning, stacklevel=2)
    return _Files(root, pa.concat_arrays(chunks), targets)


def _told(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(SHOWN_KINDS))


def _index_test(root: Path, train: Path, folders: Sequence[str]) -> _Files:
    """Return the test images, labelled as the training folders are."""
    there = class_folders(root)
    unknown = sorted(set(there) - set(folders))
    if unknown:
        raise InputError(
            f"{str(root)!r} has the class folder {unknown[0]!r}, which {str(train)!r} has not; they need the same ones."
        )
    if untested := sorted(set(folders) - set(there)):
        sentence = f"{str(root)!r} has no folder of {', '.join(untested[:SHOWN_KINDS])}"
        more = f" and {len(untested) - SHOWN_KINDS} more" if len(untested) > SHOWN_KINDS else ""
        warnings.warn(f"{sentence}{more}, which no accuracy will speak of.", InputWarning, stacklevel=2)
    files = index(root, there)
    labels = np.array([folders.index(folder) for folder in there])
    return _Files(root, files.names, labels[files.targets])


def _files_under(root: Path, folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the files under a class folder, as paths from `root`, in an order that no file system decides.

    With each comes whether it is hidden. No folder is entered twice, so that a link to one above it ends there.
    """
    entered = set()
    for parent, subfolders, files in os.walk(root / folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders.sort()
        below = os.path.relpath(parent, root / folder)
        hidden = below != "." and any(part.startswith(".") for part in below.split(os.sep))
        here = os.path.relpath(parent, root)
        for name in sorted(files):
            yield os.path.join(here, name), hidden or name.startswith(".")


def _image_suffixes() -> set[str]:
    """Return the suffixes of the formats that Pillow reads."""
    formats = picture_formats()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def _check_ids(root: Path, folders: Sequence[str], ids: Sequence[str], dataset: str) -> None:
    if list(folders) != list(ids):
        raise InputError(
            f"`root` is {str(root)!r}, whose {len(folders)} class folders are not the {len(ids)} WordNet ids of "
            f"{dataset}; use ImageFolder for others."
        )
