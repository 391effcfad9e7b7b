"""Many clients on one server for minutes: throughput, latency, memory, and every image compared
with a single run.

    python -m benchmarks.serve_soak BUNDLE [--clients 64] [--seconds 300] [--out FILE.json]

The seconds are cut into rounds. Between them, while the clients pause, the same machine measures
the bound (the generator alone in this process, full batches) and one client alone, so that ratios
compare what ran next to each other. Some clients leave before their answer. At the end SIGTERM
comes in the middle: every request that the server had must still be answered.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.server_process import IMAGES_PATH, ServerProcess, pixels_of
from ssd_export.noise import ImageSeed
from ssd_export.report.measurement import measurement, table, write_measurement
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import ImageRequest, bundle_sampling

ROUND_SECONDS = 60.0
PROMPTS = (
    {"prompt": "a red circle on white"},
    {"prompt": "a blue ring on sand", "temperature": 0.7},
    {"prompt": "a green square on white", "cfg_scale": 2.0},
    {"prompt": "a red circle on white", "cfg_scale": 2.0, "negative_prompt": "a blue ring on sand"},
)
SEEDS = range(4)
SHARE_THAT_LEAVES = 0.05
BOUND_SECONDS, ALONE_SECONDS = 15.0, 10.0  # of each round
HEAD_START_SECONDS = 1.0  # a request sent so long before SIGTERM is the server's


@dataclass
class Tally:
    """Counts of what happened to the requests of all clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    left: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)


class Clients:
    """Threads that ask one after the other while they may, and pause when told to."""

    def __init__(self, server: ServerProcess, count: int, expected: dict[str, np.ndarray]) -> None:
        self.tally = Tally()
        self._server, self._expected = server, expected
        self._may_ask, self._is_over = threading.Event(), False
        self._in_flight: dict[int, float] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, seconds: float) -> None:
        """Lets the clients ask for that long, then waits for the answers under way."""
        self._may_ask.set()
        time.sleep(seconds)
        self._may_ask.clear()
        while self._in_flight:
            time.sleep(0.02)

    def run_into(self, stop: Any) -> None:
        """Calls stop while all clients have a request under way, and waits for their ends."""
        self._may_ask.set()
        time.sleep(5 * HEAD_START_SECONDS)
        self._is_over, self._stopped_at = True, time.monotonic()
        stop()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        chance = random.Random(number)
        while not self._is_over:
            self._may_ask.wait()
            if self._is_over:
                return
            body = {**chance.choice(PROMPTS), "seed": chance.choice(SEEDS), "user": str(number)}
            leaves = chance.random() < SHARE_THAT_LEAVES
            self._in_flight[number] = began = time.monotonic()
            try:
                self._leave(body, chance) if leaves else self._ask(body, began)
            except OSError as error:
                self._note_failure(began, error)
            finally:
                del self._in_flight[number]

    def _ask(self, body: dict[str, Any], began: float) -> None:
        status, _, content = self._server.ask("POST", IMAGES_PATH, body)
        seconds, tally = time.monotonic() - began, self.tally
        with tally.lock:
            if status in (429, 503):
                tally.refused += 1
            elif status != 200:
                tally.failed.append(f"{status} {content[:200]!r}")
            else:
                tally.latencies.append(seconds)
                image = pixels_of(json.loads(content)["data"][0]["b64_json"])
                tally.wrong += not np.array_equal(image, self._expected[key(body)])

    def _leave(self, body: dict[str, Any], chance: random.Random) -> None:
        connection = self._server.connect()
        content = json.dumps({**body, "stream": True, "partial_images": 3})
        connection.request("POST", IMAGES_PATH, content, {"Content-Type": "application/json"})
        time.sleep(chance.random())
        connection.close()
        with self.tally.lock:
            self.tally.left += 1

    def _note_failure(self, began: float, error: OSError) -> None:
        is_late = self._is_over and self._stopped_at - began < HEAD_START_SECONDS
        with self.tally.lock:
            if is_late:
                self.tally.refused += 1
            else:
                self.tally.failed.append(f"{type(error).__name__}: {error}")


def key(body: dict[str, Any]) -> str:
    """The part of a body that an image depends on."""
    return json.dumps({k: v for k, v in sorted(body.items()) if k != "user"})


class Alone:
    """The generator without a server, in this process."""

    def __init__(self, bundle: Path, batch: int) -> None:
        self._generator = ImageGenerator.from_bundle(bundle, num_threads=1)
        self._sampling = bundle_sampling(self._generator.bundle)
        self._batch = batch

    def expected(self) -> dict[str, np.ndarray]:
        """Pixels of each image that the clients ask for, generated by itself."""
        images = {}
        for seed in SEEDS:
            for prompt in PROMPTS:
                body = {**prompt, "seed": seed}
                images[key(body)] = self._images([self._request(body)])[0]
        return images

    def bound(self, seconds: float) -> tuple[int, float, float]:
        """(images, wall seconds, CPU seconds) of full batches, PNG files left out."""
        bodies = [{**PROMPTS[i % len(PROMPTS)], "seed": i} for i in range(self._batch)]
        requests = [self._request(body) for body in bodies]
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < seconds:
            count += len(self._images(requests))
        return count, time.perf_counter() - wall, time.process_time() - cpu

    def _request(self, body: dict[str, Any]) -> ImageRequest:
        sampling = self._sampling.changed(body.get("cfg_scale"), body.get("temperature"))
        seed = ImageSeed(body["seed"], 0)
        return ImageRequest(body["prompt"], sampling, seed, body.get("negative_prompt", ""))

    def _images(self, requests: list[ImageRequest]) -> list[np.ndarray]:
        *_, last = self._generator.stream_requests(requests)
        return [np.asarray(last.images[place]) for place in range(len(requests))]


@dataclass
class Round:
    """Images a second by wall and by CPU time (of the process that generates), and memory."""

    bound: float
    bound_cpu: float
    together: float
    together_cpu: float
    alone: float
    memory_bytes: float


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_round(
    server: ServerProcess, clients: Clients, alone: Alone, single: Clients, seconds: float
) -> Round:
    """The bound, all clients, then one client alone."""
    images, wall, cpu = alone.bound(BOUND_SECONDS)
    bound, bound_cpu = images / wall, images / cpu
    before, began = len(clients.tally.latencies), time.perf_counter()
    cpu_before = cpu_seconds(server.process.pid)
    clients.run(seconds)
    made, wall = len(clients.tally.latencies) - before, time.perf_counter() - began
    together_cpu = made / (cpu_seconds(server.process.pid) - cpu_before)
    before, began = len(single.tally.latencies), time.perf_counter()
    single.run(ALONE_SECONDS)
    alone_rate = (len(single.tally.latencies) - before) / (time.perf_counter() - began)
    memory = server.metric("process_resident_memory_bytes")
    return Round(bound, bound_cpu, made / wall, together_cpu, alone_rate, memory)


def soak(bundle: Path, num_clients: int, seconds: float, batch: int) -> dict[str, Any]:
    """The results of a measurement; figures say what must hold."""
    with tempfile.TemporaryDirectory() as folder:
        alone = Alone(bundle, batch)
        expected = alone.expected()
        options = ("--max-batch", str(batch), "--max-waiting", str(2 * num_clients))
        log = Path(folder) / "server.log"
        with ServerProcess(bundle, log, *options, "--threads", "1") as server:
            clients, single = Clients(server, num_clients, expected), Clients(server, 1, expected)
            clients.run(10)  # warm
            clients.tally.latencies.clear()
            count = max(1, round(seconds / ROUND_SECONDS))
            rounds = [
                one_round(server, clients, alone, single, seconds / count) for _ in range(count)
            ]
            while server.metric("ssd_queue_images"):
                time.sleep(0.1)
            latencies = sorted(clients.tally.latencies)
            cancelled = server.metric('ssd_images_total{end="cancelled"}')
            clients.tally.left += single.tally.left
            clients.run_into(lambda: server.process.send_signal(signal.SIGTERM))
            code = server.process.wait(60)
        return results(rounds, clients.tally, latencies, cancelled, code)


def results(
    rounds: list[Round], tally: Tally, latencies: list[float], cancelled: float, code: int
) -> dict[str, Any]:
    """Tables and figures."""
    middle = {
        name: statistics.median(getattr(one, name) for one in rounds) for name in vars(rounds[0])
    }
    share = statistics.median(one.together / one.bound for one in rounds)
    share_cpu = statistics.median(one.together_cpu / one.bound_cpu for one in rounds)
    mib = [round(one.memory_bytes / 2**20, 1) for one in rounds]
    rows = [
        ["images a second: the generator alone, full batches", round(middle["bound"], 2)],
        ["images a second: all clients", round(middle["together"], 2)],
        ["images a second: one client", round(middle["alone"], 2)],
        ["all clients against the generator alone, wall time", f"{100 * share:.0f} %"],
        ["all clients against the generator alone, CPU time", f"{100 * share_cpu:.0f} %"],
        ["all clients against one", f"{middle['together'] / middle['alone']:.2f} times"],
        ["latency, median", f"{percentile(latencies, 0.5):.1f} s"],
        ["latency, 95 of 100", f"{percentile(latencies, 0.95):.1f} s"],
        ["resident memory after each round, MiB", ", ".join(map(str, mib))],
        ["images compared with single runs", len(tally.latencies)],
        ["images that differ", tally.wrong],
        ["clients that left before their answer", tally.left],
        ["images given back by them", int(cancelled)],
        ["requests that failed, those under way at SIGTERM included", len(tally.failed)],
        ["exit code after SIGTERM", code],
    ]
    figures = {
        "share": f"{100 * share:.0f} %",
        "share_cpu": f"{100 * share_cpu:.0f} %",
        "times_one": f"{middle['together'] / middle['alone']:.2f}",
        "p50": f"{percentile(latencies, 0.5):.1f} s",
        "p95": f"{percentile(latencies, 0.95):.1f} s",
        "images": len(tally.latencies),
        "wrong": tally.wrong,
        "failed": len(tally.failed),
    }
    note = "; ".join(tally.failed[:3])
    each = "Medians of the rounds; ratios are of what ran within a round."
    return {
        "tables": [table("Clients at the same time", ["what", "measured"], rows, each)],
        "figures": figures,
        **({"failures": note} if note else {}),
    }


def percentile(values: list[float], share: float) -> float:
    """The value that this share is not above."""
    return values[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Runs the soak and writes its measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/serve_soak.json"))
    asked = parser.parse_args()
    found = soak(asked.bundle, asked.clients, asked.seconds, asked.batch)
    command = f"python -m benchmarks.serve_soak BUNDLE --clients {asked.clients}"
    command += f" --seconds {asked.seconds:g} --batch {asked.batch}"
    write_measurement(asked.out, measurement(command, found, asked.note))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
