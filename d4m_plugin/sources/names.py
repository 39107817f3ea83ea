"""What a class is called: what the prompt says decides the picture."""

import gzip
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

# WordNet's noun synsets that ImageNet uses, as "id, tab, synonyms". The first 1,000 are ImageNet-1K's in the order
# of its labels, called as torchvision calls them: "crane bird" (134) and "crane" (517). WordNet 3.0, Princeton
# University (its licence permits copies: wordnet-license.txt).
TABLE = Path(__file__).parent / "wordnet.tsv.gz"
WORDNET_ID = re.compile(r"n\d{8}")

Synonyms = Literal["first", "all"]


@cache
def wordnet() -> dict[str, str]:
    """Return the synonyms, joined by commas, of each WordNet id, ImageNet-1K's first."""
    lines = gzip.decompress(TABLE.read_bytes()).decode().splitlines()
    return dict(line.split("\t") for line in lines)


@cache
def _all_synonyms() -> frozenset[str]:
    return frozenset(wordnet().values())


def readable(name: str, synonyms: Synonyms = "first") -> str:
    """Return what a dataset's name of a class says: words for a WordNet id, spaces for underscores.

    Args:
        name: such as `n02012849`, `hen_house`, `cat`, or WordNet's own `goldfish, Carassius auratus`.
        synonyms: of WordNet's, the `first` ("goldfish") or `all` ("goldfish, Carassius auratus").
    """
    name = unicodedata.normalize("NFC", name)  # as all but old file systems of macOS write it
    words = wordnet().get(name, name) if WORDNET_ID.fullmatch(name) else name
    if synonyms == "first" and ", " in words and words in _all_synonyms():
        return words.split(", ")[0]
    return words.replace("_", " ").strip()


def imagenet_ids() -> Sequence[str]:
    """Return the WordNet ids of ImageNet-1K in the order of its labels."""
    return list(wordnet())[:1000]


def match_classes(wanted: Sequence[str], known: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return where each wanted class stands among the known ones, and the wanted ones that do not, or not for sure.

    A class is known by its very name; else by any of its synonyms, its WordNet id, or another spelling (case,
    underscores, hyphens), where just one class is known by that. The second of two classes of one name is the second
    that is known by it.
    """
    if _is_imagenet(known):
        known = imagenet_ids()  # some libraries call both 134 and 517 "crane"
    places: dict[str, list[int]] = {}
    loosely: dict[str, set[int]] = {}
    for place, name in enumerate(known):
        places.setdefault(readable(name), []).append(place)
        for spelling in _spellings(name):
            loosely.setdefault(spelling, set()).add(place)
    found = [places[name].pop(0) if places.get(name) else None for name in map(readable, wanted)]
    taken = set(found)
    for label, name in enumerate(wanted):
        if found[label] is None:
            candidates = set().union(*(loosely.get(spelling, ()) for spelling in _spellings(name))) - taken
            if len(candidates) == 1:
                found[label] = candidates.pop()
    wanted_times = Counter(found)
    found = [place if wanted_times[place] == 1 else None for place in found]  # nothing is two classes
    missing = [name for name, place in zip(wanted, found, strict=True) if place is None]
    return [place for place in found if place is not None], missing


def _is_imagenet(names: Sequence[str]) -> bool:
    """Whether names are ImageNet-1K's in the order of its labels, by whatever synonyms."""
    ids = imagenet_ids()
    agree = sum(not _spellings(name).isdisjoint(_spellings(each)) for name, each in zip(names, ids, strict=False))
    return len(names) == len(ids) and agree >= 0.95 * len(ids)


def _spellings(name: str) -> set[str]:
    """Return what a class may be called too, in lower case with single spaces."""
    name = unicodedata.normalize("NFC", name)
    texts = [name, *name.split(", ")]
    if WORDNET_ID.fullmatch(name):
        texts += wordnet().get(name, "").split(", ")
    return {" ".join(re.split(r"[\s_-]+", text.casefold().strip(" _-"))) for text in texts} - {""}
