"""From a checkpoint to a bundle: the policy is settled first, then weights, then graphs, then the contracts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from ssd_export.bundle import write_bundle, write_config
from ssd_export.cache.allocation import allocate
from ssd_export.cache.head_map import HeadMap, find_head_map
from ssd_export.cache.policy import make_policy, needs_head_map
from ssd_export.cache.table import PolicyTable
from ssd_export.config import NUM_IMAGE_TOKENS, ModelConfig
from ssd_export.errors import UserError
from ssd_export.export.graphs import evict_spec
from ssd_export.export.image_decoder_writer import write_image_decoder
from ssd_export.export.onnx_writer import GraphWriter, write_decode_step, write_evict, write_prefill
from ssd_export.export.weights import WEIGHTS_FILE, Weight, plan_weights, write_weights
from ssd_export.model.checkpoint import EMBED_TOKENS, Checkpoint, open_checkpoint
from ssd_export.specs import GraphSpec

DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "checkpoint"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_GENERATION = {"cfg_scale": 5.0, "temperature": 1.0}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportSpec:
    """What to export and how; None leaves a number to the policy. Paths and names as a user gives them."""

    model: str
    policy: str | None
    budget: float
    window: int | None
    evict_every: int | None
    num_recent: int | None
    num_sinks: int | None
    head_map: str | None
    groups: int
    prompt_slots: int
    dtype: str
    out: Path | None
    force: bool


def export_bundle(spec: ExportSpec, progress: Progress = lambda stage, done, total: None) -> Path:
    """Writes the bundle of a spec, whole or not at all, and returns its folder.

    Raises: UserError for a checkpoint, policy, head map or output folder that will not do; nothing is left behind.
    """
    name, folder = model_folder(spec.model)
    checkpoint = open_checkpoint(folder)
    table, head_map = settle_policy(spec, checkpoint, folder)
    out = spec.out or Path("bundles") / f"{name}-{table.name}-b{table.budget:g}-{spec.dtype}"
    with write_bundle(out, spec.force) as partial:
        _write_files(partial, name, spec, checkpoint, table, head_map, progress)
    return out


def model_folder(model: str) -> tuple[str, Path]:
    """A short name and the checkpoint's folder for `demo`, a folder, or a hub's owner/name."""
    if model == "demo":
        if not DEMO_CHECKPOINT.is_dir():
            raise UserError(f"the demo checkpoint is missing from this installation ({DEMO_CHECKPOINT}); install ssd-export again")
        return "demo", DEMO_CHECKPOINT
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve().name.lower(), folder
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model.split("/")[1].lower(), _download(model)
    raise UserError(f"no checkpoint at {model}: give a folder with config.json and the weights, a hub id such as "
                    "deepseek-community/Janus-Pro-1B, or demo")  # fmt: skip


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.bin"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the library raises a dozen kinds: no network, no such model, no permission, no space
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"could not download {hub_id} ({reason}); get its *.json and weight files by hand and give their "
                        "folder as --model") from error  # fmt: skip


def settle_policy(spec: ExportSpec, checkpoint: Checkpoint, folder: Path) -> tuple[PolicyTable, HeadMap | None]:
    """The policy table, and the head map it stands on where it tells heads apart."""
    config = checkpoint.config
    needed = spec.prompt_slots + NUM_IMAGE_TOKENS
    if needed > config.max_positions:
        raise UserError(f"{spec.prompt_slots} prompt slots and {NUM_IMAGE_TOKENS} image tokens are more than the model's "
                        f"{config.max_positions} positions; use --prompt-slots {config.max_positions - NUM_IMAGE_TOKENS} or less")  # fmt: skip
    head_map = allocation = None
    if spec.policy is None or needs_head_map(spec.policy):
        head_map = find_head_map(config, spec.head_map, checkpoint.fingerprint(), folder)
    asked = {name: getattr(spec, name) for name in ("window", "evict_every", "num_recent", "num_sinks")}
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value is not None]
    has_costs = head_map is not None and bool(head_map.cost_options)
    policy = spec.policy or ("ssd-auto" if has_costs and not given else "ssd-row")
    if policy == "ssd-auto" and given:
        raise UserError(f"ssd-auto chooses what {given[0]} sets; drop it, or use --policy ssd-row")
    if policy == "ssd-auto" and has_costs and spec.budget < 1:
        allocation = allocate(head_map, spec.budget, spec.groups).heads
    table = make_policy(
        policy, config, budget=spec.budget, prompt_slots=spec.prompt_slots, head_map=head_map, groups=spec.groups,
        allocation=allocation, **asked,
    )  # fmt: skip
    return table, head_map


def _write_files(
    folder: Path, name: str, spec: ExportSpec, checkpoint: Checkpoint, table: PolicyTable, head_map: HeadMap | None,
    progress: Progress,
) -> None:  # fmt: skip
    (folder / "onnx").mkdir()
    dtype = DTYPES[spec.dtype]
    weights = plan_weights(checkpoint, table, dtype)
    places = _write_weights(folder / "onnx" / WEIGHTS_FILE, weights, progress)
    specs = write_graphs(folder / "onnx", checkpoint.config, table, str(dtype).removeprefix("torch."), weights, places, progress)
    shutil.copyfile(checkpoint.tokenizer_path, folder / "tokenizer.json")
    shutil.copyfile(checkpoint.path / "config.json", folder / "config.json")
    if head_map is not None:
        head_map.save(folder / "head_map.json")
    offset, _ = places[EMBED_TOKENS]
    write_config(folder, {
        "model_name": name,
        "model_fingerprint": checkpoint.fingerprint(),
        "model": checkpoint.config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "policy": table.to_dict(),
        "generation": generation_defaults(checkpoint.path),
        "text_embeddings": {
            "file": f"onnx/{WEIGHTS_FILE}", "offset": offset, "dtype": str(dtype).removeprefix("torch."),
            "shape": [checkpoint.config.vocab_size, checkpoint.config.hidden_size],
        },
        "graphs": {graph.name: graph.to_dict() for graph in specs},
    })  # fmt: skip


def _write_weights(path: Path, weights: list[Weight], progress: Progress) -> dict[str, tuple[int, int]]:
    total, written = sum(weight.num_bytes for weight in weights), 0

    def advance(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("weights", written, total)

    return write_weights(path, weights, advance)


def write_graphs(
    folder: Path, config: ModelConfig, table: PolicyTable, dtype: str, weights: list[Weight],
    places: dict[str, tuple[int, int]], progress: Progress = lambda stage, done, total: None,
) -> list[GraphSpec]:  # fmt: skip
    """Writes every graph of the contract beside the weights file; the evict graph only where some group needs it."""
    by_name = {weight.name: weight for weight in weights}
    writers: list[Callable[[GraphWriter], tuple[GraphSpec, ir.Model]]] = [
        write_prefill, lambda writer: write_prefill(writer, top_k=True),
        write_decode_step, lambda writer: write_decode_step(writer, top_k=True),
        write_image_decoder,
    ]  # fmt: skip
    if evict_spec(config, table, dtype).inputs:
        writers.append(write_evict)
    specs = []
    for done, write in enumerate(writers, start=1):
        spec, model = write(GraphWriter(config, table, dtype, by_name, places))
        ir.save(model, folder / f"{spec.name}.onnx")
        specs.append(spec)
        progress("graphs", done, len(writers))
    return specs


def generation_defaults(folder: Path) -> dict[str, float]:
    """cfg_scale and temperature: Janus' own unless the checkpoint brings a `ssd_generation.json` of its own."""
    own = folder / "ssd_generation.json"
    return DEFAULT_GENERATION | (json.loads(own.read_text()) if own.exists() else {})
