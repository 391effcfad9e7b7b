"""Bodies of the OpenAI Images routes, as the official client sends and reads them.

Source: the OpenAI API reference, "Create image". Fields that would change nothing here are accepted
only with the values that ask for nothing; `negative_prompt`, `seed`, `cfg_scale`, `temperature` and
`top_k` are ours.
"""

from __future__ import annotations

import base64
import io
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ssd_export.sampling import MAX_COUNT, MAX_SEED

MAX_PROMPT_CHARACTERS = 4000  # OpenAI's own limit is 32,000; a prompt here has about 60 tokens
MAX_IMAGES = 10  # of one request, as OpenAI's


Class = (
    Annotated[int, Field(ge=0, strict=True)]
    | Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
)


class GenerationRequest(BaseModel):
    """The body of POST /v1/images/generations."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["class"]}]},
    )

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)] = Field(
        "", description="Text; of a model of classes, a class's number or name."
    )
    class_: Class | None = Field(
        None,
        alias="class",
        description="Number or name of a class, in place of prompt, for a model of classes.",
    )
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = Field(
        None,
        description="Prompt that guidance leads away from. None: the model's unconditional row.",
    )
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, strict=True)] | None = 1
    size: str | None = Field(None, description="The model's own size, such as 384x384, or auto.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100, strict=True)] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = False
    partial_images: Annotated[int, Field(ge=0, le=64, strict=True)] | None = Field(
        None, description="Previews of each image while it is generated, at most one a grid row."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)] = Field(
        0, description="Randomness: the same seed, prompt and bundle give the same images."
    )
    cfg_scale: float | None = Field(None, description="Guidance; 1 is none. None: the bundle's.")
    temperature: float | None = Field(None, description="0 is greedy. None: the bundle's.")
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT, strict=True)] | None = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> GenerationRequest:
        if bool(self.prompt) == (self.class_ is not None):
            raise ValueError("give prompt, or class for a model of classes, and not both")
        return self


class GeneratedImage(BaseModel):
    """An image of a response."""

    b64_json: str
    revised_prompt: str | None = None
    url: str | None = None


class TokenDetails(BaseModel):
    """Input tokens by kind."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class GenerationResponse(BaseModel):
    """The answer to a request without stream."""

    created: int
    data: list[GeneratedImage]
    background: str = "opaque"
    output_format: str = "png"
    quality: str = "auto"
    size: str
    usage: Usage


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


class Model(BaseModel):
    """An entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ssd-export"


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class GroupFacts(BaseModel):
    """A head group: how many KV heads, how many slots they have and what they rank by."""

    heads: int
    slots: int
    ranks_by: Literal["score", "position"]


class ServerFacts(BaseModel):
    """Facts that the page shows of the bundle: GET /about."""

    model: str
    policy: str
    budget: float
    grid: tuple[int, int]
    image_size: tuple[int, int]
    runner: str
    max_batch: int
    layers: list[list[GroupFacts]]
    bytes_an_image: int
    full_cache_bytes_an_image: int
    classes: int | None = Field(description="Number of classes; None for a model of prompts.")
    tokens_evicted: int | None = Field(description="Of the latest image; None before the first.")


def encoded(image: Image.Image, output_format: str, quality: int | None) -> str:
    """An image as base64 of a PNG, JPEG or WebP file."""
    file = io.BytesIO()
    options: dict[str, Any] = (
        {} if output_format == "png" or quality is None else {"quality": quality}
    )
    image.save(file, format=output_format, **options)
    return base64.b64encode(file.getvalue()).decode()
