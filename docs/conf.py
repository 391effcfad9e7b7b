"""Sphinx configuration of the site: `make docs`, which fails on a warning.

The source folder is the repository, so README.md, the plugin's and the demo model's pages belong to
the site, and a link between files is the same here as on a code host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

project = "ssd-export"
copyright = "ssd-export maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "plugins/README.md",
    "engines/README.md",
    "ssd_export/demo/checkpoint/README.md",
    "ssd_export/demo/class_checkpoint/README.md",
]

html_theme = "furo"
html_title = "ssd-export"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page generated in parts may skip a heading level

# Signatures and docstrings are read from the sources' own objects; what an export needs is not
# installed.
autodoc_mock_imports = ["huggingface_hub", "onnx", "onnx_ir", "onnxruntime", "safetensors", "torch"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "class"


def redirect_from_the_root(app: Any, exception: Exception | None) -> None:
    """index.html at the top of the site leads to the first page."""
    if exception is None and app.builder.format == "html":
        target = f"{root_doc}.html"
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={target}">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("build-finished", redirect_from_the_root)
