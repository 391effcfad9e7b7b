"""Rung `operators`: the decode step that ONNX Runtime takes on a CPU where the library of operators
was built.
"""

from __future__ import annotations

from dataclasses import replace

from ssd_export.bundle import Bundle
from ssd_export.runtime.ort_operators import BUILD, find_operators
from ssd_export.runtime.ort_runner import OrtRunner
from ssd_export.verify.checks import Rung
from ssd_export.verify.generation import Ladder

NOT_BUILT = f"its library is not built, so no step uses it; {BUILD}"
ROUNDED = (
    "products with int8 and int4 weights round what they multiply to int8, and the reference does"
    " not; eval compares the images"
)


def check_operators(bundle: Bundle, ladder: Ladder, num_threads: int | None) -> Rung:
    """Compares slots, logits and draws of all steps with those of the ladder's reference."""
    if find_operators() is None:
        return Rung("operators", {"not_run": NOT_BUILT})
    precision = bundle.config.precision
    if {precision.weights, precision.head} & {"int8", "int4"}:
        return Rung("operators", {"not_run": ROUNDED})
    runner = OrtRunner(bundle, num_threads=num_threads, exact=True, uses_operators=True)
    try:
        return replace(ladder.with_subject(runner).logits(), name="operators")
    finally:
        runner.close()
