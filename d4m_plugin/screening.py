"""The first pass over real images: files that cannot be read are found before the long work."""

import hashlib
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from d4m_plugin.cache import resolve_cache_dir
from d4m_plugin.checking import check_least
from d4m_plugin.errors import InputError, InputWarning
from d4m_plugin.progress import Progress
from d4m_plugin.sources import Digits, LabelledImages, Source
from d4m_plugin.subsets import Chosen
from d4m_plugin.units import DamagedError, in_turn, load_json, save_json

SHOWN = 5  # bad files that the error itself names
BATCH = 64  # images that a worker tries before it reports


def find_bad(images: LabelledImages, fingerprint: str, cache: Path, num_workers: int) -> tuple[dict[int, str], Path]:
    """Return what is wrong with each image that cannot be read, by its index, and the file that lists them.

    Args:
        images: each is read once, ever: what was found is kept, and only what was bad is tried again.
        fingerprint: names the images in the cache.
        cache: the cache folder.
        num_workers: processes that read.
    """
    file = cache / "screened" / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"
    file.parent.mkdir(exist_ok=True)
    with in_turn(file, "checks the images"):
        listed = _listed(file)
        indices = _unreadable(images, num_workers) if listed is None else map(int, listed)
        attempts = _Attempts(images)
        bad = {index: fault for index in indices if (fault := attempts[index])}
        if listed is None or len(bad) < len(listed):
            save_json(file, {str(index): fault for index, fault in bad.items()})
    return bad, file


def _listed(file: Path) -> dict[str, str] | None:
    """Return what was wrong with the images that could not be read, by their numbers; None where none were tried."""
    try:
        return load_json(file, dict[str, str])
    except FileNotFoundError:
        return None
    except DamagedError as error:
        warnings.warn(f"{error} The images are checked again.", InputWarning, stacklevel=2)
        return None


def _unreadable(images: LabelledImages, num_workers: int) -> list[int]:
    found: list[int] = []
    tried = 0
    own = torch.Generator()  # the loader draws from it, and would from the one that training goes on with
    loader = DataLoader(_Attempts(images), BATCH, num_workers=num_workers, collate_fn=list, generator=own)
    with Progress("Checking", len(images), delay=1) as progress:
        for faults in loader:
            found += [tried + place for place, fault in enumerate(faults) if fault]
            tried += len(faults)
            progress.update(len(faults))
    return found


class _Attempts(Dataset[str]):
    """What is wrong with each image: nothing, or one sentence."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images[index][0].load()  # a source of the user's may have opened it alone
        except InputError as error:
            return " ".join(str(error).split())
        except Exception as error:  # Pillow's decoders raise anything on broken files
            return " ".join(f"Image {index} cannot be read ({error}).".split())
        return ""


def readable_source(
    source: Source | None, skip_bad_images: bool, cache_dir: str | Path | None, num_workers: int
) -> Source:
    """Return a source, scikit-learn's digits by default, without its unreadable images where they are to be skipped."""
    check_least(0, num_workers=num_workers)
    source = source or Digits()
    if not skip_bad_images or isinstance(source, WithoutBadImages):
        return source
    return WithoutBadImages(source, resolve_cache_dir(cache_dir), num_workers)


def fingerprint_of_tests(source: Source, images: LabelledImages) -> str:
    """Return what names a source's test images in the cache."""
    own = getattr(images, "fingerprint", "")  # of images in files, which may change beside the training split
    return f"{source.fingerprint} test {len(images)} {own}"


def check_labels(source: Source, images: LabelledImages) -> None:
    """Refuse labels that are not numbers of the source's classes, as a user's own source may give.

    Raises:
        InputError: where there are such.
    """
    labels, count = np.asarray(images.targets), len(source.classes)
    whole = labels.ndim == 1 and (labels.dtype.kind in "iu" or not len(labels))
    if not whole or (len(labels) and not 0 <= labels.min() <= labels.max() < count):
        raise InputError(
            f"the `targets` of {source.name} must be a whole number for each image, at least 0 and below {count}, the "
            "number of its `classes`."
        )


def check_images(
    source: Source, images: LabelledImages, what: str, fingerprint: str, cache: Path, num_workers: int
) -> None:
    """Refuse images of which some cannot be read, unless their source leaves those out already.

    Args:
        source: whose images they are.
        images: each is read once, ever.
        what: what the error calls them, such as `training images`.
        fingerprint: names them in the cache.
        cache: the cache folder.
        num_workers: processes that read.

    Raises:
        InputError: where one cannot; it names the first few and the file that lists all. Or where labels are none.
    """
    check_labels(source, images)
    if isinstance(source, WithoutBadImages):
        return
    bad, file = find_bad(images, fingerprint, cache, num_workers)
    if bad:
        shown = " ".join(list(bad.values())[:SHOWN])
        more = f" All are listed in {str(file)!r}." if len(bad) > SHOWN else ""
        raise InputError(
            f"{len(bad)} of {len(images)} {what} of {source.name} cannot be read. {shown}{more} Mend or remove them, "
            "or set `skip_bad_images` to true to leave them out."
        )


class WithoutBadImages(Source):
    """A source without the images that cannot be read, of both splits.

    Args:
        source: the source.
        cache: the cache folder, where the list of them is kept.
        num_workers: processes that read images in the first pass.

    Warns:
        InputWarning: where some are left out, when the images are first asked for.
    """

    def __init__(self, source: Source, cache: Path, num_workers: int = 0) -> None:
        self.source, self.cache, self.num_workers = source, cache, num_workers
        for name in Source.__annotations__.keys() - {"license"}:
            setattr(self, name, getattr(source, name))

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def license(self) -> str:  # type: ignore[override]  # a property over an attribute: read when asked for
        """The source's."""
        return self.source.license

    @property
    def fingerprint(self) -> str:
        """The source's where no image is left out, another where some are."""
        fingerprint, left = self.source.fingerprint, self._train[0].indices
        if not self.skipped:
            return fingerprint
        return hashlib.sha256(fingerprint.encode() + np.asarray(left, np.int64).tobytes()).hexdigest()

    @cached_property
    def _train(self) -> tuple[Chosen, list[str]]:
        return self._without_bad(self.source.train(), "training images", self.source.fingerprint)

    @cached_property
    def _test(self) -> LabelledImages:
        images = self.source.test()
        return self._without_bad(images, "test images", fingerprint_of_tests(self.source, images))[0]

    @property
    def skipped(self) -> list[str]:
        """What is wrong with each training image that is left out."""
        return self._train[1]

    def train(self) -> LabelledImages:
        """Return the training images that can be read."""
        return self._train[0]

    def test(self) -> LabelledImages:
        """Return the test images that can be read."""
        return self._test

    def stored_bytes(self) -> np.ndarray:
        """Return how many bytes each training image that can be read takes."""
        stored: np.ndarray = np.asarray(self.source.stored_bytes())[self._train[0].indices]
        return stored

    def _without_bad(self, images: LabelledImages, what: str, fingerprint: str) -> tuple[Chosen, list[str]]:
        bad, file = find_bad(images, fingerprint, self.cache, self.num_workers)
        if bad:
            sentence = f"{len(bad)} of {len(images)} {what} cannot be read and are left out; {str(file)!r} lists them."
            warnings.warn(sentence, InputWarning, stacklevel=2)
        good = torch.ones(len(images), dtype=torch.bool)
        good[list(bad)] = False
        return Chosen(images, good.nonzero().flatten()), list(bad.values())
