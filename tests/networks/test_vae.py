"""A VAE on patches gives what it gives on one device: real ranks, every kind of cut, and a control."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

from otil_xdit.comm.collectives import Collectives
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.dryrun.vae_memory import PUBLISHED_VAES, peak_of_decoding
from otil_xdit.exchange.synchronous import SynchronousExchange
from otil_xdit.networks.unet import group_norm
from otil_xdit.networks.vae.coder import PatchedCoder
from otil_xdit.networks.vae.support import coder_class, why_whole
from otil_xdit.runtime import vae_sharing
from tests.support.fake_cuda.guard import why_no_guard
from tests.support.ranks import run_ranks

BOUND = 1e-5
"""Of the largest difference, against results of unit scale."""

SIZES = [(8, 6), (9, 5), (7, 4)]
"""Of a latent: rows that two and three ranks share evenly and unevenly."""


def build(kind: Any = AutoencoderKL) -> Any:
    """A VAE of three resolutions, with attention in the middle, as SD's is built."""
    torch.manual_seed(0)
    return (
        kind(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
        .eval()
        .requires_grad_(False)
    )


@cache
def whole_results(vae_kind: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The latent of a random image, and the image of a random latent, of every size, on one device."""
    vae = build(vae_kind)
    return [(vae.encoder(image(size)), vae.decoder(latent(size))) for size in SIZES]


def latent(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))


def image(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, size[0] * 4, size[1] * 4, generator=torch.Generator().manual_seed(2))


class Deaf(SynchronousExchange):
    """Hears zeros of the others; the results are put together all the same."""

    def halo(self, name: str, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, above, below))


@torch.no_grad()
def errors(kind: type[SynchronousExchange], vae_kind: Any = AutoencoderKL) -> list[tuple[float, float]]:
    """Largest difference of encoder and decoder from one device's, for every size; and how the layers are left."""
    vae = build(vae_kind)
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    exchange = kind(Collectives(group, 20), "vae")
    coders = [PatchedCoder(coder, exchange, lambda: True) for coder in (vae.encoder, vae.decoder)]
    for coder in coders:
        coder.prepare()
        coder.prepare()
    assert why_whole(vae) is None, "wrapping it does not make it unknown"
    found = []
    for size, (encoded, decoded) in zip(SIZES, whole_results(vae_kind), strict=True):
        pairs = (vae.encoder(image(size)), encoded), (vae.decoder(latent(size)), decoded)
        found.append(tuple(((made - best).abs().max() / best.std()).item() for made, best in pairs))
    for coder in coders:
        coder.release()
    assert not any("_otil" in name for module in vae.modules() for name in vars(type(module)))
    return found


VIDEO_SIZES = [(1, 6, 4), (3, 5, 4)]
"""Of a latent: frames, and rows that two and three ranks share evenly and unevenly."""

LONG = [(7, 9, 3)]
"""The same, of several pieces of time where a VAE is called with some frames after the other; 9 rows for four ranks."""

BOUNDS = {"hunyuan": 5e-5, "cogvideox": 3e-5, "ltx 2": 3e-5}
"""In place of `BOUND`, where float32 itself is less sure: one device's is 1.9e-5, 1.2e-5 and 5e-6 from its float64."""

REDUCTIONS = {
    "wan": (4, 2),
    "wan 2.2": (8, 2),
    "qwen-image": (4, 2),
    "hunyuan": (8, 4),
    "hunyuan 1.5": (4, 2),
    "ltx": (16, 4),
    "ltx 0.9.5": (16, 4),
    "ltx 2": (8, 2),
    "cogvideox": (8, 4),
}
"""Of each VAE of `build_video`: rows and frames of a clip for one of its latent."""


def build_ltx(name: str) -> Any:
    """LTX's VAE of 0.9.0, which strides; of 0.9.5, which is told a time; of LTX-2, which mirrors rows at the edge."""
    count = 3 if name == "ltx" else 2
    sizes: dict[str, Any] = {"block_out_channels": (8, 16, 16)[:count], "layers_per_block": (1,) * (count + 1)}
    scaling = (True, True, False)[:count]
    sizes |= {f"decoder_{key}": value for key, value in sizes.items()} | {"latent_channels": 4}
    sizes |= {"spatio_temporal_scaling": scaling, "decoder_spatio_temporal_scaling": scaling}
    sizes |= {"decoder_inject_noise": (False,) * (count + 1), "upsample_residual": (name != "ltx",) * count}
    samplers = {"downsample_type": ("spatial", "spatiotemporal"), "upsample_factor": (2,) * count}
    if name == "ltx 2":
        kinds = {"down_block_types": ("LTX2VideoDownBlock3D",) * count, "upsample_type": ("spatial", "spatiotemporal")}
        return AutoencoderKLLTX2Video(**sizes, **samplers, **kinds, patch_size=2)
    if name == "ltx 0.9.5":
        kinds = {"down_block_types": ("LTXVideo095DownBlock3D",) * count, "timestep_conditioning": True}
        return AutoencoderKLLTXVideo(**sizes, **samplers, **kinds)
    return AutoencoderKLLTXVideo(**sizes, down_block_types=("LTXVideoDownBlock3D",) * count, upsample_factor=(1,) * 3)


def build_video(name: str) -> Any:
    """A VAE of two to four resolutions; one of Wan 2.2 works on 2 x 2 pixels, those of LTX on as many or 4 x 4."""
    torch.manual_seed(0)
    if name == "hunyuan":
        sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
        vae = AutoencoderKLHunyuanVideo(**sizes, latent_channels=4)
    elif name == "hunyuan 1.5":
        sizes = {"block_out_channels": (8, 16, 16), "layers_per_block": 1}
        reductions = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
        vae = AutoencoderKLHunyuanVideo15(**sizes, **reductions, latent_channels=4)
    elif name.startswith("ltx"):
        vae = build_ltx(name)
    elif name == "cogvideox":
        sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
        vae = AutoencoderKLCogVideoX(**sizes, latent_channels=4)
    else:
        size: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
        size["temperal_downsample"] = [False, True]
        if name == "wan 2.2":
            size |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}
        kind = AutoencoderKLQwenImage if name == "qwen-image" else AutoencoderKLWan
        vae = kind(**size, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def video_errors(
    kind: type[SynchronousExchange], name: str, sizes: Sequence[tuple[int, int, int]] = VIDEO_SIZES
) -> list[float]:
    """Largest differences of `encode` and `decode` from one device's, for every size."""
    vae, found = build_video(name), []
    group = PatchGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    exchange, is_active = kind(Collectives(group, 20), "vae"), [False]
    coders = [coder_class(vae)(coder, exchange, lambda: is_active[0]) for coder in (vae.encoder, vae.decoder)]
    for coder in coders:
        coder.prepare()
        coder.prepare()
    assert why_whole(vae) is None, "wrapping it does not make it unknown"
    draw = torch.Generator().manual_seed(1)
    scale, every = REDUCTIONS[name]
    time = {"temb": torch.tensor([0.05])} if name == "ltx 0.9.5" else {}
    for frames, rows, cols in sizes:
        latent = torch.randn(1, 4, frames, rows, cols, generator=draw)
        video = torch.randn(1, 3, 1 + every * (frames - 1), rows * scale, cols * scale, generator=draw)
        calls = partial(vae.decode, latent, **time, return_dict=False), partial(vae.encode, video)
        for call, of in zip(calls, (lambda made: made[0], lambda made: made.latent_dist.mean), strict=True):
            is_active[0] = False
            best = of(call())
            is_active[0] = True
            found.append(((of(call()) - best).abs().max() / best.std()).item())
    for coder in coders:
        coder.release()
    assert not any("_otil" in one for module in vae.modules() for one in vars(type(module)))
    return found


VIDEO_VAES = [
    *(("wan", 2), ("wan 2.2", 3), ("qwen-image", 3), ("hunyuan", 3), ("hunyuan 1.5", 2)),
    *(("ltx 2", 3), ("cogvideox", 2)),
]
MORE_VIDEO_VAES = [
    *(("wan", 3), ("wan 2.2", 2), ("qwen-image", 2), ("hunyuan", 2), ("hunyuan", 4), ("hunyuan 1.5", 3)),
    *(("ltx", 2), ("ltx", 3), ("ltx 0.9.5", 2), ("ltx 0.9.5", 3), ("ltx 2", 2), ("cogvideox", 3)),
]


@pytest.mark.parametrize(
    ("name", "ranks"), [*VIDEO_VAES, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_VIDEO_VAES)]
)
def test_a_videos_vae_on_patches_gives_what_one_device_gives(name: str, ranks: int) -> None:
    for found in run_ranks(ranks, partial(video_errors, SynchronousExchange, name)):
        assert max(found) < BOUNDS.get(name, BOUND), found


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_long_clip_on_four_ranks(name: str) -> None:
    for found in run_ranks(4, partial(video_errors, SynchronousExchange, name, LONG)):
        assert max(found) < BOUNDS.get(name, BOUND), found


@pytest.mark.parametrize(
    "name", ["wan", "hunyuan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ltx 2", "cogvideox"))]
)
def test_without_the_neighbours_rows_a_videos_would_not(name: str) -> None:
    for found in run_ranks(2, partial(video_errors, Deaf, name)):
        assert min(found) > 0.05


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [(AutoencoderKL, 2), (AutoencoderKL, 3), pytest.param(AutoencoderKLFlux2, 2, marks=pytest.mark.slow)],
)
def test_patches_give_what_one_device_gives(kind: type, ranks: int) -> None:
    for by_size in run_ranks(ranks, partial(errors, SynchronousExchange, kind)):
        for size, found in zip(SIZES, by_size, strict=True):
            assert max(found) < BOUND, (size, found)


def test_without_the_neighbours_rows_it_would_not() -> None:
    for by_size in run_ranks(2, partial(errors, Deaf)):
        assert min(min(found) for found in by_size) > 0.05


def test_moments_of_a_large_map_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 6, 5)
    at_once = group_norm.moments_of(x, 4)
    monkeypatch.setattr(group_norm, "AT_ONCE", 130)
    for whole, parts in zip(at_once, group_norm.moments_of(x, 4), strict=True):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    "name", [name if name == "SDXL" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED_VAES]
)
def test_memory_of_a_decode_falls_with_the_ranks(name: str) -> None:
    """Counted on "meta"; docs/results/memory.md has the table."""
    alone, *shared = (peak_of_decoding(PUBLISHED_VAES[name], 1024, ranks, torch.float16) for ranks in (1, 2, 4, 8))
    for ranks, peak in zip((2, 4, 8), shared, strict=True):
        assert alone / ranks < peak < 1.4 * alone / ranks


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_guard()), reason=why_no_guard())
def test_on_a_card_nothing_waits_for_the_device() -> None:
    """Traced on fake CUDA tensors; the host sends tables of the sizes, once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/workers/fake_cuda_vae.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, *shared = json.loads(done.stdout.splitlines()[-1]).values()
    for part in ("decoder", "encoder"):
        assert len({tuple(rank[part]["messages"].items()) for rank in shared}) == 1
        for rank in shared:
            assert all(what.startswith("copy from cpu at networks/unet/sharding.py") for what in rank[part]["host"])
            assert rank[part]["launches"] < 2 * alone[part]["launches"] and rank[part]["shape"] == alone[part]["shape"]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_why_a_vae_is_whole_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_sharing, "Collectives", lambda *arguments: None)  # nothing is sent
    monkeypatch.setattr(vae_sharing, "SynchronousExchange", lambda *arguments: SimpleNamespace(rank=0, ranks=2))
    vae = build_video(name)
    assert why_whole(vae) is None
    vae.enable_tiling()
    sharing = vae_sharing.VaeSharing(PatchGroup(None, 0, 2), 1.0)  # type: ignore[arg-type]
    with caplog.at_level("INFO", "otil_xdit"):
        facts = [sharing.begin(vae, lambda: True) for _ in range(2)]
    assert facts[0] == facts[1] and "whole: it works in tiles" in str(facts[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"every rank computes all of the VAE ({type(vae).__name__}): it works in tiles"
    ]


def test_another_vae_is_whole_and_what_could_be_shared_is_named() -> None:
    reason = why_whole(AutoencoderKLMochi.__new__(AutoencoderKLMochi))
    assert reason is not None and "no AutoencoderKL or AutoencoderKLFlux2 or" in reason and "HunyuanVideo15" in reason


def test_an_ltx_that_adds_noise_is_whole() -> None:
    """Its noise is drawn for the whole map, and a rank that drew it for its rows would draw other numbers."""
    sizes = {"block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "spatio_temporal_scaling": (True,) * 2}
    layers = {"layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3, "latent_channels": 4}
    vae = AutoencoderKLLTXVideo(
        **sizes, **layers, decoder_spatio_temporal_scaling=(True,) * 2, decoder_inject_noise=(True, False, False)
    )
    assert "adds noise" in (why_whole(vae) or "")


def test_squares_that_do_not_halve_and_edges_that_meet_are_whole() -> None:
    vae = build_video("ltx 2")
    vae.encoder.patch_size = 3
    assert "3 x 3 pixels" in (why_whole(vae) or "")
    vae.encoder.patch_size = 2
    assert why_whole(vae) is None
    vae.decoder.conv_in.conv.padding_mode = "circular"
    assert "joins the image's edges" in (why_whole(vae) or "")
