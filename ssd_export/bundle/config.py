"""The typed ssd_config.json of a bundle, parsed and validated once when it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssd_export.config import ModelConfig
from ssd_export.dtypes import ModelDtype
from ssd_export.graph_spec import GraphSpec
from ssd_export.policy.table import PolicyTable
from ssd_export.sampling import Sampling
from ssd_export.typed_json import to_json
from ssd_export.version import TOOL_VERSION

SCHEMA_VERSION = 3
CONFIG = "ssd_config.json"
EXPORT_AGAIN = "export it again with --force, or copy it again from where it came"
WeightFormat = Literal["none", "int8", "int4", "fp8"]
# What --weights means for the generation head and the aligner: int8 moves what tokens are sampled
# from by a hundredth of what int4 does (docs/measurements/precision_divergence.json). fp8 runs on
# GPUs alone, where no loss has been measured.
HEAD_WEIGHTS: dict[WeightFormat, WeightFormat] = {
    "none": "none",
    "int8": "int8",
    "int4": "int8",
    "fp8": "none",
}

DECODER_WEIGHTS = ("none", "int8")
LEAST_DECODER_PSNR = 45.0  # dB, of the image decoder in int8 against float32


@dataclass(frozen=True)
class Precision:
    """Storage of the matrices that are not in the model's dtype.

    weights: of the language model's layers; head: of the generation head and the aligner.
    quantized_bytes: codes and scales. Of int4 alone: block, inputs that share a scale;
    other_blocks, {matrix: block} where that does not divide the inputs; kept, matrices that no
    block suits.
    """

    weights: WeightFormat = "none"
    head: WeightFormat = "none"
    quantized_bytes: int = 0
    block: int | None = None
    other_blocks: dict[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    @property
    def main_format(self) -> WeightFormat:
        """The format of the layers' matrices or, where they are not quantized, of the head's."""
        return self.head if self.weights == "none" else self.weights

    @property
    def name(self) -> str:
        """Name of the precision: none, int4, or int4-head-int8 where the head has another format
        than its layers give it; names of folders and tables hold it.
        """
        usual = self.head == HEAD_WEIGHTS[self.weights]
        return self.weights if usual else f"{self.weights}-head-{self.head}"


@dataclass(frozen=True)
class Int8Decoder:
    """The image decoder in int8 that a bundle has beside the other, for ONNX Runtime on the CPU.

    psnr: dB, the least of held-out images, against float32. num_samples: of the model's images that
    it was calibrated with. kept: convolutions after a doubling that are
    float32.
    """

    psnr: float
    num_samples: int
    kept: tuple[str, ...] = ()


def decoder_line(decoder: Int8Decoder) -> str:
    """A line to print on what was measured."""
    kept = f"; {len(decoder.kept)} convolutions float32" if decoder.kept else ""
    return (
        f"image decoder on a CPU in int8: {decoder.psnr:.1f} dB from float32, calibrated on"
        f" {decoder.num_samples} images{kept}"
    )


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of `generate`."""

    cfg_scale: float = Sampling.cfg_scale
    temperature: float = Sampling.temperature


@dataclass(frozen=True)
class TextEmbeddingTable:
    """Place of the text embedding table: row-major at `offset` bytes of the weights file."""

    file: str
    offset: int
    dtype: ModelDtype
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Configuration of a bundle.

    model_revision: the hub's commit, of a checkpoint that came from there.
    layers_of_the_model: of the checkpoint; the bundle may have its first ones alone.
    dtype: of weights, and of keys and values where the policy does not store them in int8.
    target: the device that the bundle was exported for, if any was named.
    graphs: the contract of each graph by its name; the file is onnx/<name>.onnx.
    int8_decoder: what was measured of the graph image_decoder_int8, where there is one.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = TOOL_VERSION
    model_name: str
    model_revision: str | None
    model_fingerprint: str
    layers_of_the_model: int
    model: ModelConfig
    dtype: ModelDtype
    precision: Precision
    target: str | None
    policy: PolicyTable
    generation: GenerationDefaults
    text_embeddings: TextEmbeddingTable
    graphs: dict[str, GraphSpec]
    int8_decoder: Int8Decoder | None = None


def write_config(folder: Path, config: BundleConfig) -> None:
    """Writes ssd_config.json. Raises: OSError."""
    (folder / CONFIG).write_text(to_json(config), encoding="utf-8")


def leftover_of(target: Path) -> Path | None:
    """An earlier bundle that an export which was killed left beside the target."""
    found = sorted(target.parent.glob(f"{target.name}.old-*"))
    return found[0] if found else None
