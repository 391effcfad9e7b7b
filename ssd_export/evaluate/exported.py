"""A bundle that lives as long as it is looked at: what a verb exports to compare policies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssd_export.export.exporter import ExportSpec, Progress, export_bundle


@dataclass(frozen=True)
class PolicyChoice:
    """A model under a policy; policy None: the model's default. model as `export --model` takes it."""

    model: str = "demo"
    policy: str | None = None
    budget: float = 0.2
    head_map: str | None = None
    dtype: str = "fp32"
    prompt_slots: int = 64

    def export_spec(self, out: Path | None = None) -> ExportSpec:
        return ExportSpec(
            model=self.model, policy=self.policy, budget=self.budget, window=None, evict_every=None, num_recent=None,
            num_sinks=None, head_map=self.head_map, groups=3, prompt_slots=self.prompt_slots, dtype=self.dtype,
            out=out, force=False,
        )  # fmt: skip


@contextmanager
def temporary_bundle(choice: PolicyChoice, progress: Progress = lambda stage, done, total: None) -> Iterator[Path]:
    """The folder of a bundle of this choice, gone when the block ends. Raises: UserError as export_bundle."""
    with tempfile.TemporaryDirectory(prefix="ssd-export-") as folder:
        yield export_bundle(choice.export_spec(Path(folder) / "bundle"), progress)
