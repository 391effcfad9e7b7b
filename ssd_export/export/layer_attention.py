"""One operator for the attention of a layer, `ssd_export::LayerAttention`, which ONNX Runtime loads
from a library (engines/operators).

It stands for RoPE, R3 to R7, attention and scores of all head groups of the layer, which are 40 to
60 ordinary operators (functions.py), and evicts where a head has no empty slot, so that no evict
graph runs before its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ssd_export.export.functions import DOMAIN, AttentionNode
from ssd_export.export.operators import Operators
from ssd_export.policy.table import pinned_bits

OP_TYPE = "LayerAttention"


def can_fuse(dtype: str) -> bool:
    """Whether the operators know weights and caches in this dtype, or caches in int8 beside it."""
    return dtype in ("float32", "float16")


def layer_attention(
    ops: Operators,
    nodes: Sequence[AttentionNode],
    token: Sequence[ir.Value],
    past: Sequence[ir.Value],
) -> tuple[ir.Value, list[ir.Value]]:
    """Adds the operator of a layer: (out [B, HQ*D], the present of each past).

    Args: token: qkv [B, (HQ + 2 H) * D], cos and sin of RoPE [B, 1, 1, D/2], position and
    prompt_length int32 [B]; past: of all groups, in the order of their parts.
    """
    first = nodes[0]
    out, *present = ops.many(
        OP_TYPE,
        *token,
        *past,
        domain=DOMAIN,
        num_outputs=1 + len(past),
        head_dim=first.head_dim,
        query_group_size=first.query_group_size,
        grid_width=first.grid_width,
        score_decay=float(first.score_decay),
        num_heads=[node.num_heads for node in nodes],
        num_sinks=[node.rule.num_sinks for node in nodes],
        num_recent=[node.rule.num_recent for node in nodes],
        by_score=[int(node.rule.by_score) for node in nodes],
        pinned_columns=[pinned_bits(node.rule.pinned_columns) for node in nodes],
        age_quota=[int(node.rule.age_quota) for node in nodes],
        evict_every=[node.evict_every for node in nodes],
    )
    return out, present
