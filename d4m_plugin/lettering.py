"""Fonts for class names in any script, of those that are installed."""

from functools import cache
from typing import Any

OWN_FONT = "DejaVu Sans"  # which comes with matplotlib
PREFERRED = "Noto Sans"  # of which there is one for nearly every script
NO_LETTERS = "Last Resort"  # fonts that show a box for every letter


@cache
def font_for(text: str) -> Any:
    """Return an installed font that has all letters of a text, as matplotlib lists it; None where none has."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(
        (font for font in fontManager.ttflist if not font.name.startswith(NO_LETTERS)),
        key=lambda font: (
            font.name != OWN_FONT,
            not font.name.startswith(PREFERRED),
            font.style != "normal",
            font.weight not in (400, "normal"),
            font.name,
            font.fname,
        ),
    )
    return next((font for font in fonts if set(map(ord, text)) <= _letters(font.fname)), None)


@cache
def _letters(file: str) -> frozenset[int]:
    """Return the code points that a font has; none of one that cannot be drawn at any size, such as coloured ones."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
