"""Which gathered keys are real: padding, copies, prompts of different lengths, on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from otil_xdit.catalog.architectures import Part, Sequence
from otil_xdit.networks.dit.key_plan import KeyPlan, plan_keys
from otil_xdit.networks.dit.token_counts import Tokens


def chunks_of(parts: Sequence, tokens: dict[str, torch.Tensor], ranks: int) -> list[torch.Tensor]:
    """What xDiT makes of the tokens: one chunk for each rank; padding is -1."""
    chunks = [[] for _ in range(ranks)]
    for part in parts:
        values = tokens[part.tokens]
        copies = part.cut == "replicated" or (part.cut == "split" and len(values) % ranks)
        padded = torch.cat([values, torch.full((-len(values) % ranks,), -1)])
        for chunk, share in zip(chunks, [values] * ranks if copies else padded.chunk(ranks), strict=True):
            chunk.append(share)
    return [torch.cat(chunk) for chunk in chunks]


def attended(plan: KeyPlan, local: list[torch.Tensor], patch: int) -> list[torch.Tensor]:
    """The keys that a rank attends to, of each sample (one stands for all)."""
    sent = [keys if plan.sent is None else keys[plan.sent] for keys in local]
    own = [] if plan.own is None else [local[patch][plan.own]]
    keys = torch.cat([*own, *sent])
    kept = plan.kept if isinstance(plan.kept, tuple) else (plan.kept,)
    return [keys if one is None else keys[one] for one in kept]


FLUX = (Part("text", "split"), Part("image"))
QWEN = (Part("text"), Part("image"))
COSMOS = (Part("text", "replicated"), Part("image"))


@pytest.mark.parametrize("parts", (FLUX, QWEN, COSMOS, (Part("image"),)), ids=("flux", "qwen", "cosmos", "wan"))
@pytest.mark.parametrize(("patches", "chunks"), ((1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1)))
@pytest.mark.parametrize(("text", "image"), ((8, 64), (7, 64), (7, 27), (1, 9), (12, 60)))
def test_every_real_key_is_attended_to_once(parts: Sequence, patches: int, chunks: int, text: int, image: int) -> None:
    tokens = {"text": torch.arange(text), "image": 1000 + torch.arange(image)}
    ranks = patches * chunks
    cut = chunks_of(parts, tokens, ranks)
    local = [torch.cat(cut[patch * chunks : (patch + 1) * chunks]) for patch in range(patches)]
    counts = {name: Tokens(len(values)) for name, values in tokens.items()}
    plan = plan_keys(parts, counts, len(local[0]), chunks, ranks)
    expected = torch.cat([tokens[part.tokens] for part in parts])
    for patch in range(patches):
        (keys,) = attended(plan, local, patch)
        assert keys.sort().values.equal(expected.sort().values)


def test_nothing_is_done_where_nothing_is_padded() -> None:
    counts = {"text": Tokens(8), "image": Tokens(64)}
    assert plan_keys(QWEN, counts, 36, 1, 2) == KeyPlan() == plan_keys(FLUX, counts, 36, 1, 2)


def test_a_copy_is_not_sent() -> None:
    plan = plan_keys(FLUX, {"text": Tokens(7), "image": Tokens(64)}, 2 * (7 + 16), 2, 4)
    assert plan.sent is not None and len(plan.sent) == 32
    assert plan.own is not None and plan.own.tolist() == list(range(7))


def test_samples_have_masks_of_their_own() -> None:
    real = (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2]))
    plan = plan_keys(QWEN, {"text": Tokens(5, real), "image": Tokens(4)}, 5, 1, 2)
    local = chunks_of(QWEN, {"text": torch.arange(5), "image": 1000 + torch.arange(4)}, 2)
    first, second = attended(plan, local, 0)
    assert first.tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002, 1003]
    assert second.tolist() == [1, 2, 1000, 1001, 1002, 1003]


def test_a_sequence_of_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="37 keys"):
        plan_keys(QWEN, {"text": Tokens(8), "image": Tokens(64)}, 37, 1, 2)
