"""Colours of the page and of its figures: one per arm, used everywhere, in a light and a dark version.

The hues are those of Okabe and Ito (2008), which people with the common colour-vision deficiencies can tell apart;
every arm has a marker of its own too. Figures are drawn in the light colours, which then become CSS variables.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple


class Colour(NamedTuple):
    """Hexadecimal, lower case; the light ones all differ, because they stand for the variable in a figure."""

    light: str
    dark: str


COLOURS = {
    "learned": Colour("#0072b2", "#5ab4ee"),
    "offset": Colour("#d55e00", "#f08a3c"),
    "synchronous": Colour("#009e73", "#2fc79a"),
    "autoguidance": Colour("#b0548c", "#e39ac6"),
    "weak": Colour("#80868f", "#9aa1ab"),
    "ink": Colour("#1c2127", "#e6e9ed"),
    "muted": Colour("#5b6570", "#a3acb7"),
    "rule": Colour("#dfe3e8", "#333a43"),
    "paper": Colour("#fdfdfc", "#15181c"),
}
MARKERS = {"learned": "o", "offset": "s", "synchronous": "^", "autoguidance": "D", "weak": "v"}
TITLES = {
    "learned": "learned schedule",
    "offset": "SFD offset",
    "synchronous": "synchronous",
    "autoguidance": "learned + AutoGuidance",
    "weak": "weak model",
}
"""Arms in the order of display; a run's own titles win."""


def ink(arm: str) -> str:
    """The light colour of an arm, for drawing."""
    return COLOURS.get(arm, COLOURS["weak"]).light


def variable(arm: str) -> str:
    """The CSS colour of an arm."""
    return f"var(--{arm if arm in COLOURS else 'weak'})"


def with_variables(svg: str) -> str:
    """Replace every light colour of a drawing by its variable."""
    for name, colour in COLOURS.items():
        svg = svg.replace(colour.light, f"var(--{name})")
    return svg


def stylesheet() -> str:
    """The colours of both themes, then the rules of page.css; paper is always light."""
    light = "".join(f"--{name}:{colour.light};" for name, colour in COLOURS.items())
    dark = "".join(f"--{name}:{colour.dark};" for name, colour in COLOURS.items())
    rules = files("lwd.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}"
    )
