"""DiTs with a step cache on the ranks of a torchrun, each compared with one process that has the same cache.

    torchrun --standalone --nproc_per_node 2 tests/workers/step_caches.py [CASE ...]

Rank 0 prints a JSON line for each case and cache: the largest difference of the latents under `sync` and `otil` and the
largest latent; how many blocks' attention was computed on one process and on each rank, of how many without the cache;
the messages of keys and values under `otil`; the change from step to step that caches compare, in `changes`, and
whether a rank's own tokens have changed by another number, in `apart`; or why it was refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import hooks
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import otil_xdit  # noqa: E402
from otil_xdit.networks.dit.layer_names import is_attention  # noqa: E402
from otil_xdit.runtime.step_caches import StepCaches  # noqa: E402
from otil_xdit.xdit.plugin.sessions import session_of  # noqa: E402
from tests.support.dits import CASES  # noqa: E402
from tests.support.in_rank import settle, tell  # noqa: E402

STEPS = 8


def first_block(threshold: float) -> Callable[[Any], None]:
    return lambda network: network.enable_cache(hooks.FirstBlockCacheConfig(threshold=threshold))


def broadcast(network: Any) -> None:
    """Pyramid attention broadcast at every second step."""
    network.enable_cache(
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
        )
    )


def taylor(network: Any) -> None:
    """In float32: in bfloat16, which is diffusers' own choice, a difference of 1e-7 in the weights becomes 4e-4."""
    settings = {"cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}
    network.enable_cache(hooks.TaylorSeerCacheConfig(**settings, taylor_factors_dtype=torch.float32))


def magnitudes(network: Any) -> None:
    config = hooks.MagCacheConfig(mag_ratios=torch.full((STEPS,), 0.99), num_inference_steps=STEPS, threshold=0.05)
    network.enable_cache(config)


def of_xdit(kind: str, threshold: float) -> Callable[[Any], None]:
    def apply(network: Any) -> None:
        from xfuser.model_executor.cache.adapters import apply_cache
        from xfuser.model_executor.cache.utils import CachedTransformerBlocks

        # One process has none of xDiT's groups; a rank that compared by itself would compare its own tokens.
        CachedTransformerBlocks.is_parallelized = property(lambda blocks: False)
        settings = {"residual_diff_threshold": threshold}
        apply_cache(kind, STEPS, pipe=None, transformer=network, preset_kwargs=settings)

    return apply


CACHES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "flux2, xDiT's fbcache": ("flux2, 7 text tokens", of_xdit("fbcache", 0.12)),
    "qwen-image, first block": ("qwen-image, prompts of 7 and 4 tokens", first_block(1.0)),
    "wan, first block": ("wan, 27 tokens", first_block(0.411)),
    "hunyuan-video, first block": ("hunyuan-video, 27 tokens", first_block(0.82)),
    "flux-kontext, xDiT's teacache": ("flux-kontext", of_xdit("teacache", 0.3)),
    "wan, pyramid attention broadcast": ("wan, 27 tokens", broadcast),
    "qwen-image, TaylorSeer": ("qwen-image, 7 text tokens", taylor),
    "flux2, MagCache": ("flux2", magnitudes),
}


def main() -> None:
    settle()
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or CACHES:
        tell(name, compared(*CACHES[name]))
    dist.barrier()
    dist.destroy_process_group()


def compared(case: str, apply: Callable[[Any], None]) -> dict[str, Any]:
    found: dict[str, Any] = {"error": {}, "apart": False, "changes": []}
    try:
        _, found["without"] = drawn(case, lambda network: None, None, found)
        exact, found["alone"] = drawn(case, apply, None, found)
        found["largest"] = exact.abs().max().item()
        for strategy in ("sync", "otil"):
            made, found[strategy] = drawn(case, apply, strategy, found)
            found["error"][strategy] = (made - exact).abs().max().item()
    except Exception as error:  # whatever stops a case must not stop the next one
        found["refused"] = f"{type(error).__name__}: {error}"
    return found


def drawn(
    case: str, apply: Callable[[Any], None], strategy: str | None, found: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """The latents, and how many attention modules were called for them."""
    pipe: Any = CASES[case].build()
    calls: list[None] = []
    pipe.set_progress_bar_config(disable=True)
    is_of_xdit = apply.__qualname__.startswith(of_xdit.__name__)  # xDiT's own runner has given the network its class
    if not is_of_xdit:
        apply(pipe.transformer)
    if strategy is not None:
        pipe = otil_xdit.parallelize(pipe, strategy)
    if is_of_xdit:
        apply(pipe.transformer)
    for module in pipe.transformer.modules():
        if is_attention(module):  # its first projection is computed where attention is
            next(layer for layer in module.modules() if isinstance(layer, nn.Linear)).register_forward_hook(
                lambda *given: calls.append(None)
            )
    arguments = {**CASES[case].arguments(), "num_inference_steps": STEPS}
    with noticing(found):
        made = pipe(**arguments)[0]
    if strategy is not None:
        found["messages"] = session_of(pipe).report().messages
        otil_xdit.restore(pipe)
    return made, len(calls)


@contextmanager
def noticing(found: dict[str, Any]) -> Any:
    """Record the change of this rank's tokens beside that of all."""
    plain = StepCaches._distance

    def distance(self: StepCaches, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        told = plain(self, before, now)
        own = (now - before).abs().mean() / before.abs().mean()
        found["changes"].append(round(told.item(), 3))
        found["apart"] = found["apart"] or abs(own.item() - told.item()) > 1e-3
        return told

    StepCaches._distance = distance
    try:
        yield
    finally:
        StepCaches._distance = plain


if __name__ == "__main__":
    main()
