"""The Triton repository: Triton's own schema reads its configuration, and model.py answers what a
stand-in for the server asks. No Triton server runs here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ssd_export.bundle import open_bundle
from ssd_export.deploy.triton_repository import (
    INPUTS,
    TritonSpec,
    config_text,
    write_repository,
)
from ssd_export.errors import UserError
from ssd_export.runtime.generate import ImageGenerator
from tests.deploy import triton_backend
from tests.deploy.triton_backend import Request, TritonModelException
from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source() -> Path:
    return bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2)


@pytest.fixture(scope="module")
def repository(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    spec = TritonSpec(folder, "tiny", "ort", "cpu", 1, max_batch=4, force=False)
    assert write_repository(open_bundle(source), spec) == folder / "tiny"
    return folder / "tiny"


def test_the_configuration_is_what_tritons_schema_reads(repository: Path, source: Path) -> None:
    """The schema is the one file of tritonclient that needs protobuf alone."""
    text_format = pytest.importorskip("google.protobuf.text_format", reason="needs protobuf")
    try:
        files = importlib.metadata.files("tritonclient") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs its schema: pip install --no-deps tritonclient")
    schema = loaded(
        "model_config_pb2",
        Path(str(next(f for f in files if f.name == "model_config_pb2.py").locate())),
    )
    text = (repository / "config.pbtxt").read_text()
    config = text_format.Parse(text, schema.ModelConfig())
    assert config.name == repository.name and config.backend == "python"
    assert config.max_batch_size == 4 and config.model_transaction_policy.decoupled
    assert {one.name: one.optional for one in config.input} == {
        "prompt": False,
        **dict.fromkeys(
            ("negative_prompt", "seed", "cfg_scale", "temperature", "top_k", "previews"), True
        ),
    }
    assert config.output[0].data_type == schema.TYPE_UINT8
    size = open_bundle(source).config.model
    assert list(config.output[0].dims) == [size.image_height, size.image_width, 3]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert config.parameters["runner"].string_value == "ort"


@pytest.mark.parametrize(("provider", "kind"), [("cpu", "KIND_CPU"), ("cuda", "KIND_GPU")])
def test_the_configuration_is_the_provider_s(
    source: Path, tmp_path: Path, provider: str, kind: str
) -> None:
    spec = TritonSpec(tmp_path, "tiny", "ort", provider, None, max_batch=4, force=False)
    text = config_text(open_bundle(source), spec)
    assert f"instance_group [ {{ count: 1, kind: {kind} }} ]" in text
    assert f'key: "provider", value {{ string_value: "{provider}" }}' in text
    optional = [line for line in text.splitlines() if "optional: true" in line]
    assert len(optional) == len(INPUTS) - 1 and not any('"prompt"' in line for line in optional)


def test_requests_share_a_batch_as_far_as_it_holds(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    monkeypatch.setattr(model._generator.runner, "max_images", 3)
    monkeypatch.setattr(
        model, "_generate", lambda batch: batches.append([len(one.images) for one in batch])
    )
    model.execute([request(["a"] * count) for count in (1, 2, 2, 2, 1)])
    assert batches == [[1, 2], [2], [2, 1]]


@pytest.fixture(scope="module")
def model(repository: Path) -> Any:
    sys.modules["triton_python_backend_utils"] = triton_backend
    try:
        made = loaded("model", repository / "1" / "model.py").TritonPythonModel()
    finally:
        del sys.modules["triton_python_backend_utils"]
    made.initialize(arguments(repository))
    yield made
    made.finalize()


def arguments(repository: Path, **changes: str) -> dict[str, str]:
    values = {"runner": "ort", "provider": "cpu", "threads": "1", **changes}
    parameters = {key: {"string_value": value} for key, value in values.items()}
    return {
        "model_config": json.dumps({"parameters": parameters}),
        "model_repository": str(repository),
        "model_version": "1",
        "model_name": repository.name,
    }


def request(prompts: list[str], leaves_after: int | None = None, **inputs: Any) -> Request:
    values = {name: np.array(value).reshape(-1, 1) for name, value in inputs.items()}
    text = np.array([prompt.encode() for prompt in prompts], np.object_).reshape(-1, 1)
    return Request({"prompt": text, **values}, leaves_after)


def test_requests_of_a_batch_get_their_own_images(model: Any, source: Path) -> None:
    two = request(["a red circle", "blue"], seed=np.array([5, 6], np.uint64), previews=[3, 3])
    one = request(["blue"], seed=[7], cfg_scale=np.float32([2.0]), top_k=np.int32([3]))
    wrong = request(["word " * 99])
    model.execute([two, wrong, one])
    with ImageGenerator.from_bundle(source, num_threads=1) as generator:
        expected = [
            generator(["a red circle"], seed=5).pixels[0],
            generator(["blue"], seed=6).pixels[0],
        ]
        other = generator(["blue"], seed=7, cfg_scale=2.0, top_k=3).pixels
    assert [response.outputs["row"][0, 0] for response in two.sender.responses] == [0, 11, 22, 23]
    np.testing.assert_array_equal(two.sender.responses[-1].outputs["image"], expected)
    assert (two.sender.responses[0].outputs["image"][:, -1] == 235).all()
    (answer,) = one.sender.responses
    np.testing.assert_array_equal(answer.outputs["image"], other)
    (refused,) = wrong.sender.responses
    assert "tokens long" in refused.error.text
    assert two.sender.is_closed and one.sender.is_closed and wrong.sender.is_closed


def test_a_client_that_leaves_ends_its_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = request(["a"], leaves_after=1, previews=[23])
    model.execute([gone])
    assert len(gone.sender.responses) == 1 and gone.sender.is_closed


def test_a_failure_is_answered_and_the_next_batch_is_made(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(requests: object, wants_preview: object) -> Any:
        raise RuntimeError("the device is gone")
        yield

    first, second = request(["a"]), request(["a"])
    with monkeypatch.context() as patch:
        patch.setattr(model._generator, "stream_requests", failing)
        model.execute([first])
    assert first.sender.responses[0].error.text == "the device is gone" and first.sender.is_closed
    model.execute([second])
    assert second.sender.responses[0].error is None


def test_what_cannot_be_opened_is_tritons_own_error(model: Any, repository: Path) -> None:
    other = type(model)()
    with pytest.raises(TritonModelException, match="unknown runner"):
        other.initialize(arguments(repository, runner="none"))


def test_a_model_that_is_there_stays_unless_told(source: Path, tmp_path: Path) -> None:
    opened = open_bundle(source)
    spec = TritonSpec(tmp_path, "m", "ort", "cpu", None, 8, force=False)
    write_repository(opened, spec)
    (tmp_path / "m" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists; choose another place, or --force"):
        write_repository(opened, spec)
    assert (tmp_path / "m" / "mine").exists()
    write_repository(opened, TritonSpec(tmp_path, "m", "ort", "cpu", None, 8, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m" / "mine").exists()
    for name in ("", "../x", "a b", 'a"b'):
        with pytest.raises(UserError, match="is no name for a model"):
            write_repository(opened, TritonSpec(tmp_path, name, "ort", "cpu", None, 8, False))
