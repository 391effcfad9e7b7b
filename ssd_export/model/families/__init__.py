"""Model families, one file and one row each: what the models of a family have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ssd_export.config import ModelConfig
from ssd_export.errors import UserError
from ssd_export.model.config_file import ConfigFile, shown
from ssd_export.model.families.family import Family, Layout, PromptEncoder
from ssd_export.model.families.janus import JANUS
from ssd_export.model.families.llamagen import LLAMAGEN
from ssd_export.policy.head_map import SHAPE

FAMILIES: dict[str, Family] = {family.name: family for family in (JANUS, LLAMAGEN)}
# The published models in numbers, so that a plan needs neither the weights nor a network.
PUBLISHED: dict[str, ModelConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.published.items()
}


def published_shape(model: str) -> ModelConfig | None:
    """The shape of a published model by its name or hub id (deepseek-community/Janus-Pro-1B), None
    for any other.
    """
    return PUBLISHED.get(model.rsplit("/", 1)[-1].lower())


def assumed_head_map(config: ModelConfig, known_as: Iterable[str]) -> str | None:
    """The published model whose built-in head map a model may be assumed to share, by its name: one
    of its family, shape and prompt template, unless the model is known as another.

    Args: known_as: names of the model, in lower case.
    """
    family = family_of(config)
    if any(name.startswith(family.look_alikes) for name in known_as):
        return None
    same = (
        name
        for name, shape in family.published.items()
        if config.prompt_template in ("", shape.prompt_template)
        and all(getattr(shape, field) == getattr(config, field) for field in SHAPE)
    )
    return next(same, None)


def family_of(config: ModelConfig) -> Family:
    """The family of a model. Raises: UserError for one that this version does not know."""
    if config.family not in FAMILIES:
        raise UserError(
            f"the model is of the family {config.family!r}, and this ssd-export knows"
            f" {', '.join(FAMILIES)}; use the version that wrote the bundle"
        )
    return FAMILIES[config.family]


def identify(file: ConfigFile) -> tuple[Family, Layout]:
    """The family and layout that a config.json belongs to. Raises: UserError for none of them."""
    kind = file.values.get("model_type")
    for family in FAMILIES.values():
        for layout in family.layouts:
            if layout.model_type == kind:
                return family, layout
    known = [layout.model_type for family in FAMILIES.values() for layout in family.layouts]
    titles = " or ".join(family.title for family in FAMILIES.values())
    raise UserError(
        f"{file.path}: model_type is {shown(kind)}, not a {titles} checkpoint (expected"
        f" {' or '.join(map(repr, known))}): give one, for example"
        f" {' or '.join(family.example for family in FAMILIES.values())}"
    )


def check_takes_classes(config: ModelConfig) -> None:
    """Raises UserError for a model whose prompts are not classes, which would read a number as
    text.
    """
    if not family_of(config).takes_classes(config):
        raise UserError(
            "a class (--class) is for models that generate classes, and this one does not: give a"
            " PROMPT"
        )


def num_classes(config: ModelConfig) -> int | None:
    """Number of classes that a model generates; None for a model of prompts."""
    if not family_of(config).takes_classes(config):
        return None
    return config.vocab_size - (config.rows_per_image > 1)  # the last row is that of no class


def check_can_be_asked(config: ModelConfig) -> None:
    """Raises UserError for a model whose prompts are neither text nor classes."""
    family = family_of(config)
    if not (family.reads_text(config) or family.takes_classes(config)):
        raise UserError(
            "this model reads captions as embeddings, which no request holds: use `ssd-export"
            " generate --prompt-embeds FILE.safetensors`"
        )


def prompt_slots_of(config: ModelConfig, asked: int | None) -> int:
    """Cache slots for a model's prompts: those asked for, else the family's."""
    return family_of(config).prompt_slots(config) if asked is None else asked


def prompt_encoder(config: ModelConfig, file: Callable[[str], Path]) -> PromptEncoder:
    """The encoder of a model's prompts.

    Args: file: the path of a prompt file, by its name.
    Raises: UserError where a file is missing, damaged, or another model's.
    """
    return family_of(config).encoder(file, config)
