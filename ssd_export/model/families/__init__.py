"""Model families, one file each: what the models of a family have in common."""

from __future__ import annotations

from ssd_export.config import ModelConfig
from ssd_export.model.families import janus

# The published models in numbers, so that a plan needs neither the weights nor a network.
PUBLISHED: dict[str, ModelConfig] = {**janus.PUBLISHED}


def published_shape(model: str) -> ModelConfig | None:
    """The shape of a published model by its name or hub id (deepseek-community/Janus-Pro-1B), None
    for any other.
    """
    return PUBLISHED.get(model.rsplit("/", 1)[-1].lower())
