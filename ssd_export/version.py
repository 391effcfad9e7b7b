"""The version of this tool, as bundles and reports carry it; pyproject.toml reads it from here."""

TOOL_VERSION = "0.1.0"
