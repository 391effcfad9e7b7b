"""A report of verify in lines that can be read: what each rung compared, how far apart it was, and
what was allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Figures = dict[str, Any]


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    """One line for each rung, the first difference under the one that failed, the verdict last."""
    for rung in report["rungs"]:
        verdict = "ok    " if rung["ok"] else "FAILED"
        yield f"{verdict} {rung['name']:11} {_sentence(rung, report)}".rstrip()
        if not rung["ok"]:
            yield f"       {rung['first_divergence']['text']}"
    if report["not_run"]:
        yield f"not run: {', '.join(report['not_run'])}"
    verdict = "verified" if report["ok"] else "NOT verified"
    names = {
        "ort": "ONNX Runtime",
        "torch": "torch",
        "trt": "TensorRT",
        "checkpoint": "the checkpoint in torch",
    }
    runner, against = (names.get(report[key], report[key]) for key in ("runner", "against"))
    yield (
        f"{verdict}: {runner} against {against}, {report['dtype']}, policy {report['policy']}, seed"
        f" {report['seed']}"
    )


def _sentence(rung: dict[str, Any], report: dict[str, Any]) -> str:
    """A sentence on what a rung that passed has proved, or on the figures of one that failed."""
    if rung["ok"] and "skipped" not in rung["figures"]:
        return _SENTENCES[rung["name"]](rung["figures"], report["tolerances"])
    figures = {
        name: value
        for name, value in rung["figures"].items()
        if not isinstance(value, (list, dict))
    }
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items())


def _contract(figures: Figures, tolerances: Figures) -> str:
    heads = "; every head is where the head map puts it" if figures["head_map"] else ""
    return f"{len(figures['graphs'])} graphs take and give what the policy promises{heads}"


def _compression(figures: Figures, tolerances: Figures) -> str:
    slots = sorted({group["slots"] for group in figures["groups"]})
    span = str(slots[0]) if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
    return (
        f"allocated {figures['bytes_allocated']:,} bytes, as promised; a full cache has"
        f" {figures['bytes_full_cache']:,}. {figures['image_slots_mean']:.1f} image slots a head on"
        f" average, {figures['image_share_of_full_cache']:.3f} of a full cache's image bytes;"
        f" {span} slots with the prompt's"
    )


def _ops(figures: Figures, tolerances: Figures) -> str:
    evict = " and the evict graph follow" if figures["evict_graph"] else " follow"
    return (
        f"{figures['functions']} attention functions{evict} the cache's rules;"
        f" {_error(figures, tolerances['op'])}"
    )


def _origin(figures: Figures, tolerances: Figures) -> str:
    return f"{', '.join(figures['files'])} and the sampling defaults are the checkpoint's"


def _weights(figures: Figures, tolerances: Figures) -> str:
    return f"{figures['tensors']} tensors are the checkpoint's"


def _layers(figures: Figures, tolerances: Figures) -> str:
    return (
        f"keys, values, positions and scores over {figures['steps']} steps;"
        f" {_error(figures, tolerances['cache'])}"
    )


def _logits(figures: Figures, tolerances: Figures) -> str:
    ties, draws, evicted = (
        figures["steps_with_ties"],
        figures["border_draws"],
        figures["tokens_evicted_by_row"],
    )
    rounding = (
        f" but for rounding ({ties} steps with equal scores, {draws} draws at a border)"
        if ties or draws
        else ""
    )
    span = str(evicted[0]) if len(set(evicted)) == 1 else f"{min(evicted)} to {max(evicted)}"
    return (
        f"{figures['steps']} steps, the same slots and tokens{rounding};"
        f" {_error(figures, tolerances['logits'])}; {span} tokens evicted a row, as the policy says"
    )


def _tokens(figures: Figures, tolerances: Figures) -> str:
    parted = figures.get("rounding_parts_them_at_step")
    where = f"; rounding parts them at step {', '.join(map(str, parted))}" if parted else ""
    ranked = f"; {figures['top_k_steps']} steps with top-k" if "top_k_steps" in figures else ""
    if "top_k_not_run" in figures:
        ranked = f"; top-k not run: {figures['top_k_not_run']}"
    return f"generated alone, {100 * figures['agreement']:.4g} % are equal{where}{ranked}"


def _image(figures: Figures, tolerances: Figures) -> str:
    return (
        f"PSNR {figures['psnr']:.1f} dB (at least {tolerances['min_psnr']:g}), "
        f"SSIM {figures['ssim']:.4f} (at least {tolerances['min_ssim']:g})"
    )


def _operators(figures: Figures, tolerances: Figures) -> str:
    if "not_run" in figures:
        return f"not run: {figures['not_run']}"
    return f"one operator a layer: {_logits(figures, tolerances)}"


def _int8_decoder(figures: Figures, tolerances: Figures) -> str:
    if "not_run" in figures:
        return f"not run: {figures['not_run']}"
    return f"PSNR {figures['psnr']:.1f} dB from the float decoder (at least {figures['least']:g})"


def _error(figures: Figures, allowed: float) -> str:
    return f"greatest error {figures['greatest_error']:.2g}, allowed {allowed:g}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_SENTENCES: dict[str, Callable[[Figures, Figures], str]] = {
    "contract": _contract,
    "compression": _compression,
    "ops": _ops,
    "origin": _origin,
    "weights": _weights,
    "layers": _layers,
    "logits": _logits,
    "tokens": _tokens,
    "image": _image,
    "operators": _operators,
    "int8_decoder": _int8_decoder,
}
