"""Takes docs/images/serve.png: the server's page after two images of the demo model.

python -m docs.scripts.page_screenshot BUNDLE
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.browser import generate, open_page
from benchmarks.server_process import ServerProcess

OUT = Path(__file__).parents[1] / "images" / "serve.png"
VIEWPORT = {"width": 900, "height": 1000}


def main() -> None:
    """Takes the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="of the demo model")
    bundle = parser.parse_args().bundle
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(bundle.resolve(), Path(folder) / "log") as server,
        open_page(server.port, color_scheme="light", viewport=VIEWPORT) as page,
    ):
        generate(page, "a blue ring on sand", 7)
        generate(page, "a red circle above a blue square on white", 1)
        page.screenshot(path=OUT)


if __name__ == "__main__":
    main()
