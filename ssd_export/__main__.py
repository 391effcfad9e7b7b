"""The ssd-export command: python -m ssd_export --help."""

from __future__ import annotations

from ssd_export.cli.main import main

if __name__ == "__main__":
    main()
