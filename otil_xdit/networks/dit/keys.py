"""`DitKeys`: the tokens of the transformer call under way, and what follows for the keys of its attention layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import nn

from otil_xdit.catalog.architectures import Architecture, Part, Sequence
from otil_xdit.comm.groups import PatchGroup
from otil_xdit.networks.dit.architectures import architecture_of, is_cut_by_pipeline
from otil_xdit.networks.dit.key_plan import KeyPlan, plan_keys
from otil_xdit.networks.dit.token_counts import Counts, Rows, Tokens, count_rows, count_tokens
from otil_xdit.networks.dit.token_cut import TokenCut


class DitKeys:
    """Tells real keys from padding and copies while a transformer computes.

    Args:
        group: the ranks that hold the patches.
        cfg: rank and number of those that share the passes with and without the prompt.
        shares: of the tokens, for each patch, in any unit; empty for equal ones.

    Attributes:
        cut: of the tokens.
    """

    def __init__(self, group: PatchGroup, cfg: tuple[int, int], shares: tuple[int, ...] = ()) -> None:
        self.cut = TokenCut(group.ulysses_degree * group.world_size, group.ulysses_degree, shares)
        self._patch, self._cfg = group.rank, cfg
        self._facts = Architecture()
        self._sequences: Mapping[str, Sequence] = {}
        self._counts: Counts = {}
        self._counted: dict[tuple[object, ...], Counts] = {}
        self._kept_alive: list[object] = []
        self._plans: dict[tuple[object, ...], KeyPlan] = {}
        self._cut_counts: set[int] = set()
        self._joins: Iterator[str] = iter(())

    @property
    def has_whole_masks(self) -> bool:
        """Return whether the network's masks cover the keys of all ranks."""
        return self._facts.whole_masks

    def begin(self) -> None:
        """Forget the calls of the last generation."""
        self._counted.clear()
        self._kept_alive.clear()
        self._plans.clear()
        self._counts = {}

    def read(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        splits_text: bool,
        rows: Rows | None = None,
    ) -> None:
        """Read the tokens of a call.

        Args:
            network: a diffusers model or xDiT's wrapper of one.
            args, kwargs: what it is called with.
            splits_text: whether xDiT's pipeline has shared the text out, where pipelines do.
            rows: of the latent that pipelines share out by rows, where some of these fill it up.

        Raises:
            ValueError: where rows cannot be shared out, or a mask is not read, and the result would be wrong.
        """
        self._facts = facts = architecture_of(network)
        self._sequences = facts.sequences
        if is_cut_by_pipeline(network) and not splits_text:
            self._sequences = {word: tuple(map(_copied, parts)) for word, parts in facts.sequences.items()}
        masks = [value for name, value in kwargs.items() if "mask" in name and isinstance(value, torch.Tensor)]
        # Looking into a mask waits for the device, and the same masks come back at every step.
        call = (id(network), splits_text, rows, *map(id, masks), *map(_sizes, (*args, *kwargs.values())))
        if call not in self._counted:
            self._check_masks(kwargs)
            if facts.call == "rows":
                self._counted[call] = self._count_rows(network, args, kwargs, rows)
            else:
                self._counted[call] = self._count(network, args, kwargs, splits_text)
            self._kept_alive += masks  # so that no other tensor gets the id of one of them
        self._counts = self._counted[call]
        self._cut_counts.clear()
        self._joins = cycle(facts.joins)

    def cut_tokens(self, tokens: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """Cut what belongs to filled up tokens into every rank's part.

        Args:
            tokens: one for each along `dim`.
        """
        self._cut_counts.add(tokens.shape[dim])
        return tokens.split(self.cut.sizes(tokens.shape[dim]), dim)

    def joined_sizes(self) -> tuple[int, ...]:
        """Return every rank's part of the filled up tokens that the network puts together again next."""
        return self.cut.sizes(self._counts[next(self._joins)].count)

    def plan(self, path: str, keys: int, device: torch.device) -> KeyPlan:
        """Return what to do with the keys of an attention layer.

        Args:
            path: of its module in the network.
            keys: of this rank.
            device: where the keys are.
        """
        words = path.split(".")
        word = next((word for word in self._sequences if word in words), "")
        if not self._counts or word not in self._sequences:
            return KeyPlan()
        joint = self._joint_count()
        asked = (word, keys, id(self._counts), joint)
        if asked not in self._plans:
            plan = plan_keys(self._sequences[word], self._counts, keys, self.cut, self._patch, joint)
            self._plans[asked] = plan.to(device)
        return self._plans[asked]

    def _joint_count(self) -> int:
        """Return how many tokens of text were cut in this call beside those of the image; as many as these for none."""
        image = self._counts["image"].count if "image" in self._counts else 0
        return next((count for count in self._cut_counts if count != self.cut.padded(image)), image)

    def kept_of_gathered(self, path: str, keys: int) -> int | None:
        """Return how many of the keys that xDiT has gathered for a layer are real; None where it gathers none."""
        words = path.split(".")
        count = self._counts.get("image")
        if count is None or not any(word in words for word in self._facts.gathered):
            return None
        return count.count if keys == self.cut.padded(count.count) else None

    def real_tokens(self, tokens: int, place: int, device: torch.device) -> torch.Tensor | None:
        """Return which of the tokens that a rank's first block is called with are no padding.

        Args:
            tokens: of this rank, of the image.
            place: of this rank among those that share them.
            device: of the positions.

        Returns:
            int64, their positions; None where all are real.
        """
        image = self._counts.get("image")
        if image is None or (image.real is None and self.cut.padded(image.count) == image.count):
            return None
        (real,) = image.real or (torch.arange(image.count),)
        start = sum(self.cut.sizes(image.count)[:place])
        own = real[(real >= start) & (real < start + tokens)] - start
        return None if len(own) == tokens else own.to(device)

    def _count(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], splits_text: bool) -> Counts:
        ranks = self.cut.ranks
        counts = count_tokens(network, self._facts.call, args, kwargs, self._cfg)
        if is_cut_by_pipeline(network) and counts:
            return _of_all_ranks(counts, ranks, splits_text)
        fills = self._facts.fills_frames
        return {name: tokens.with_frames(ranks) if fills(name) else tokens for name, tokens in counts.items()}

    def _count_rows(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Rows | None
    ) -> Counts:
        """Count the tokens where rows are shared out; none where all of them are real, and every key counts."""
        if rows is None:
            return {}
        ranks = self.cut.ranks
        if not is_cut_by_pipeline(network):
            raise ValueError(
                f"{rows.real} rows of latent pixels cannot be shared evenly by {ranks} ranks, which this script "
                "does not expect; change --height"
            )
        return count_rows(network, args, kwargs, rows, ranks)

    def _check_masks(self, kwargs: Mapping[str, Any]) -> None:
        """Check that xDiT reads the masks of the text as far as they are given."""
        if self._facts.masks == "any":
            return
        for name, mask in kwargs.items():
            if "mask" in name and isinstance(mask, torch.Tensor) and not torch.equal(mask, mask[:1].expand_as(mask)):
                raise ValueError(
                    f"{name} marks padding in a batch of prompts of different lengths, which xDiT would attend to; "
                    "give one prompt at a time"
                )


def _of_all_ranks(counts: Counts, ranks: int, splits_text: bool) -> Counts:
    """Return the tokens of all ranks, from what xDiT's pipeline has handed to this one."""
    text = counts.get("text", Tokens(0))
    whole = {"image": Tokens(counts["image"].count * ranks), "text": text}
    return {**whole, "text": Tokens(text.count * ranks)} if splits_text else whole


def _copied(part: Part) -> Part:
    """Return a part of a sequence where text is not shared out."""
    return replace(part, cut="replicated") if part.tokens == "text" and part.cut != "joint" else part


def _sizes(value: Any) -> object:
    """Return what of an argument the number of tokens depends on."""
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, list):
        return tuple(map(_sizes, value))
    return value if isinstance(value, int) else None
