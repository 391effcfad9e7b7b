"""A model repository for Triton Inference Server: a model of its Python backend with decoupled
responses, so that previews of a request come before its images.

    <repository>/<name>/config.pbtxt
                        1/model.py      hands over to deploy/triton_model.py
                        1/bundle/       a copy

Source: Triton's model_config.proto and the README of its Python backend.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.deploy.folder import copy_bundle, new_folder
from ssd_export.errors import UserError
from ssd_export.version import TOOL_VERSION

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
QUEUE_DELAY_MICROSECONDS = 5_000  # that a batch waits for company: less than a decode step
BUNDLE = "bundle"
# Inputs of a request, each [images, 1]; all but the prompt may be left out.
INPUTS = {
    "prompt": "TYPE_STRING",
    "negative_prompt": "TYPE_STRING",
    "seed": "TYPE_UINT64",
    "cfg_scale": "TYPE_FP32",
    "temperature": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "previews": "TYPE_INT32",
}
MODEL = f'''"""Generates images from the bundle beside this file. By ssd-export {TOOL_VERSION}."""

import triton_python_backend_utils

from ssd_export.deploy.triton_model import TritonModel


class TritonPythonModel(TritonModel):
    backend = triton_python_backend_utils
'''


@dataclass(frozen=True)
class TritonSpec:
    """A model of a repository. max_batch: images at once; threads: of the CPU, None chooses."""

    repository: Path
    name: str
    runner: str
    provider: str
    threads: int | None
    max_batch: int
    force: bool


def write_repository(bundle: Bundle, spec: TritonSpec) -> Path:
    """Writes the model; the folder of its name.

    Raises: UserError for a name that Triton would not take, a model that is there, a full disk.
    """
    if not NAME.fullmatch(spec.name):
        raise UserError(
            f"{spec.name!r} is no name for a model of Triton; use letters, digits, _ . and -"
        )
    target = spec.repository / spec.name
    with new_folder(target, spec.force) as folder:
        version = folder / "1"
        version.mkdir()
        (folder / "config.pbtxt").write_text(config_text(bundle, spec), encoding="utf-8")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        copy_bundle(bundle, version / BUNDLE)
    return target


def config_text(bundle: Bundle, spec: TritonSpec) -> str:
    """The model's configuration as protobuf text."""
    model = bundle.config.model
    shape = f"{model.image_height}, {model.image_width}, 3"
    inputs = [_tensor(name, kind, "1", name != "prompt") for name, kind in INPUTS.items()]
    outputs = [_tensor("image", "TYPE_UINT8", shape), _tensor("row", "TYPE_INT32", "1")]
    parameters = {
        "runner": spec.runner,
        "provider": spec.provider,
        "threads": "" if spec.threads is None else str(spec.threads),
        "bundle_hash": bundle.hash,
    }
    kind = "KIND_GPU" if spec.provider == "cuda" else "KIND_CPU"
    return "\n".join(
        [
            f"# Written by ssd-export {TOOL_VERSION}.",
            f'name: "{spec.name}"',
            'backend: "python"',
            f"max_batch_size: {spec.max_batch}",
            "# Previews of a request come before its images.",
            "model_transaction_policy { decoupled: true }",
            f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS} }}",
            f"input [\n{_listed(inputs)}\n]",
            f"output [\n{_listed(outputs)}\n]",
            "# A warm generator an instance; a GPU has one for each of its count.",
            f"instance_group [ {{ count: 1, kind: {kind} }} ]",
            *(
                f'parameters {{ key: "{key}", value {{ string_value: "{value}" }} }}'
                for key, value in parameters.items()
            ),
            "",
        ]
    )


def _tensor(name: str, kind: str, dims: str, is_optional: bool = False) -> str:
    optional = ", optional: true" if is_optional else ""
    return f'  {{ name: "{name}", data_type: {kind}, dims: [ {dims} ]{optional} }}'


def _listed(tensors: list[str]) -> str:
    return ",\n".join(tensors)
