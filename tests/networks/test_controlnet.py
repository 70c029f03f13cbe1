"""ControlNets on patches, without ranks: what is embedded, what the U-Net takes for its own, what is refused.

`tests/runtime/test_unet_scenes.py` compares whole pipelines.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import nn

from otil_xdit.dryrun.job import ParallelDegrees
from otil_xdit.dryrun.stand_ins import unet_groups
from otil_xdit.networks.unet.control_calls import ControlCalls
from otil_xdit.networks.unet.controlnet import Condition, scale_and_reach, why_whole
from otil_xdit.networks.unet.sharding import UNetSharding


def sharding(rows: int, ranks: int, rank: int, cfg: int = 1, batch: int = 2, splits_batch: bool = True) -> UNetSharding:
    sample = torch.empty(batch, 4, rows, 6, device="meta")
    groups = unet_groups(ParallelDegrees(cfg, patches=ranks), rank)
    return UNetSharding.of(sample, 3, groups, 0, splits_batch)


@pytest.mark.parametrize("rows, ranks", [(64, 2), (40, 3), (27, 3)])
@torch.no_grad()
def test_each_rank_embeds_its_rows_of_the_condition_alone(rows: int, ranks: int) -> None:
    torch.manual_seed(0)
    embedding = ControlNetConditioningEmbedding(8, 3, (4, 8, 8, 8))
    nn.init.normal_(embedding.conv_out.weight)
    assert scale_and_reach(embedding) == (8, 23)
    whole = torch.randn(1, 3, 8 * rows, 48)
    conditions = [Condition.of(whole, sharding(rows, ranks, rank), embedding) for rank in range(ranks)]
    parts = [one.cut(embedding(one.rows_in(whole))) for one in conditions]
    assert torch.allclose(torch.cat(parts, dim=2), embedding(whole), atol=1e-5)
    if rows == 64:
        assert max(one.rows_in(whole).shape[2] for one in conditions) == 8 * (rows // ranks + 3)


def test_an_odd_condition_is_embedded_whole() -> None:
    """Its rows are rounded up by the strides, which only the whole one shows."""
    embedding = ControlNetConditioningEmbedding(8, 3, (4, 8, 8, 8))
    whole = torch.randn(1, 3, 8 * 16 - 5, 48)
    found = Condition.of(whole, sharding(16, 2, 1), embedding)
    assert found.rows_in(whole).shape == whole.shape
    assert torch.equal(found.cut(embedding(whole)), embedding(whole)[:, :, 8:])


def test_the_unet_knows_its_own_rows_of_residuals() -> None:
    seen = sharding(20, 2, 0)  # rows of the levels 20, 10, 5; this rank's 12, 6, 3
    names = "down_block_additional_residuals", "mid_block_additional_residual"
    whole, part = torch.randn(2, 8, 10, 3), torch.randn(2, 8, 6, 3)
    assert torch.equal(seen.argument(names[1], whole), whole[:, :, :6])
    assert torch.equal(seen.argument(names[1], part), part)
    assert [one.shape[2] for one in seen.argument(names[0], [whole, part, torch.randn(2, 8, 1, 1)])] == [6, 6, 1]
    with pytest.raises(ValueError, match="7 x 3 belongs to no level"):
        seen.argument(names[1], torch.randn(2, 8, 7, 3))


def test_calls_with_other_batches_or_sizes_are_refused() -> None:
    calls, guided = ControlCalls(), sharding(20, 2, 0, cfg=2, batch=4)
    for alone in (sharding(20, 2, 0, cfg=2, batch=2, splits_batch=False), guided):
        calls.record(alone)
    calls.take(guided)
    calls.record(sharding(20, 2, 0, cfg=2, batch=2))
    with pytest.raises(ValueError, match=r"batch of 2, .* U-Net with 4"):
        calls.take(guided)
    calls.take(guided)
    calls.record(sharding(24, 2, 0))
    with pytest.raises(ValueError, match="latent of 24 x 6, and its U-Net with 20 x 6"):
        calls.take(sharding(20, 2, 0))


def test_what_is_not_shared_is_named() -> None:
    with torch.device("meta"):
        sizes = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "norm_num_groups": 4}
        assert why_whole(ControlNetModel(**sizes, cross_attention_dim=8)) is None
        assert "pools" in (why_whole(ControlNetModel(**sizes, global_pool_conditions=True)) or "")
    assert "ControlNetUnionModel" in (why_whole(ControlNetUnionModel.__new__(ControlNetUnionModel)) or "")
