"""The slots of one head group in torch tensors (R1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_export.policy.table import HeadGroup

EMPTY = -1


@dataclass
class GroupState:
    """Changed in place by prefill and decode steps.

    key, value: [B, H, S, D]; position: int32 [B, H, S], -1 = empty; score: float32 [B, H, S], None
    where the group's rule does not rank by score; key_scale, value_scale: float32 [B, H, S] where
    keys and values are int8 (quantized_rows.py), else None.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    score: Tensor | None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def copied(self, dtype: torch.dtype) -> GroupState:
        """A copy with keys and values in a floating dtype, of a state whose own are not int8."""
        score = None if self.score is None else self.score.clone()
        return GroupState(
            self.key.to(dtype, copy=True),
            self.value.to(dtype, copy=True),
            self.position.clone(),
            score,
        )

    @classmethod
    def empty(
        cls,
        rows: int,
        group: HeadGroup,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: str = "model",
    ) -> GroupState:
        """A state that holds no token. Zero-filled: a masked slot must not hold NaN, since 0 x NaN
        is NaN.
        """
        slots = (rows, group.num_heads, group.num_slots)
        is_int8 = kv_dtype == "int8"
        key = torch.zeros(*slots, head_dim, dtype=torch.int8 if is_int8 else dtype, device=device)
        position = torch.full(slots, EMPTY, dtype=torch.int32, device=device)
        score = (
            torch.zeros(slots, dtype=torch.float32, device=device) if group.rule.by_score else None
        )
        scales = [torch.zeros(slots, device=device) if is_int8 else None for _ in range(2)]
        return cls(key, torch.zeros_like(key), position, score, *scales)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as allocated."""
        tensors = (
            self.key,
            self.value,
            self.position,
            self.score,
            self.key_scale,
            self.value_scale,
        )
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def reset(self) -> None:
        """Forgets every token; the tensors stay where they are."""
        self.position.fill_(EMPTY)
        if self.score is not None:
            self.score.zero_()
