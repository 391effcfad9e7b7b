"""The ssd-export command from a source checkout: python cli.py --help."""

from __future__ import annotations

import sys

try:
    from ssd_export.cli.main import main
except ModuleNotFoundError as error:
    if (error.name or "").startswith("ssd_export"):
        raise
    sys.exit(
        f"error: {error.name} is not installed for {sys.executable}; run `make demo` once and then "
        "`.venv/bin/python cli.py`, or `pip install -c constraints.txt -e '.[export,ort]'`"
    )

if __name__ == "__main__":
    main()
