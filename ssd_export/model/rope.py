"""The base of the rotary position embedding, from the three places where a config.json says it.

    rope_parameters {rope_type, rope_theta}   transformers 5
    rope_theta, rope_scaling {type, ...}      transformers 4, and the original layout

transformers 5 takes rope_scaling, where it is not empty, in place of rope_parameters, then the
rope_theta inside it, then the one beside it, then 10,000 (RotaryEmbeddingConfigMixin). Versions
differ where two places say two things, so that is refused, as is everything that scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssd_export.errors import UserError

if TYPE_CHECKING:
    from ssd_export.model.config_file import ConfigFile

DEFAULT_THETA = 10000.0
KNOWN = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def rope_theta(text: ConfigFile) -> float:
    """The base of a language model's section. Raises: UserError for a contradiction or a scaling
    that no model here has.
    """
    text.require("partial_rotary_factor", 1.0, 1.0)
    places = {"rope_theta": text} if text.values.get("rope_theta") is not None else {}
    for name in ("rope_scaling", "rope_parameters"):
        section = text.section(name)
        for kind in ("type", "rope_type"):
            section.require(kind, "default", "default")
        section.require("partial_rotary_factor", 1.0, 1.0)
        unknown = next((key for key in section.values if key not in KNOWN), None)
        if unknown is not None:
            raise section.wrong(unknown, section.values[unknown], "no scaling of positions")
        if section.values.get("rope_theta") is not None:
            places[f"{name}.rope_theta"] = section
    said = {place: section.number("rope_theta", 0.0) for place, section in places.items()}
    if text.section("rope_scaling").values and "rope_scaling.rope_theta" not in said:
        said.setdefault("rope_theta", DEFAULT_THETA)  # what transformers then reads
    first = next(iter(said), "")
    for place, value in said.items():
        if value != said[first]:
            raise UserError(
                f"{text.path}: {text.prefix}{first} is {said[first]:g} and {text.prefix}{place} is"
                f" {value:g}: keep the one that the model was trained with, and delete the other"
            )
    return said.get(first, DEFAULT_THETA)
