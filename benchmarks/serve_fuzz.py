"""Requests made from the server's OpenAPI document, valid ones and broken ones: none may be a
failure of the server.

    python -m benchmarks.serve_fuzz BUNDLE [--requests 5000] [--out FILE.json]

Needs schemathesis (pip install "ssd-export[test]"). So that valid requests take no hours, the
server's queue is short and its time limit is two seconds: 429 and 504 are answers then, as in
earnest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from benchmarks.server_process import ServerProcess
from ssd_export.report.measurement import measurement, table, write_measurement

CLIENTS = 8
OPTIONS = ("--max-batch", "4", "--max-waiting", "8", "--timeout", "2", "--threads", "1")
CONFORMANCE = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@dataclass
class Answers:
    """Statuses by route, and what must not be."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        """Requests so far."""
        return sum(sum(counted.values()) for counted in self.statuses.values())

    def send(self, route: str, case: Any) -> None:
        """Sends a request and notes its answer."""
        failure, status = "", 0
        try:
            response = case.call()
            status = response.status_code
            if status == 500:
                failure = f"500: {response.text[:200]}"
            elif status >= 400:
                assert json.loads(response.content)["error"]["message"]
            case.validate_response(response, checks=CONFORMANCE)
        except (Exception, FailureGroup) as error:  # which is no Exception
            failure = failure or f"{type(error).__name__}: {str(error)[:500]}"
        with self.lock:
            self.statuses.setdefault(route, Counter())[status] += 1
            if failure:
                self.failures.append(f"{case.as_curl_command()[:500]} -> {failure}")


def fuzz(bundle: Path, num_requests: int) -> Answers:
    """Sends about that many requests: most to the routes that take parameters."""
    load_all_checks()
    answers = Answers()
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(bundle, Path(folder) / "log", *OPTIONS) as server,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        for operation in operations:
            send = partial(
                pool.submit, answers.send, f"{operation.method.upper()} {operation.path}"
            )
            if operation.body:  # nothing else has a request that is not valid
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    _send_examples(operation, mode, 2 * num_requests // 5, send)
            elif operation.path_parameters:
                _send_examples(operation, GenerationMode.POSITIVE, num_requests // 5, send)
            else:
                _send_examples(operation, GenerationMode.POSITIVE, 1, send)
        pool.shutdown()
        assert server.process.poll() is None, "the server ended"
    return answers


def _send_examples(
    operation: Any, mode: GenerationMode, count: int, send: Callable[[Any], Any]
) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send_each(case: Any) -> None:
        send(case)

    send_each()


def main() -> None:
    """Fuzzes and writes; exits with 1 where something must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/measurements/serve_fuzz.json"))
    asked = parser.parse_args()
    answers = fuzz(asked.bundle, asked.requests)
    rows = [
        [route, sum(counted.values()), ", ".join(f"{k}: {v}" for k, v in sorted(counted.items()))]
        for route, counted in sorted(answers.statuses.items())
    ]
    note = f"{answers.count} requests, {len(answers.failures)} failures."
    results = {
        "tables": [table("Answers", ["route", "requests", "by status"], rows, note)],
        "figures": {"requests": answers.count, "failures": len(answers.failures)},
    }
    command = f"python -m benchmarks.serve_fuzz BUNDLE --requests {asked.requests}"
    write_measurement(asked.out, measurement(command, results, asked.note))
    print(json.dumps(results, indent=1), *answers.failures[:20], sep="\n")
    raise SystemExit(bool(answers.failures))


if __name__ == "__main__":
    main()
