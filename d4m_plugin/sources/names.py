"""What a class is called: what the prompt says decides the picture."""

import gzip
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

# WordNet's noun synsets that ImageNet uses, as "id, tab, synonyms". The first 1,000 are ImageNet-1K's in the order
# of its labels, called as torchvision calls them: "crane bird" (134) and "crane" (517). WordNet 3.0, Princeton
# University (its licence permits copies; see LICENSE).
TABLE = Path(__file__).parent / "wordnet.tsv.gz"
WORDNET_ID = re.compile(r"n\d{8}")

Synonyms = Literal["first", "all"]


@cache
def wordnet() -> dict[str, str]:
    """Return the synonyms, joined by commas, of each WordNet id, ImageNet-1K's first."""
    lines = gzip.decompress(TABLE.read_bytes()).decode().splitlines()
    return dict(line.split("\t") for line in lines)


def readable(folder: str, synonyms: Synonyms = "first") -> str:
    """Return what a class folder's name says: words for a WordNet id, spaces for underscores.

    Args:
        folder: such as `n02012849`, `hen_house` or `cat`.
        synonyms: of a WordNet id, `first` ("goldfish") or `all` ("goldfish, Carassius auratus").
    """
    if WORDNET_ID.fullmatch(folder) and folder in wordnet():
        words = wordnet()[folder]
        return words if synonyms == "all" else words.split(", ")[0]
    return folder.replace("_", " ").strip()


def imagenet_ids() -> Sequence[str]:
    """Return the WordNet ids of ImageNet-1K in the order of its labels."""
    return list(wordnet())[:1000]
