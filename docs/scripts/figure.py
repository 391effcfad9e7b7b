"""The figure of the README and of docs/architecture.md: heads, groups, slots, graph, bundle,
runners.

    python -m docs.scripts.figure

Writes docs/images/pipeline.svg. The heads are those of the demo model: their types come from
ssd_export/demo/checkpoint/head_map.json. Colors follow the reader's light or dark scheme, on a card
that has a background, so that a page of the other scheme shows it readable too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "images" / "pipeline.svg"
HEAD_MAP = ROOT / "ssd_export" / "demo" / "checkpoint" / "head_map.json"
WIDTH, HEIGHT = 920, 476
PANEL_WIDTH, PANEL_HEIGHT = 284, 218
COLUMNS, ROWS = (14, 318, 622), (14, 244)
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
         fill: #24292f }
  .title { font-weight: 600; font-size: 16px }
  .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12px }
  .small { font-size: 11px } .note { fill: #57606a } .middle { text-anchor: middle }
  .card { fill: #ffffff } .panel { fill: #f6f8fa; stroke: #d0d7de }
  .box { fill: #ffffff; stroke: #8c959f } .line { fill: none; stroke: #57606a; stroke-width: 1.6 }
  .tip { fill: #57606a }
  .window { fill: #4c9be8 } .ranked { fill: #e8894c } .prompt { fill: #8c959f }
  .empty { fill: none; stroke: #8c959f; stroke-dasharray: 2 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9da7b3 }
    .card { fill: #0d1117 } .panel { fill: #161b22; stroke: #30363d }
    .box { fill: #0d1117; stroke: #6e7681 } .line { stroke: #9da7b3 } .tip { fill: #9da7b3 }
    .empty { stroke: #6e7681 }
  }
"""


def _classes(kinds: str) -> str:
    return f' class="{kinds}"' if kinds else ""


def text(x: float, y: float, words: str, kinds: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{_classes(kinds)}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kinds: str, opacity: float = 1) -> str:
    faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} rx="3"{_classes(kinds)}{faint}/>'


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A straight arrow to the right or down; its tip ends at (x1, y1)."""
    tip = f"M{x1:g} {y1:g} l-7 -4 v8 z" if x1 > x0 else f"M{x1:g} {y1:g} l-4 -7 h8 z"
    return f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" class="line"/><path d="{tip}" class="tip"/>'


def panel(column: int, row: int, number: int, title: str, notes: Sequence[str], body: str) -> str:
    """A titled frame; the body is drawn from the panel's own corner, the notes below it."""
    inside = [
        box(0, 0, PANEL_WIDTH, PANEL_HEIGHT, "panel"),
        text(14, 26, f"{number}  {title}", "title"),
        body,
        *(
            text(14, PANEL_HEIGHT - 12 - 17 * (len(notes) - 1 - index), line, "note")
            for index, line in enumerate(notes)
        ),
    ]
    return f'<g transform="translate({COLUMNS[column]} {ROWS[row]})">{"".join(inside)}</g>'


def head_types(path: Path = HEAD_MAP) -> list[list[bool]]:
    """Whether each head is semantic, by layer."""
    head_map = json.loads(path.read_text(encoding="utf-8"))
    return [[metric > head_map["threshold"] for metric in layer] for layer in head_map["metric"]]


def heads(types: Sequence[Sequence[bool]]) -> str:
    parts = [
        box(62 + 30 * place, 42 + 20 * layer, 26, 16, "ranked" if semantic else "window")
        for layer, row in enumerate(types)
        for place, semantic in enumerate(row)
    ]
    parts += [
        text(14, 55, "layer 0", "small note"),
        text(14, 155, f"layer {len(types) - 1}", "small note"),
    ]
    parts += [box(196, 44, 12, 12, "window"), text(213, 54, "spatial", "small")]
    parts += [box(196, 64, 12, 12, "ranked"), text(213, 74, "semantic", "small")]
    return "".join(parts)


def groups(types: Sequence[Sequence[bool]]) -> str:
    parts = []
    for layer, row in enumerate(types):
        x = 14.0
        for semantic in (False, True):
            count = sum(head is semantic for head in row)
            if count:
                width = 30 * count - 4
                kind = "ranked" if semantic else "window"
                parts.append(box(x, 42 + 20 * layer, width, 16, kind))
                x += width + 14
    parts += [box(166, 44, 12, 12, "window"), text(183, 54, "window group", "small")]
    parts += [box(166, 64, 12, 12, "ranked"), text(183, 74, "ranked group", "small")]
    return "".join(parts)


def slots() -> str:
    prompt, empty = [("prompt", 1.0)] * 4, [("empty", 1.0)]
    window = [*prompt, *[("window", 1.0)] * 5, *empty]
    scores = [("ranked", score) for score in (0.95, 0.4, 0.75, 0.3, 1.0, 0.55)]
    ranked = [*prompt, *scores, *[("ranked", 1.0)] * 3, *empty * 3]
    parts = [
        text(14, 53, "window group: prompt and newest tokens", "small"),
        *_strip(60, window),
        text(14, 103, "ranked group: and those attended to most", "small"),
        *_strip(110, ranked),
    ]
    for middle, words in ((44, "prompt"), (124, "by score"), (198, "recent"), (246, "empty")):
        parts.append(text(middle, 148, words, "small note middle"))
    return "".join(parts)


def _strip(y: float, cells: Sequence[tuple[str, float]]) -> list[str]:
    return [box(14 + 16 * place, y, 13, 22, *cell) for place, cell in enumerate(cells)]


def graph() -> str:
    parts = [
        box(84, 44, 116, 30, "box"),
        text(142, 63, "decode_step", "code middle"),
        box(84, 104, 116, 42, "box"),
        text(142, 121, "keys, values,", "small middle"),
        text(142, 137, "positions, scores", "small middle"),
        '<path d="M84 59 H58 V125 H76" class="line"/><path d="M84 125 l-8 -4 v8 z" class="tip"/>',
        '<path d="M200 125 H226 V59 H208" class="line"/><path d="M200 59 l8 -4 v8 z" class="tip"/>',
        text(14, 96, "present", "small note"),
        text(234, 96, "past", "small note"),
    ]
    return "".join(parts)


def bundle() -> str:
    files = (
        "onnx/*.onnx",
        "onnx/weights.safetensors",
        "ssd_config.json  policy table",
        "head_map.json  tokenizer.json",
        "manifest.json  sha256 of each",
        "engines/  TensorRT",
    )
    return box(14, 38, 256, 122, "box") + "".join(
        text(26, 58 + 18 * index, line, "code") for index, line in enumerate(files)
    )


def runners() -> str:
    names = ("torch", "ONNX Runtime", "TensorRT", "C++")
    parts = [
        box(14, 38 + 32 * index, 122, 26, "box") + text(75, 56 + 32 * index, name, "middle")
        for index, name in enumerate(names)
    ]
    parts += [
        arrow(142, 99, 166, 99),
        '<rect x="174" y="51" width="96" height="96" rx="3" fill="#e9e2d0"/>',
        '<circle cx="222" cy="82" r="20" fill="#d64545"/>',
        '<rect x="203" y="108" width="38" height="30" fill="#3f6fd1"/>',
    ]
    return "".join(parts)


def figure() -> str:
    """The whole SVG document."""
    types = head_types()
    layers, width = len(types), len(types[0])
    panels = [
        panel(
            0,
            0,
            1,
            "Heads",
            (
                f"calibrate: which of the {layers} x {width} look",
                "nearby, and which at the whole image",
            ),
            heads(types),
        ),
        panel(
            1,
            0,
            2,
            "Groups",
            ("heads permuted in the weights:", "a group is a slice with one rule"),
            groups(types),
        ),
        panel(
            2,
            0,
            3,
            "Slots",
            ("a fixed number for each head;", "evict writes -1, nothing moves"),
            slots(),
        ),
        panel(
            0,
            1,
            4,
            "Graph",
            ("a step writes one row into each cache,", "in place; evict edits integers alone"),
            graph(),
        ),
        panel(
            1, 1, 5, "Bundle", ("one folder that every runner reads,", "whole or absent"), bundle()
        ),
        panel(
            2, 1, 6, "Runners", ("the same tokens from the same seed", "on each of them"), runners()
        ),
    ]
    middle = ROWS[0] + PANEL_HEIGHT / 2
    links = [
        arrow(
            COLUMNS[column] + PANEL_WIDTH + 3,
            middle + below,
            COLUMNS[column + 1] - 3,
            middle + below,
        )
        for below in (0, ROWS[1] - ROWS[0])
        for column in (0, 1)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' aria-label="Heads are sorted into groups, groups have slots, a graph updates them, a'
        " bundle"
        ' holds the graphs, and runners generate the same image from it">'
        f"<style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="card"/>'
        f"{''.join(panels)}{''.join(links)}</svg>\n"
    )


if __name__ == "__main__":
    FIGURE.write_text(figure(), encoding="utf-8")
    print(f"written: {FIGURE.relative_to(ROOT)}")
