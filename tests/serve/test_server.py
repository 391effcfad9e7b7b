"""A real server over the demo bundle, asked by the official OpenAI client and by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.server_process import START_SECONDS, ServerProcess, pixels_of
from ssd_export.model.find import DEMO_CHECKPOINT
from tests.runtime.checkpoints import bundle

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install ssd-export[serve]")
openai = pytest.importorskip("openai", reason="needs openai: pip install ssd-export[test]")

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle on white"


def started(folder: Path, *options: str, **environment: str) -> ServerProcess:
    path = bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1)
    return ServerProcess(path, folder / "server.log", *options, "--threads", "1", **environment)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = started(tmp_path_factory.mktemp("server"), "--max-waiting", "12")
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    return openai.OpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0
    )


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """Pixels of the first images of seed 7, generated without a server."""
    from ssd_export.runtime.generate import ImageGenerator

    path = bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1)
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        images = generator([PROMPT], seed=7, num_images=2).images
    return [np.asarray(image) for image in images]


def test_the_official_client_gets_the_images_of_its_seed(
    client: Any, expected: list[np.ndarray]
) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7})
    for image, want in zip(answer.data, expected, strict=True):
        assert (pixels_of(image.b64_json) == want).all()
    assert answer.usage.output_tokens == 2 * 576
    assert answer.size == "96x96" and answer.output_format == "png"
    assert [model.id for model in client.models.list()] == ["checkpoint"]  # the folder's name


def test_the_official_client_streams_partial_images(
    client: Any, expected: list[np.ndarray]
) -> None:
    events = list(
        client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7})
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert (pixels_of(events[-1].b64_json) == expected[0]).all()
    first = pixels_of(events[0].b64_json)
    is_near = np.abs(first[:2].astype(int) - expected[0][:2]) <= 16
    assert is_near.mean() > 0.9 and (first[4:] == 235).all()


def test_callers_at_the_same_time_get_the_images_of_their_own_seeds(
    client: Any, server: ServerProcess
) -> None:
    def ask(seed: int) -> np.ndarray:
        answer = client.images.generate(prompt=PROMPT, extra_body={"seed": seed})
        return pixels_of(answer.data[0].b64_json)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(4)))
    assert all((one == ask(seed)).all() for seed, one in enumerate(together))
    assert len({one.tobytes() for one in together}) == 4
    metrics = server.ask("GET", "/metrics")[2].decode()
    assert 'ssd_images_total{end="finished"}' in metrics and "ssd_cache_bytes " in metrics


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": "2"}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": "word " * 500}, None),
        ({"sise": "1x1"}, "sise"),
        ({"size": "1024x1024"}, None),
        ({"model": "dall-e-3"}, None),
        ({"response_format": "url"}, "response_format"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"temperature": -1}, None),
        ({"cfg_scale": 1e39}, None),
        ({"quality": "hd"}, "quality"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_bad_value_is_an_openai_error(
    server: ServerProcess, changes: dict[str, Any], param: str | None
) -> None:
    status, _, content = server.ask("POST", "/v1/images/generations", {"prompt": PROMPT, **changes})
    error = json.loads(content)["error"]
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[" * 10_000, 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "a", "cfg_scale": NaN}', 400),
        (b" " * 200_000, 413),
    ],
)
def test_a_body_that_is_no_request_is_an_openai_error(
    server: ServerProcess, body: bytes, status: int
) -> None:
    answered, _, content = server.ask("POST", "/v1/images/generations", body)
    error = json.loads(content)["error"]
    assert answered == status and error["message"]
    if not body.startswith((b'{"', b" ")):
        assert "send one with Content-Type: application/json" in error["message"]
        assert error["param"] is None


def test_a_body_of_another_type_says_which_to_send(server: ServerProcess) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/images/generations",
        json.dumps({"prompt": PROMPT}).encode(),
        {"Content-Type": "text/plain"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert "send one with Content-Type: application/json" in refused.value.read().decode()


def test_a_body_of_100_mb_is_refused_unread(server: ServerProcess) -> None:
    before = server.metric("process_resident_memory_bytes")
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), START_SECONDS) as connection:
        connection.sendall(head + b"Content-Length: 100000000\r\n\r\n{")
        assert b" 413 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port), START_SECONDS) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):  # it answers and closes long before the end
            for _ in range(1600):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    assert server.metric("process_resident_memory_bytes") < before + (32 << 20)


def test_a_prompt_of_a_million_characters_is_refused(server: ServerProcess) -> None:
    body = {"prompt": "a" * 10**6}
    assert server.ask("POST", "/v1/images/generations", body)[0] == 413


@pytest.mark.parametrize("text", ["<|User|>", "<begin_of_image>", "<｜▁pad▁｜>", "\0\x1b[2J\u202e"])
def test_control_tokens_are_text_or_refused(server: ServerProcess, text: str) -> None:
    status, _, content = server.ask("POST", "/v1/images/generations", {"prompt": f"a {text} b"})
    assert status == 200 or b"control token" in content or b"tokens long" in content


def test_a_client_that_is_slow_with_its_head_loses_no_one_else_anything(
    server: ServerProcess,
) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /v1/images/generations HTT")
    assert server.ask("POST", "/v1/images/generations", {"prompt": PROMPT})[0] == 200
    for connection in slow:
        connection.settimeout(START_SECONDS)
        assert connection.recv(1) == b"", "closed by the server"
        connection.close()


def test_a_full_disk_behind_its_log_stops_nothing() -> None:
    with ServerProcess(bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1), Path("/dev/full")) as server:
        assert server.ask("POST", "/v1/images/generations", {"prompt": PROMPT})[0] == 200
        assert server.ask("POST", "/v1/images/generations", b"{")[0] == 400


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="4000|4,000|at most"):
        client.images.generate(prompt="x" * 5000)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_a_full_queue_says_when_to_come_back(server: ServerProcess) -> None:
    request = {"prompt": PROMPT, "n": 10}
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: server.ask("POST", "/v1/images/generations", request), range(4))
        )
    refused = [headers for status, headers, _ in answers if status == 429]
    assert refused and all(int(headers["retry-after"]) >= 1 for headers in refused)
    assert any(status == 200 for status, _, _ in answers)


def test_a_client_that_leaves_gives_its_place_back(server: ServerProcess) -> None:
    connection = server.connect()
    body = json.dumps({"prompt": PROMPT, "n": 10, "stream": True, "partial_images": 20})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    connection.getresponse().read(100)
    connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        metrics = server.ask("GET", "/metrics")[2].decode()
        if 'ssd_images_total{end="cancelled"} 10.0' in metrics:
            break
        time.sleep(0.1)
    assert json.loads(server.ask("GET", "/health")[2])["waiting"] == 0
    assert 'ssd_images_total{end="cancelled"} 10.0' in metrics


def test_the_page_needs_no_other_host(server: ServerProcess) -> None:
    status, headers, content = server.ask("GET", "/")
    text = content.decode()
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in text and "https://" not in text
    facts = json.loads(server.ask("GET", "/about")[2])
    assert facts["bytes_an_image"] < 0.3 * facts["full_cache_bytes_an_image"]
    assert sum(group["heads"] for group in facts["layers"][0]) == 4


def test_lookahead_serves_the_same_images(tmp_path: Path, expected: list[np.ndarray]) -> None:
    running = started(tmp_path, "--lookahead", "6")
    try:
        client = openai.OpenAI(
            api_key="none", base_url=f"http://127.0.0.1:{running.port}/v1", max_retries=0
        )
        answer = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7})
        for image, want in zip(answer.data, expected, strict=True):
            assert (pixels_of(image.b64_json) == want).all()
    finally:
        assert running.stop() == 0, running.log.read_text()


def test_a_runner_without_lookahead_is_refused_before_it_serves() -> None:
    from ssd_export.errors import UserError
    from ssd_export.runtime.generate import ImageGenerator
    from ssd_export.serve.generation import GeneratorBatches
    from ssd_export.serve.metrics import Metrics

    path = bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1)
    with ImageGenerator.from_bundle(path, num_threads=1) as generator:
        generator.runner.no_window = "one token a pass; use another runner"
        with pytest.raises(UserError, match="one token a pass"):
            GeneratorBatches(generator, Metrics(), 6)
        GeneratorBatches(generator, Metrics(), "auto").warm()


def test_a_key_is_asked_for_and_a_stop_finishes_what_was_accepted(tmp_path: Path) -> None:
    server = started(tmp_path, SSD_EXPORT_KEY="secret")
    request = {"prompt": PROMPT, "n": 2}
    assert server.ask("POST", "/v1/images/generations", request)[0] == 401
    assert server.ask("POST", "/v1/images/generations", request, Authorization="Bearer x")[0] == 401
    assert server.ask("GET", "/health")[0] == 200
    key = {"Authorization": "Bearer secret"}
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.ask, "POST", "/v1/images/generations", request, **key)
        while b"waiting" in server.ask("GET", "/health")[2] and not under_way.done():
            if b"ssd_queue_images 0" in server.ask("GET", "/metrics", **key)[2]:
                break
        assert server.stop() == 0
        assert under_way.result()[0] == 200 and len(json.loads(under_way.result()[2])["data"]) == 2


def test_an_open_address_needs_a_key() -> None:
    command = [sys.executable, "cli.py", "serve", "--host", "0.0.0.0"]
    environment = {k: v for k, v in os.environ.items() if k != "SSD_EXPORT_KEY"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "set SSD_EXPORT_KEY" in done.stderr
