"""A server of a class-conditional model: a class in the body is the class on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import ServerProcess, pixels_of
from ssd_export.errors import UserError
from ssd_export.runtime.generate import ImageGenerator
from tests.llamagen_checkpoints import TinyLlamaGen, write_llamagen_checkpoint
from tests.runtime.checkpoints import bundle

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install ssd-export[serve]")
pytestmark = pytest.mark.slow
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "tiny"
    names = [f"kind {number}" for number in range(10)]
    write_llamagen_checkpoint(folder, TinyLlamaGen(num_layers=1), class_names=names)
    return bundle(folder, "h2o", 0.2, prompt_slots=1)


@pytest.fixture(scope="module")
def server(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    with ServerProcess(classes, log, "--threads", "1") as running:
        yield running


def post(server: ServerProcess, **body: Any) -> tuple[int, dict[str, Any]]:
    status, _, content = server.ask("POST", ROUTE, body)
    return status, json.loads(content)


def test_a_class_is_asked_for_by_number_name_or_prompt(
    server: ServerProcess, classes: Path
) -> None:
    with ImageGenerator.from_bundle(classes, num_threads=1) as generator:
        want = np.asarray(generator(["3"], seed=5).images[0])
    for asked in ({"class": 3}, {"class": "kind 3"}, {"class": "3"}, {"prompt": "Kind 3"}):
        status, answer = post(server, seed=5, **asked)
        assert status == 200, answer
        assert (pixels_of(answer["data"][0]["b64_json"]) == want).all()
    assert json.loads(server.ask("GET", "/about")[2])["classes"] == 10


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "give prompt, or class"),
        ({"prompt": "3", "class": 3}, "not both"),
        ({"class": 10}, "class 10 is beyond the model's last: give a number in 0 .. 9"),
        ({"class": "kind 11"}, "is no class of this model"),
        ({"class": -1}, "class"),
        ({"class": [3]}, "class"),
        ({"class": 3, "prompt_embeds": "AAAA"}, "prompt_embeds: Extra inputs"),
    ],
)
def test_what_is_no_class_is_refused(
    server: ServerProcess, body: dict[str, Any], complaint: str
) -> None:
    status, answer = post(server, **body)
    assert status == 400 and complaint in answer["error"]["message"]


def test_a_model_of_embeddings_is_not_served(tmp_path: Path) -> None:
    from ssd_export.serve.run import ServeSpec, open_server

    tiny = TinyLlamaGen(num_layers=1, caption_dim=24)
    path = bundle(write_llamagen_checkpoint(tmp_path / "captions", tiny), "h2o", prompt_slots=12)
    spec = ServeSpec(path, "ort", "cpu", 1, "127.0.0.1", 0, 4, 8, 60.0, None)
    with pytest.raises(UserError, match="reads captions as embeddings, which no request holds"):
        open_server(spec)
