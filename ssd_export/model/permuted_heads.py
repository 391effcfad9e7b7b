"""A model whose heads stand in the checkpoint's order, served to a cache whose head groups are
slices: queries, keys and values are permuted on the way instead of the weights.
"""

from __future__ import annotations

from torch import Tensor

from ssd_export.model.decoder import Attend, ImageTokenModel
from ssd_export.policy.layout import inverse_order, query_head_order
from ssd_export.policy.table import PolicyTable


class PermutedHeads:
    """Stands in for an ImageTokenModel with permuted weights.

    Args: table: decides the order.
    """

    def __init__(self, model: ImageTokenModel, table: PolicyTable) -> None:
        self._model, self.config = model, model.config
        self.embed_image_tokens, self.image_logits = model.embed_image_tokens, model.image_logits
        self.condition, self.parameters = model.condition, model.parameters
        self._orders = [
            (list(query_head_order(order, model.config.query_group_size)), list(order))
            for order in table.head_order
        ]

    def __call__(
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        prompt_length: Tensor | int | None = None,
    ) -> Tensor:
        """Runs the model with `attend` given the heads in the table's order: [B, T, hidden]."""

        def permuted(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query_order, order = self._orders[layer]
            out = attend(layer, query[:, query_order], key[:, order], value[:, order])
            return out[:, list(inverse_order(query_order))]

        return self._model(hidden, positions, permuted, prompt_length)
