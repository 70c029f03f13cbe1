"""A group norm's moments, their combination over ranks, and its application, with SiLU or alone: one launch each.

Maps stay in their memory format, channels last or first.

Shapes: B batch, C channels, h rows of this rank, W columns, G groups, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from otil_xdit.method.kernels.rows import place_in_map
from otil_xdit.method.memory_format import is_channels_last


@triton.jit
def _place(index, group, pixels, C: tl.constexpr, PER: tl.constexpr, LAST: tl.constexpr):
    """Return where a group's numbers lie in an image."""
    if LAST:
        return (index // PER) * C + group * PER + index % PER
    return group * PER * pixels + index


@triton.jit
def _group_moments(
    x, mean, var, pixels, C: tl.constexpr, G: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One group of one image, in two passes: squares of half precision's numbers would lose what is between them."""
    image, group = tl.program_id(0), tl.program_id(1)
    PER: tl.constexpr = C // G
    base = x + image.to(tl.int64) * C * pixels
    count = PER * pixels
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + lane
        at = base + _place(index, group, pixels, C, PER, LAST)
        total += tl.load(at, mask=index < count, other=0.0).to(tl.float32)
    middle = tl.sum(total, 0) / count
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + lane
        at = base + _place(index, group, pixels, C, PER, LAST)
        off = tl.load(at, mask=index < count, other=0.0).to(tl.float32) - middle
        total += tl.where(index < count, off * off, 0.0)
    tl.store(mean + image * G + group, middle)
    tl.store(var + image * G + group, tl.sum(total, 0) / count)


@triton.jit
def _normalised(x, mean, var, weight, bias, inside, eps, AFFINE: tl.constexpr):
    """Return numbers normalised, float32; arguments point at each number's own."""
    numbers = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    numbers = (numbers - tl.load(mean, mask=inside, other=0.0)) * (
        1.0 / tl.sqrt(tl.load(var, mask=inside, other=1.0) + eps)
    )
    if AFFINE:
        factor = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        numbers = numbers * factor + tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def _normalise(
    x, mean, var, weight, bias, out, count, pixels, eps,
    C: tl.constexpr, G: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a map, in the order of its memory; weight and bias: [C] of any image."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    image = index // (C * pixels)
    channel = index % C if LAST else (index // pixels) % C
    group = image * G + channel // (C // G)
    numbers = _normalised(x + index, mean + group, var + group, weight + channel, bias + channel, inside, eps, AFFINE)
    tl.store(out + index, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate_into(
    x, mean, var, weight, bias, out, count, channels, height, width, eps,
    image_step, channel_step, row_step, column_step, out_image, out_channel, out_row, out_column,
    G: tl.constexpr, PER: tl.constexpr, LAST: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a map, in the order of its memory, normalised, rounded as a norm's output is, and given to SiLU."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    image, channel, row, column = place_in_map(index, channels, height, width, LAST)
    at = image * image_step + channel * channel_step + row * row_step + column * column_step
    group = image * G + channel // PER
    numbers = _normalised(x + at, mean + group, var + group, weight + channel, bias + channel, inside, eps, AFFINE)
    numbers = numbers.to(out.dtype.element_ty).to(tl.float32)
    numbers = numbers / (1.0 + tl.exp(-numbers))
    at = image * out_image + channel * out_channel + row * out_row + column * out_column
    tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_moments(
    received, share, came, mean, var, other, size, R: tl.constexpr, CAME: tl.constexpr, BLOCK: tl.constexpr
):
    """received: float32 [R, 2, B, G]; share: [R]; came: [2, B, G], what `other` sent; mean, var: [B, G]."""
    at = tl.arange(0, BLOCK)
    inside = at < size
    if CAME:
        place = received + other * 2 * size + at
        tl.store(place, tl.load(came + at, mask=inside), mask=inside)
        tl.store(place + size, tl.load(came + size + at, mask=inside), mask=inside)
        tl.debug_barrier()
    middle = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(R):
        middle += tl.load(share + rank) * tl.load(received + rank * 2 * size + at, mask=inside, other=0.0)
    spread = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(R):
        off = tl.load(received + rank * 2 * size + at, mask=inside, other=0.0) - middle
        within = tl.load(received + (rank * 2 + 1) * size + at, mask=inside, other=0.0)
        spread += tl.load(share + rank) * (within + off * off)
    tl.store(mean + at, middle, mask=inside)
    tl.store(var + at, spread, mask=inside)


def launch_group_moments(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of each group of a map, [B, C, h, W], or of tokens, [B, C, S]; float32 [B, G]."""
    batch, channels = x.shape[:2]
    mean, var = (torch.empty(batch, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    x = x if is_channels_last(x) else x.contiguous()
    _group_moments[(batch, groups)](
        x, mean, var, x.shape[2:].numel(), C=channels, G=groups, LAST=is_channels_last(x), BLOCK=4096, num_warps=8
    )
    return mean, var


group_moments = torch.library.custom_op("otil_xdit::group_moments", launch_group_moments, mutates_args=())
"""`launch_group_moments`, as an operator of torch."""


@group_moments.register_fake
def _(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(len(x), groups, dtype=torch.float32), x.new_empty(len(x), groups, dtype=torch.float32)


def launch_normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return a map normalised by moments that are known.

    Args:
        x: [B, C, rows, W], or tokens, [B, C, S].
        mean, var: float32 [B, G].
        weight, bias: [C]; both or neither.
        eps: added to the variance.
    """
    x = x if is_channels_last(x) else x.contiguous()
    out = torch.empty_like(x)
    affine = (x, x) if weight is None or bias is None else (weight, bias)
    _normalise[(triton.cdiv(x.numel(), 1024),)](
        x, mean, var, *affine, out, x.numel(), x.shape[2:].numel(), eps,
        C=x.shape[1], G=mean.shape[1], LAST=is_channels_last(x), AFFINE=weight is not None, BLOCK=1024,
    )  # fmt: skip
    return out


normalise = torch.library.custom_op("otil_xdit::normalise", launch_normalise, mutates_args=())
"""`launch_normalise`, as an operator of torch."""


@normalise.register_fake
def _(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return torch.empty_like(x if is_channels_last(x) else x.contiguous())


def launch_activate_into(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Write SiLU of a map normalised by moments that are known.

    Args:
        x, mean, var, weight, bias, eps: as for `launch_normalise`.
        out: becomes it, of any strides, [B, C, rows, W].
    """
    batch, channels, height, width = x.shape
    affine = (x, x) if weight is None or bias is None else (weight, bias)
    _activate_into[(triton.cdiv(x.numel(), 512),)](
        x, mean, var, *affine, out, x.numel(), channels, height, width, eps, *x.stride(), *out.stride(),
        G=mean.shape[1], PER=channels // mean.shape[1], LAST=x.stride(1) == 1, AFFINE=weight is not None, BLOCK=512,
    )  # fmt: skip


activate_into = torch.library.custom_op("otil_xdit::activate_into", launch_activate_into, mutates_args=("out",))
"""`launch_activate_into`, as an operator of torch."""


@activate_into.register_fake
def _(*args: object) -> None:
    """Nothing is returned."""


def launch_combine_moments(
    received: torch.Tensor, share: torch.Tensor, came: torch.Tensor | None = None, other: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the moments of whole maps, float32 [B, G], from everybody's.

    Args:
        received: means and variances of each rank's rows, float32 [R, 2, B, G].
        share: of the rows, float32 [R].
        came: what the rank `other` sent, [2, B, G], which `received` takes in first; None where it has.
    """
    mean, var = torch.empty_like(received[0, 0]), torch.empty_like(received[0, 0])
    size = mean.numel()
    _combine_moments[(1,)](
        received, share, received if came is None else came, mean, var, other, size,
        R=len(received), CAME=came is not None, BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return mean, var


combine_moments = torch.library.custom_op(
    "otil_xdit::combine_moments", launch_combine_moments, mutates_args=("received",)
)
"""`launch_combine_moments`, as an operator of torch."""


@combine_moments.register_fake
def _(
    received: torch.Tensor, share: torch.Tensor, came: torch.Tensor | None = None, other: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(received[0, 0]), torch.empty_like(received[0, 0])
