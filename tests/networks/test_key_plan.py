"""Which gathered keys are real: padding, copies, prompts of different lengths, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from otil_xdit.catalog.architectures import Part, Sequence
from otil_xdit.networks.dit.key_plan import KeyPlan, plan_keys
from otil_xdit.networks.dit.token_counts import Tokens
from otil_xdit.networks.dit.token_cut import TokenCut


def chunks_of(parts: Sequence, tokens: dict[str, torch.Tensor], cut: TokenCut) -> list[torch.Tensor]:
    """What xDiT makes of the tokens: one chunk for each rank; padding is -1."""
    chunks = [[] for _ in range(cut.ranks)]
    for part in parts:
        values = tokens[part.tokens]
        copies = part.cut == "replicated" or (part.cut == "split" and len(values) % cut.ranks)
        padded = torch.cat([values, torch.full((-len(values) % cut.ranks,), -1)])
        shares = [values] * cut.ranks if copies else padded.split(cut.sizes(len(values)))
        for chunk, share in zip(chunks, shares, strict=True):
            chunk.append(share)
    return [torch.cat(chunk) for chunk in chunks]


def attended(plans: list[KeyPlan], local: list[torch.Tensor], patch: int) -> list[torch.Tensor]:
    """The keys that a rank attends to, of each sample (one stands for all)."""
    plan = plans[patch]
    sent = [keys if one.sent is None else keys[one.sent] for one, keys in zip(plans, local, strict=True)]
    if plan.unfilled is not None:
        sent = [pad(keys, (0, plan.longest - len(keys)), value=-2) for keys in sent]
    gathered = torch.cat(sent)
    own = [] if plan.own is None else [local[patch][plan.own]]
    keys = torch.cat([*own, gathered if plan.unfilled is None else gathered[plan.unfilled]])
    kept = plan.kept if isinstance(plan.kept, tuple) else (plan.kept,)
    return [keys if one is None else keys[one] for one in kept]


FLUX = (Part("text", "split"), Part("image"))
QWEN = (Part("text"), Part("image"))
COSMOS = (Part("text", "replicated"), Part("image"))


@pytest.mark.parametrize("parts", (FLUX, QWEN, COSMOS, (Part("image"),)), ids=("flux", "qwen", "cosmos", "wan"))
@pytest.mark.parametrize(("patches", "chunks"), ((1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1)))
@pytest.mark.parametrize(("text", "image"), ((8, 64), (7, 64), (7, 27), (1, 9), (12, 60)))
@pytest.mark.parametrize("is_even", (True, False), ids=("even", "unequal"))
def test_every_real_key_is_attended_to_once(
    parts: Sequence, patches: int, chunks: int, text: int, image: int, is_even: bool
) -> None:
    tokens = {"text": torch.arange(text), "image": 1000 + torch.arange(image)}
    cut = TokenCut(patches * chunks, chunks, () if is_even else tuple(range(patches + 1, 1, -1)))
    made = chunks_of(parts, tokens, cut)
    local = [torch.cat(made[patch * chunks : (patch + 1) * chunks]) for patch in range(patches)]
    counts = {name: Tokens(len(values)) for name, values in tokens.items()}
    expected = torch.cat([tokens[part.tokens] for part in parts])
    plans = [plan_keys(parts, counts, len(keys), cut, patch) for patch, keys in enumerate(local)]
    for patch in range(patches):
        (keys,) = attended(plans, local, patch)
        assert keys.sort().values.equal(expected.sort().values)


def test_nothing_is_done_where_nothing_is_padded() -> None:
    counts = {"text": Tokens(8), "image": Tokens(64)}
    assert plan_keys(QWEN, counts, 36, TokenCut(2), 0) == KeyPlan() == plan_keys(FLUX, counts, 36, TokenCut(2), 0)


def test_a_copy_is_not_sent() -> None:
    plan = plan_keys(FLUX, {"text": Tokens(7), "image": Tokens(64)}, 2 * (7 + 16), TokenCut(4, 2), 0)
    assert plan.sent is not None and len(plan.sent) == 32
    assert plan.own is not None and plan.own.tolist() == list(range(7))


def test_samples_have_masks_of_their_own() -> None:
    real = (torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1, 2]))
    plan = plan_keys(QWEN, {"text": Tokens(5, real), "image": Tokens(4)}, 5, TokenCut(2), 0)
    local = chunks_of(QWEN, {"text": torch.arange(5), "image": 1000 + torch.arange(4)}, TokenCut(2))
    first, second = attended([plan, plan], local, 0)
    assert first.tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002, 1003]
    assert second.tolist() == [1, 2, 1000, 1001, 1002, 1003]


def test_a_sequence_of_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="37 keys"):
        plan_keys(QWEN, {"text": Tokens(8), "image": Tokens(64)}, 37, TokenCut(2), 0)


def test_unequal_shares_are_filled_up_to_the_longest() -> None:
    cut = TokenCut(4, 2, (3, 1))
    assert cut.sizes(63) == (24, 24, 8, 8)
    plan = plan_keys((Part("image"),), {"image": Tokens(63)}, 48, cut, 0)
    assert plan.longest == 48 and plan.unfilled is not None and plan.unfilled.tolist() == list(range(64))
    assert isinstance(plan.kept, torch.Tensor) and plan.kept.tolist() == list(range(63))


def test_joint_text_has_unequal_shares_too() -> None:
    cut, parts = TokenCut(2, 1, (3, 1)), (Part("image"), Part("text", "joint"))
    assert plan_keys(parts, {"image": Tokens(64)}, 48 + 6, cut, 0, joint=8).longest == 54
    assert plan_keys(parts, {"image": Tokens(64)}, 16 + 2, cut, 1, joint=8).longest == 54
    assert plan_keys(parts, {"image": Tokens(64)}, 16, cut, 1, joint=8).longest == 48  # beside the sequence
