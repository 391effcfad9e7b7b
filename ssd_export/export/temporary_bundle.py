"""A bundle that lives as long as it is looked at: what a verb exports to compare policies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssd_export.export.exporter import ExportSpec, Progress, export_bundle
from ssd_export.policy.presets import DEFAULT_GROUPS


@dataclass(frozen=True)
class PolicyChoice:
    """A model under a policy, as `export` takes them. None: the model's default policy, the
    policy's or the family's own number.
    """

    model: str = "demo"
    policy: str | None = None
    budget: float = 0.2
    head_map: str | None = None
    dtype: str = "fp32"
    prompt_slots: int | None = None
    window: int | None = None
    evict_every: int | None = None
    num_recent: int | None = None
    num_sinks: int | None = None
    groups: int = DEFAULT_GROUPS
    lookahead: int | None = None
    weights: str = "none"
    head_weights: str | None = None
    kv_dtype: str = "model"

    def export_spec(self, out: Path | None = None) -> ExportSpec:
        """The export of this choice to a folder."""
        return ExportSpec(
            model=self.model,
            policy=self.policy,
            budget=self.budget,
            window=self.window,
            evict_every=self.evict_every,
            num_recent=self.num_recent,
            num_sinks=self.num_sinks,
            head_map=self.head_map,
            groups=self.groups,
            lookahead=self.lookahead,
            prompt_slots=self.prompt_slots,
            dtype=self.dtype,
            out=out,
            force=False,
            weights=self.weights,
            head_weights=self.head_weights,
            kv_dtype=self.kv_dtype,
        )


@contextmanager
def temporary_bundle(
    choice: PolicyChoice, progress: Progress = lambda stage, done, total: None
) -> Iterator[Path]:
    """The folder of a bundle of this choice, gone when the block ends. Raises: UserError as
    export_bundle.
    """
    with tempfile.TemporaryDirectory(prefix="ssd-export-") as folder:
        yield export_bundle(choice.export_spec(Path(folder) / "bundle"), progress)
