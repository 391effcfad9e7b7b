"""The little language of captions that the demo model understands."""

from __future__ import annotations

from collections.abc import Sequence

from ssd_export.config import ModelConfig
from ssd_export.demo.captions import parse_caption
from ssd_export.demo.codes import num_codes
from ssd_export.demo.scenes import CATEGORIES, CLASS_CATEGORIES, SIZE
from ssd_export.errors import UserError, short
from ssd_export.model.families import family_of


def speaks_demo(config: ModelConfig) -> bool:
    """Whether a model has the demo model's image vocabulary, so that its images have a score."""
    size = config.image_height, config.image_width
    return config.codebook_size == num_codes() and size == (SIZE, SIZE)


def categories_of(config: ModelConfig) -> tuple[str, ...]:
    """Categories of scenes that a demo model has captions for: the class-conditional one has
    scenes of equal shapes alone.
    """
    return CLASS_CATEGORIES if family_of(config).takes_classes(config) else CATEGORIES


def outside(captions: Sequence[str]) -> list[str]:
    """One line about the captions that are outside the language."""
    wrong, reason = [], ""
    for caption in dict.fromkeys(captions):
        try:
            parse_caption(caption)
        except UserError as error:
            wrong.append(caption)
            reason = str(error)
    if not wrong:
        return []
    others = f" and {len(wrong) - 1} other prompts" if len(wrong) > 1 else ""
    way_out = reason.partition("; ")[2]
    return [
        f"the demo model was trained on a little language and has never seen"
        f" {short(wrong[0])}{others}:"
        f" expect nonsense; {way_out}"
    ]
