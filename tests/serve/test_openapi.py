"""A short run of benchmarks/serve_fuzz.py: requests from the OpenAPI document, none a failure."""

from __future__ import annotations

import pytest

from tests.janus_checkpoints import TinyJanus
from tests.runtime.checkpoints import bundle, checkpoint

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install ssd-export[serve]")
pytest.importorskip("schemathesis", reason="needs schemathesis: pip install ssd-export[test]")


@pytest.mark.slow
def test_no_request_that_the_document_allows_or_forbids_is_a_failure() -> None:
    from benchmarks.serve_fuzz import fuzz

    answers = fuzz(bundle(checkpoint(TinyJanus(seed=3, num_kv_heads=2)), "h2o", 0.2), 50)
    assert not answers.failures
    assert answers.count >= 50
    images = answers.statuses["POST /v1/images/generations"]
    assert images[400] and sum(images.values()) == 40
