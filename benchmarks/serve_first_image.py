"""Time to the first partial image over HTTP, against the generator alone.

    python -m benchmarks.serve_first_image BUNDLE [--rounds 40] [--out FILE.json]

Every round asks the generator in this process for its first grid row as a PNG file, then an idle
server for its first partial image, so that both meet the same machine. Then the page is asked, in
Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.browser import generate, open_page
from benchmarks.server_process import IMAGES_PATH, ServerProcess
from ssd_export.noise import ImageSeed
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import ImageRequest, bundle_sampling

PROMPT = "a red circle on white"
PARTIAL_IMAGES = 23  # one a grid row, as the page asks
PAUSE_SECONDS = 0.2  # so that the request before is cancelled


def generator_ms(generator: ImageGenerator, seed: int) -> float:
    """The first row of an image as PNG, without a server."""
    request = ImageRequest(PROMPT, bundle_sampling(generator.bundle), ImageSeed(seed, 0))
    began = time.perf_counter()
    with closing(generator.stream_requests([request], lambda *_: True)) as rows:
        next(rows).images[0].save(io.BytesIO(), format="png")
        return 1e3 * (time.perf_counter() - began)


def server_ms(server: ServerProcess, seed: int) -> float:
    """The first partial image of a request over a new connection; the client then leaves."""
    body = {"prompt": PROMPT, "seed": seed, "stream": True, "partial_images": PARTIAL_IMAGES}
    began, connection = time.perf_counter(), server.connect()
    connection.request("POST", IMAGES_PATH, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while not answer.readline().startswith(b"data: "):
        pass
    took = 1e3 * (time.perf_counter() - began)
    answer.close()
    connection.close()
    time.sleep(PAUSE_SECONDS)
    return took


def page_ms(server: ServerProcess, rounds: int) -> list[float]:
    """Milliseconds from the click to the first partial image, as the page says it; images are
    finished.
    """
    with open_page(server.port) as page:
        generate(page, PROMPT, 0)
        return [float(generate(page, PROMPT, seed)) for seed in range(1, rounds + 1)]


def measure(bundle: Path, rounds: int) -> dict[str, Any]:
    """The results of a measurement."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(bundle, Path(folder) / "log", "--threads", "1") as server,
        ImageGenerator.from_bundle(bundle, num_threads=1) as generator,
    ):
        first = server_ms(server, 0)
        generator_ms(generator, 0)
        pairs = [(generator_ms(generator, seed), server_ms(server, seed)) for seed in range(rounds)]
        in_page = page_ms(server, rounds // 2)
    alone, served = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(over / bare for bare, over in pairs)
    rows = [
        ["the generator alone", *map(shown, (median(alone), worst(alone)))],
        ["over HTTP", *map(shown, (median(served), worst(served)))],
        ["in the page (Chromium)", *map(shown, (median(in_page), worst(in_page)))],
        ["the first request after the start", shown(first), None],
    ]
    note = f"{rounds} rounds in turns; median of over HTTP / alone: {ratio:.2f}."
    columns = ["first grid row as an image", "median, ms", "95 of 100 within, ms"]
    figures = {
        "alone": shown(median(alone)),
        "served": shown(median(served)),
        "served_p95": shown(worst(served)),
        "first": shown(first),
        "page": shown(median(in_page)),
        "page_p95": shown(worst(in_page)),
        "ratio": f"{ratio:.2f}",
    }
    return {"tables": [table("First partial image", columns, rows, note)], "figures": figures}


median: Callable[[list[float]], float] = statistics.median


def worst(values: list[float]) -> float:
    """The bound that 95 of 100 values are within."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def shown(value: float) -> str:
    """Milliseconds."""
    return f"{value:.0f}"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--note", default="")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/measurements/serve_first_image.json")
    )
    asked = parser.parse_args()
    found = measure(asked.bundle, asked.rounds)
    command = f"python -m benchmarks.serve_first_image BUNDLE --rounds {asked.rounds}"
    write_measurement(asked.out, measurement(command, found, asked.note))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
