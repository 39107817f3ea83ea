"""What a class is called: what the prompt says decides the picture."""

import gzip
import re
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
    words = wordnet().get(name, name) if WORDNET_ID.fullmatch(name) else name
    if synonyms == "first" and ", " in words and words in _all_synonyms():
        return words.split(", ")[0]
    return words.replace("_", " ").strip()


def imagenet_ids() -> Sequence[str]:
    """Return the WordNet ids of ImageNet-1K in the order of its labels."""
    return list(wordnet())[:1000]
