"""Captioned toy scenes: sample a scene, caption it, parse a caption back, draw it, and read an image analytically.

The reader has no learned parts: it segments by hue, fits ideal shape masks by intersection over union (IoU) and
compares the place. All images are RGB uint8 arrays of shape (SIDE, SIDE, 3).
"""

from __future__ import annotations

import argparse
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128
COLOURS = {
    "red": (222, 42, 42),
    "green": (38, 178, 62),
    "blue": (42, 72, 226),
    "yellow": (238, 214, 40),
    "purple": (170, 44, 206),
    "cyan": (40, 206, 222),
}
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 15.0, "large": 26.0}  # half the width, in pixels of a SIDE x SIDE image
PLACES = {
    "in the center": (0.5, 0.5),
    "on the left": (0.28, 0.5),
    "on the right": (0.72, 0.5),
    "at the top": (0.5, 0.28),
    "at the bottom": (0.5, 0.72),
}
OPPOSITE = (("on the left", "on the right"), ("at the top", "at the bottom"))
BACKGROUNDS = ("striped", "checkered", "dotted", "smooth")
RING_HOLE = 0.5  # inner over outer radius
MIN_IOU, MAX_OFFSET, MAX_STRAY = 0.7, 18.0, 250  # what the reader accepts: fit, pixels off the place, stray pixels


@dataclass(frozen=True)
class Thing:
    """One shape, all of it named in the caption."""

    shape: str
    colour: str
    size: str
    place: str

    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """One or two shapes of different colours on a textured background."""

    things: tuple[Thing, ...]
    background: str

    def caption(self) -> str:
        return " and ".join(thing.words() for thing in self.things) + f", {self.background} background"


def _one_of(words: object) -> str:
    return "(" + "|".join(words) + ")"


THING_PATTERN = re.compile(f"a {_one_of(SIZES)} {_one_of(COLOURS)} {_one_of(SHAPES)} {_one_of(PLACES)}")
CAPTION_PATTERN = re.compile(f"(.+), {_one_of(BACKGROUNDS)} background")


def parse(caption: str) -> Scene:
    """The scene a caption names; ValueError for any other text."""
    whole = CAPTION_PATTERN.fullmatch(caption)
    parts = [THING_PATTERN.fullmatch(part) for part in whole[1].split(" and ")] if whole else []
    if not whole or not all(parts):
        raise ValueError(f"not a scene caption: {caption!r}")
    things = tuple(Thing(size=m[1], colour=m[2], shape=m[3], place=m[4]) for m in parts if m)
    return Scene(things, whole[2])


def vocabulary() -> list[str]:
    """Every word and mark that a caption can hold, sorted."""
    words = itertools.chain(SIZES, COLOURS, SHAPES, *(place.split() for place in PLACES), BACKGROUNDS)
    return sorted({*words, "a", "and", "background", ","})


def sample(rng: np.random.Generator, things: int | None = None) -> Scene:
    """A random scene of one or two shapes (either, evenly, when `things` is None)."""
    number = things or int(rng.integers(1, 3))
    if number == 1:
        places = [str(rng.choice(list(PLACES)))]
    else:
        places = [str(place) for place in rng.permutation(OPPOSITE[rng.integers(len(OPPOSITE))])]
    colours = rng.choice(list(COLOURS), size=number, replace=False)
    shapes, sizes = rng.choice(SHAPES, size=number), rng.choice(list(SIZES), size=number)
    rows = zip(shapes, colours, sizes, places, strict=True)
    return Scene(tuple(Thing(*map(str, row)) for row in rows), str(rng.choice(BACKGROUNDS)))


# ---- drawing -------------------------------------------------------------------------------------------------------


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a shape of unit half width is, at coordinates x and y (any broadcastable shapes), as booleans."""
    radius, inside = np.hypot(x, y), (np.abs(x) <= 1) & (np.abs(y) <= 1)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= RING_HOLE)
    if shape == "triangle":
        return inside & (2 * np.abs(x) <= y + 1)
    return inside


def _grid(scale: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(SIDE * scale) + 0.5) / scale
    return axis[None, :], axis[:, None]


def draw_background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A muted texture, float (SIDE, SIDE, 3) in 0..255: two near greys, pattern, slow shading, grain."""
    x, y = _grid(1)
    period, phase_x, phase_y = rng.uniform(14, 18), rng.uniform(0, 16), rng.uniform(0, 16)
    column, row = np.sin(2 * np.pi * (x + phase_x) / period), np.sin(2 * np.pi * (y + phase_y) / period)
    pattern = {
        "striped": np.sin(2 * np.pi * (x + y + phase_x) / (period * 1.2)) * 4,
        "checkered": column * row * 8,
        "dotted": (column + row - 1.0) * 4,
        "smooth": np.zeros((SIDE, SIDE)) - 1,
    }[kind]
    blend = np.clip(pattern * 0.5 + 0.5, 0, 1)[..., None]
    base = rng.uniform(95, 165) + rng.uniform(-8, 8, 3)
    far = base + rng.choice([-1, 1]) * rng.uniform(28, 40)
    slope = rng.uniform(-14, 14, 2)
    shade = (slope[0] * (x / SIDE - 0.5) + slope[1] * (y / SIDE - 0.5))[..., None]
    return base * (1 - blend) + far * blend + shade + rng.normal(0, 2.5, (SIDE, SIDE, 1))


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as an image: shapes a little off their place and size, shaded, edges smoothed by 2x2 samples."""
    image = draw_background(scene.background, rng)
    for thing in scene.things:
        centre = np.array(PLACES[thing.place]) * SIDE + rng.uniform(-4, 4, 2)
        half = SIZES[thing.size] * rng.uniform(0.93, 1.07)
        x, y = _grid(2)
        mask = shape_mask(thing.shape, (x - centre[0]) / half, (y - centre[1]) / half)
        cover = mask.reshape(SIDE, 2, SIDE, 2).mean((1, 3))[..., None]
        x, y = _grid(1)
        light = 1 - 0.12 * np.clip((x - centre[0] + y - centre[1]) / half, -1, 1)[..., None]
        image = image * (1 - cover) + np.array(COLOURS[thing.colour]) * light * cover
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def draw_many(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` images (count, SIDE, SIDE, 3) and their captions."""
    rng = np.random.default_rng(seed)
    scenes = [sample(rng) for _ in range(count)]
    return np.stack([draw(scene, rng) for scene in scenes]), [scene.caption() for scene in scenes]


# ---- reading -------------------------------------------------------------------------------------------------------


def colour_masks(image: np.ndarray) -> dict[str, np.ndarray]:
    """For each colour the pixels (booleans, SIDE x SIDE) of about that hue and clear saturation, specks removed."""
    values = image.astype(np.float32)
    chroma = values - values.mean(-1, keepdims=True)
    strength = values.max(-1) - values.min(-1)
    palette = np.array(list(COLOURS.values()), np.float32)
    palette -= palette.mean(-1, keepdims=True)
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    nearest = (chroma @ palette.T).argmax(-1)
    masks = [Image.fromarray(((nearest == i) & (strength > 75)).astype(np.uint8) * 255) for i in range(len(COLOURS))]
    clean = [np.asarray(mask.filter(ImageFilter.MedianFilter(5))) > 0 for mask in masks]
    return dict(zip(COLOURS, clean, strict=True))


@dataclass(frozen=True)
class Seen:
    """What the reader made of one colour's pixels: the best fitting shape, its IoU, half width and centre (x, y)."""

    shape: str
    iou: float
    half: float
    centre: tuple[float, float]


def measure(mask: np.ndarray) -> Seen | None:
    """Fit every ideal shape to the box round the mask (1 % of the pixels may lie outside on each side)."""
    rows, columns = np.nonzero(mask)
    if len(rows) < 80:
        return None
    (left, right), (top, bottom) = (np.quantile(axis, [0.005, 0.995]) for axis in (columns, rows))
    centre, half = ((left + right + 1) / 2, (top + bottom + 1) / 2), np.array([right - left + 1, bottom - top + 1]) / 2
    x, y = _grid(1)
    fits = {}
    for shape in SHAPES:
        ideal = shape_mask(shape, (x - centre[0]) / half[0], (y - centre[1]) / half[1])
        fits[shape] = float((ideal & mask).sum() / (ideal | mask).sum())
    best = max(fits, key=lambda shape: fits[shape])
    return Seen(best, fits[best], float(half.mean()), (float(centre[0]), float(centre[1])))


def judge(thing: Thing, seen: Seen | None) -> dict[str, bool]:
    """Which of the caption's claims about one shape hold: colour (there is any), shape, place, size."""
    if seen is None:
        return dict.fromkeys(("colour", "shape", "place", "size"), False)
    offset = np.hypot(*(seen.centre - np.array(PLACES[thing.place]) * SIDE))
    middle = sum(SIZES.values()) / 2
    return {
        "colour": True,
        "shape": seen.shape == thing.shape and seen.iou >= MIN_IOU,
        "place": bool(offset <= MAX_OFFSET),
        "size": (seen.half > middle) == (thing.size == "large"),
    }


def read(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Every claim over all named shapes, `clean` (no stray colours), and `right`: colour, shape, place and clean."""
    masks = colour_masks(image)
    verdicts = [judge(thing, measure(masks[thing.colour])) for thing in scene.things]
    result = {claim: all(verdict[claim] for verdict in verdicts) for claim in ("colour", "shape", "place", "size")}
    named = {thing.colour for thing in scene.things}
    result["clean"] = sum(int(mask.sum()) for colour, mask in masks.items() if colour not in named) <= MAX_STRAY
    result["right"] = result["colour"] and result["shape"] and result["place"] and result["clean"]
    return result


# ---- contact sheets ------------------------------------------------------------------------------------------------


def contact_sheet(images: np.ndarray, captions: list[str], columns: int = 4) -> Image.Image:
    """Images (n, height, width, 3) in rows of `columns`, each over its caption in small print."""
    count, height, width, _ = images.shape
    cell = (max(width, 200), height + 30)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * -(-count // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        corner = (i % columns * cell[0], i // columns * cell[1])
        sheet.paste(Image.fromarray(image), corner)
        pen.text((corner[0], corner[1] + height), caption.replace(" and ", "\nand "), fill="black", font_size=9)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Draw a contact sheet of random scenes and test the reader on many."
    )
    parser.add_argument("--out", type=Path, default=Path("/tmp/scenes.png"))
    parser.add_argument("--count", type=int, default=1000, help="scenes to draw and read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, captions = draw_many(args.count, args.seed)
    contact_sheet(images[:16], captions[:16]).save(args.out)
    results = [read(image, parse(caption)) for image, caption in zip(images, captions, strict=True)]
    print({claim: float(np.mean([result[claim] for result in results])) for claim in results[0]})


if __name__ == "__main__":
    main()
