"""Captioned toy clips: one shape that moves over a textured background; what the tiny video model learns to draw.

A clip is uint8 (FRAMES, SIDE, SIDE, 3). Colours, shapes and backgrounds are those of scenes.py, at half its size.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scenes
from scenes import BACKGROUNDS, COLOURS, SHAPES, contact_sheet, draw_background, shape_mask

SIDE, FRAMES = 64, 9
SIZES = {"small": 8.0, "large": 13.0}  # half the width, in pixels
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
REACH = 0.22  # from the middle to either end of the way, in sides


@dataclass(frozen=True)
class Motion:
    """One shape and where it goes; all of it is in the caption."""

    shape: str
    colour: str
    size: str
    direction: str
    background: str

    def caption(self) -> str:
        shape = f"a {self.size} {self.colour} {self.shape}"
        return f"{shape} moving {self.direction}, {self.background} background"


def vocabulary() -> list[str]:
    """Every word and mark that a caption can hold, sorted."""
    return sorted({*SIZES, *COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS, "a", "moving", "background", ","})


def sample(rng: np.random.Generator) -> Motion:
    """A random clip's description."""
    return Motion(*(str(rng.choice(list(names))) for names in (SHAPES, COLOURS, SIZES, DIRECTIONS, BACKGROUNDS)))


def _halved(values: np.ndarray) -> np.ndarray:
    """Means over 2 x 2, (2 n, 2 n, ...) to (n, n, ...)."""
    side = len(values) // 2
    return values.reshape(side, 2, side, 2, *values.shape[2:]).mean((1, 3))


def draw(motion: Motion, rng: np.random.Generator) -> np.ndarray:
    """The clip: the shape at even steps along its way, a little off it, over a background that stands still."""
    background = _halved(draw_background(motion.background, rng))
    half = SIZES[motion.size] * rng.uniform(0.93, 1.07)
    way = np.array(DIRECTIONS[motion.direction]) * REACH * SIDE * rng.uniform(0.9, 1.1)
    middle = SIDE / 2 + rng.uniform(-2, 2, 2)
    fine = (np.arange(2 * SIDE) + 0.5) / 2
    frames = []
    for time in np.linspace(-1, 1, FRAMES):
        centre = middle + time * way
        x, y = (fine[None, :] - centre[0]) / half, (fine[:, None] - centre[1]) / half
        cover = _halved(shape_mask(motion.shape, x, y).astype(float))[..., None]
        light = _halved(1 - 0.12 * np.clip(x + y, -1, 1))[..., None]
        frames.append(background * (1 - cover) + np.array(COLOURS[motion.colour]) * light * cover)
    return np.clip(np.stack(frames) + 0.5, 0, 255).astype(np.uint8)


def draw_many(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` clips (count, FRAMES, SIDE, SIDE, 3) and their captions."""
    rng = np.random.default_rng(seed)
    motions = [sample(rng) for _ in range(count)]
    return np.stack([draw(motion, rng) for motion in motions]), [motion.caption() for motion in motions]


# ---- reading -------------------------------------------------------------------------------------------------------


def centre_of(frame: np.ndarray, colour: str) -> np.ndarray | None:
    """Where the pixels of a colour are in a frame, (x, y); None where there are hardly any."""
    mask = scenes.colour_masks(frame)[colour]
    rows, columns = np.nonzero(mask)
    return None if len(rows) < 20 else np.array([columns.mean(), rows.mean()])


def moves_as_said(clip: np.ndarray, motion: Motion) -> bool:
    """Whether something of the named colour goes the named way, at least half as far as it should and no other."""
    first, last = (centre_of(clip[at], motion.colour) for at in (0, -1))
    if first is None or last is None:
        return False
    moved = (last - first) / (2 * REACH * SIDE)
    direction = np.array(DIRECTIONS[motion.direction])
    along = float(moved @ direction)
    return along > 0.5 and float(np.abs(moved - along * direction).max()) < 0.3


def has_the_shape(clip: np.ndarray, motion: Motion) -> bool:
    """Whether what has the named colour in the middle frame is of the named shape."""
    frame = clip[len(clip) // 2].repeat(2, 0).repeat(2, 1)  # scenes.py reads pictures of its own size
    seen = scenes.measure(scenes.colour_masks(frame)[motion.colour])
    return scenes.judge(scenes.Thing(motion.shape, motion.colour, motion.size, "in the center"), seen)["shape"]


def read(clip: np.ndarray, motion: Motion) -> dict[str, bool]:
    """Return what a clip has of its caption: colour, shape and motion, and `right`, which is all of them."""
    middle = centre_of(clip[len(clip) // 2], motion.colour)
    claims = {
        "colour": middle is not None,
        "shape": has_the_shape(clip, motion),
        "motion": moves_as_said(clip, motion),
    }
    return {"right": all(claims.values()), **claims}


def strip(clip: np.ndarray) -> np.ndarray:
    """The frames of a clip side by side, (SIDE, FRAMES * SIDE, 3)."""
    return np.concatenate(list(clip), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Draw a contact sheet of random clips and test the reader on many."
    )
    parser.add_argument("--out", type=Path, default=Path("/tmp/clips.png"))
    parser.add_argument("--count", type=int, default=200, help="clips to draw and read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    motions = [sample(rng) for _ in range(args.count)]
    clips = [draw(motion, rng) for motion in motions]
    shown = np.stack([strip(clip) for clip in clips[:12]])
    contact_sheet(shown, [motion.caption() for motion in motions[:12]], columns=1).save(args.out)
    results = [read(clip, motion) for clip, motion in zip(clips, motions, strict=True)]
    print({claim: float(np.mean([result[claim] for result in results])) for claim in results[0]})


if __name__ == "__main__":
    main()
