"""How close an image is to one process's: PSNR, SSIM, and how visible the borders of the patches are.

Images are float32 [3, H, W] in 0..1, clips [F, 3, H, W], whose figures are means over their frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

IDENTICAL = 200.0
"""PSNR in dB that stands for images without any difference; no two float32 images that differ come near it: one
value of 128 x 128 x 3 that is off by one rounding gives about 190."""

BAND = 4
"""Rows on either side of a border that tell how steep the image is there."""

FLOOR = 1 / 2550
"""Added to gradients, a tenth of a level of 8 bits, so that a flat image has no seam instead of noise over noise."""


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, at most `IDENTICAL`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if image.ndim == 4:
        return fmean(psnr(*pair) for pair in zip(image, reference, strict=True))
    return min(peak_signal_noise_ratio(image, reference, data_range=1.0).item(), IDENTICAL)


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the structural similarity (Wang et al., 2004), 1 for the same image."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    frames, best = (images if images.ndim == 4 else images[None] for images in (image, reference))
    value = structural_similarity_index_measure(frames, best, data_range=1.0)
    assert isinstance(value, torch.Tensor), "only asked for the mean"
    return value.item()


def flicker(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Return how far the changes from frame to frame are from the reference's, root mean square, in levels of 8 bits.

    An error that stands still in a clip does not count; one that comes and goes counts for more than it does in
    `psnr`: of independent errors in all frames, sqrt(2) times their size.
    """
    error = clip - reference
    return 255 * (error[1:] - error[:-1]).square().mean().sqrt().item()


def seam(image: torch.Tensor, reference: torch.Tensor, borders: Sequence[int]) -> float:
    """Return how much steeper the image is across the patches' borders than beside them, against the reference.

    Args:
        image, reference: see above.
        borders: first row of every patch but the first one's; at least one.

    Returns:
        `steepness` of the image over that of the reference; 1.00 is no more of a seam than one process makes.
    """
    return steepness(image, borders) / steepness(reference, borders)


def steepness(image: torch.Tensor, borders: Sequence[int]) -> float:
    """Return the mean absolute vertical gradient across the borders over that beside them.

    Beside a border are the `BAND` row pairs on either side. Those that cross another border count for neither.
    """
    assert borders, "one patch has no border"
    # gradient[r] lies between the rows r and r + 1, so that across a border b is gradient[b - 1].
    gradient = (image[:, 1:] - image[:, :-1]).abs().mean(dim=(0, 2))
    across = {border - 1 for border in borders}
    beside = {row + step for row in across for step in range(-BAND, BAND + 1)} & set(range(len(gradient))) - across
    mean_across, mean_beside = (gradient[sorted(rows)].mean().item() for rows in (across, beside))
    return (mean_across + FLOOR) / (mean_beside + FLOOR)
