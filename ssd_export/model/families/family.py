"""Definition of a model family: the data and the few functions that a family's file fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ssd_export.config import ModelConfig
from ssd_export.model.config_file import ConfigFile
from ssd_export.model.prompt import EncodedPrompts, Prompt
from ssd_export.sampling import Sampling

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by canonical name


class PromptEncoder(Protocol):
    """Prompts to the rows of the model's table of condition embeddings."""

    def encode(
        self, prompts: Sequence[Prompt], prompt_slots: int, negative_prompts: Sequence[str] = ()
    ) -> EncodedPrompts:
        """The rows of a batch, one image a prompt.

        Args: prompt_slots: cache slots for a prompt, the longest that fits; negative_prompts: none,
        or one for each prompt, "" for the family's unconditional row.
        Raises: UserError for no prompt, or one that cannot be encoded.
        """


def names_of(folder: Path) -> set[str]:
    """Names that a model may have been published under, in lower case: those of its folder and, in
    a hub's cache, of the repository.
    """
    folder = folder.resolve()
    in_cache = folder.parent.name == "snapshots"
    repository = folder.parent.parent.name.split("--")[-1] if in_cache else ""
    return {name.lower() for name in (folder.name, repository) if name}


@dataclass(frozen=True)
class Part:
    """A tensor that is stored as rows of a larger matrix.

    source: canonical name of the matrix; pairs_of: 0, or the width of heads whose RoPE pairs are
    stored as neighbors and wanted half a head apart.
    """

    source: str
    rows: range
    pairs_of: int = 0


@dataclass(frozen=True)
class Layout:
    """A form in which checkpoints of a family are published.

    model_type: of config.json; canonical_name: of a stored tensor's name; read_config: raises
    UserError for a field of a wrong type, a feature that the family lacks, numbers that do not fit.
    parts: by canonical name, tensors that stand in others, which they replace.
    """

    name: str
    model_type: str
    canonical_name: Callable[[str], str]
    read_config: Callable[[ConfigFile, Shapes], ModelConfig]
    parts: Callable[[ModelConfig, Shapes], Mapping[str, Part]] = lambda config, shapes: {}


@dataclass(frozen=True)
class Family:
    """Facts that the models of a family share, beside what ModelConfig says of each.

    title, example: for messages; a hub id.
    published: shapes by the last part of the hub id, in lower case; a built-in head map of such a
    name may be assumed for other models of that shape.
    look_alikes: other published models whose shape is one of these, and whose heads are not known.
    stand_ins: canonical names of tensors that may be stored under another name alone, and that
    name.
    left_out: beginnings of canonical names that generating images does not need.
    derived: a regular expression of names of buffers that follow from the configuration.
    prompt_files: what the encoder reads; they travel into the bundle.
    encoder: of a model, from its prompt files (name -> path). Raises: UserError.
    sampling: defaults of a checkpoint that brings none.
    example_prompts: of a model, as many as are asked for; what is verified and measured with.
    prompt_slots: of a model, what an export takes where nothing else is asked for.
    takes_classes: whether a model's prompts are numbers or names of classes; reads_text: whether
    any text is one.
    prompt_templates: names, where models of the family differ; prompt_note: what to say of a
    model's, from its configuration and folder.
    """

    name: str
    title: str
    example: str
    layouts: tuple[Layout, ...]
    published: Mapping[str, ModelConfig]
    look_alikes: tuple[str, ...]
    stand_ins: Callable[[ConfigFile], Mapping[str, str]]
    left_out: tuple[str, ...]
    derived: str
    prompt_files: tuple[str, ...]
    encoder: Callable[[Callable[[str], Path], ModelConfig], PromptEncoder]
    sampling: Sampling
    example_prompts: Callable[[ModelConfig, int], Sequence[Prompt]]
    prompt_slots: Callable[[ModelConfig], int]
    takes_classes: Callable[[ModelConfig], bool] = lambda config: False
    reads_text: Callable[[ModelConfig], bool] = lambda config: True
    prompt_templates: tuple[str, ...] = ()
    prompt_note: Callable[[ModelConfig, Path], str] = lambda config, folder: ""
