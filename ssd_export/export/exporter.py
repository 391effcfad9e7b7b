"""Exports a checkpoint to a bundle: the policy is settled first, then space and memory, then
weights, graphs, contracts.
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from ssd_export.bundle import (
    BundleConfig,
    GenerationDefaults,
    TextEmbeddingTable,
    check_target,
    write_bundle,
    write_config,
)
from ssd_export.bundle.config import HEAD_WEIGHTS, Precision, WeightFormat
from ssd_export.bundle.graphs import FUSED, evict_specs, keeps_rows
from ssd_export.bundle.swap import own_files
from ssd_export.config import EMBED_TOKENS, ModelConfig
from ssd_export.dtypes import MODEL_DTYPES, ModelDtype
from ssd_export.errors import UserError
from ssd_export.export.fused_step import write_fused_step
from ssd_export.export.image_decoder_writer import write_image_decoder
from ssd_export.export.int8_decoder import check_can_make, make_int8_decoder
from ssd_export.export.journal import Journal, unfinished_folder
from ssd_export.export.layer_attention import can_fuse
from ssd_export.export.onnx_writer import GraphWriter, write_decode_step, write_evict, write_prefill
from ssd_export.export.quantize import precision_facts, reads_codes
from ssd_export.export.weight_plan import plan_weights
from ssd_export.export.weights import WEIGHTS_FILE, Weight, write_weights
from ssd_export.export.window_writer import write_decode_rows, write_decode_window
from ssd_export.graph_spec import GraphSpec
from ssd_export.machine import check_disk
from ssd_export.model.checkpoint import (
    Checkpoint,
    ShapeOnly,
    first_layers,
    open_checkpoint,
)
from ssd_export.model.families import PUBLISHED, family_of, prompt_slots_of, published_shape
from ssd_export.model.find import Model, find_model, local_folder
from ssd_export.model.hub import is_hub_id
from ssd_export.os_errors import is_file, is_folder, os_error
from ssd_export.plan.memory import check_fits, export_bytes
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.presets import DEFAULT_GROUPS, default_policy, policy_of
from ssd_export.policy.table import PolicyTable
from ssd_export.policy.usual import EACH_FOR_ITSELF, usual_policy
from ssd_export.sampling import Sampling
from ssd_export.typed_json import read_json
from ssd_export.version import TOOL_VERSION

GENERATION_HELP = 'write {"cfg_scale": 5.0, "temperature": 1.0} there, or delete it'
log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportSpec:
    """Options of an export; None leaves a number to the policy.

    Attributes:
        model: demo, a folder, or a hub's owner/name; revision: a hub's branch, tag or commit.
        policy: a name; None takes ssd-auto where the head map has costs, else ssd-row.
        budget: mean image slots of a head, as a share of the image tokens.
        window, evict_every, num_recent, num_sinks: replace the policy's numbers.
        lookahead: tokens between two steps before which heads evict; 1 lets each evict for itself,
            None takes what the head map predicts no harm of.
        head_map: a file, a built-in map or a control; None takes the model's.
        groups: rules and sizes that ssd-auto may use in a layer.
        prompt_slots: slots for the prompt; None takes the family's.
        dtype: fp32, fp16 or bf16, of weights and cache.
        weights: none, int8, int4 or fp8, of the layers' matrices.
        head_weights: of the generation head and the aligner; None takes what suits `weights`.
        decoder_weights: none, or int8 for a second image decoder, which ONNX Runtime uses on a
            CPU; decoder_samples: a file of image tokens to calibrate it with.
        kv_dtype: model, or int8 keys and values.
        target: what will run the bundle; what it cannot run is refused.
        out: the bundle's folder; force replaces a bundle that is there.
        resume: continue where the same export was interrupted.
        num_layers: the first layers alone.
        force_memory: try even where the estimate says that memory will not do.
        lora: a folder with a PEFT adapter that is merged on the way.
        prompt_template: how prompts are written; None takes what the model's files tell.
    """

    model: str = "demo"
    policy: str | None = None
    budget: float = 0.2
    window: int | None = None
    evict_every: int | None = None
    num_recent: int | None = None
    num_sinks: int | None = None
    lookahead: int | None = None
    head_map: str | None = None
    groups: int = DEFAULT_GROUPS
    prompt_slots: int | None = None
    dtype: str = "fp32"
    out: Path | None = None
    force: bool = False
    weights: str = "none"
    head_weights: str | None = None
    decoder_weights: str = "none"
    decoder_samples: Path | None = None
    target: str | None = None
    kv_dtype: str = "model"
    revision: str | None = None
    num_layers: int | None = None
    resume: bool = False
    force_memory: bool = False
    lora: Path | None = None
    prompt_template: str | None = None

    @property
    def precision(self) -> Precision:
        """The formats that are asked for, without the facts of a model."""
        weights = cast(WeightFormat, self.weights)
        head = cast(WeightFormat, self.head_weights or HEAD_WEIGHTS[weights])
        return Precision(weights, head)


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is settled before anything is written. out: the bundle's folder."""

    spec: ExportSpec
    model: Model
    checkpoint: Checkpoint
    table: PolicyTable
    head_map: HeadMap | None
    weights: list[Weight]
    generation: GenerationDefaults
    out: Path


def export_bundle(
    spec: ExportSpec,
    progress: Progress = lambda stage, done, total: None,
    kept: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes the bundle of a spec, whole or not at all, and returns its folder.

    Args:
        spec: what to export.
        progress: called with stage, done and total.
        kept: called with the folder of what is finished where Ctrl-C, a signal or a full disk stops
            the export; the same spec with resume continues there.

    Raises:
        UserError: a checkpoint, policy, head map or output folder that will not do, or too little
            disk or memory; nothing is left behind.
    """
    plan = plan_export(spec)
    check_target(plan.out, spec.force)
    if spec.decoder_weights != "none":
        check_can_make(plan.checkpoint, spec.decoder_samples)
    if plan.checkpoint.left_out:
        log.info("left out, generating images does not need it: %s", plan.checkpoint.left_out)
    note = family_of(plan.checkpoint.config).prompt_note(
        plan.checkpoint.config, plan.checkpoint.path
    )
    if note:
        log.info("%s", note)
    _say_engines_go(plan.out)
    unfinished = unfinished_folder(plan.out)
    check_space(plan, unfinished)
    journal = Journal(unfinished, _asked(plan), spec.resume)  # refused, the folder is not ours
    try:
        with journal, write_bundle(plan.out, spec.force, unfinished) as folder:
            _write_files(folder, plan, journal, progress)
            journal.let_go()
    except (KeyboardInterrupt, SystemExit, UserError):
        if unfinished.is_dir():
            kept(unfinished)
        raise
    return plan.out


def _say_engines_go(target: Path) -> None:
    """Says which engines a bundle has that is about to be replaced: they are of its graphs."""
    if not target.exists():
        return
    engines = sorted(
        {Path(name).parts[1] for name in own_files(target) if name.startswith("engines/")}
    )
    if engines:
        log.warning(
            "%s is replaced with its engines (%s); afterwards: ssd-export build-engine --bundle %s",
            target,
            ", ".join(engines),
            shlex.quote(str(target)),
        )


def plan_export(spec: ExportSpec, download: bool = True) -> ExportPlan:
    """Everything settled for an export. download: without it a published model of a hub is known by
    its shape alone.

    Raises: UserError for a checkpoint, policy or head map that will not do.
    """
    is_here = is_folder(local_folder(spec.model))
    shape = None if download or is_here else published_shape(spec.model)
    if shape is None and not download and is_hub_id(spec.model) and not is_here:
        raise UserError(
            f"{spec.model} is not here and not one of the published shapes; download it and give"
            f" its folder, or plan with --model {' or '.join(PUBLISHED)}"
        )
    checkpoint: Checkpoint
    if shape is not None:
        model, checkpoint = Model(spec.model.split("/")[-1].lower(), Path()), ShapeOnly(shape)
        table, head_map = settle_policy(spec, checkpoint)
    else:
        model = find_model(spec.model, spec.revision)
        checkpoint = open_checkpoint(model.folder, spec.lora, spec.prompt_template)
        table, head_map = settle_policy(spec, checkpoint)
    if spec.num_layers is not None:
        checkpoint = checkpoint.first_layers(spec.num_layers)
    name = model.name if spec.lora is None else f"{model.name}-{spec.lora.resolve().name.lower()}"
    name = name if spec.num_layers is None else f"{name}-{spec.num_layers}-layers"
    asked = spec.precision
    dtype = MODEL_DTYPES[spec.dtype].torch
    weights = plan_weights(checkpoint, table, dtype, asked.weights, asked.head)
    out = (
        spec.out
        or Path("bundles") / f"{name}-{table.name}-b{table.budget:g}-{precision_name(spec)}"
    )
    generation = generation_defaults(checkpoint)
    model = replace(model, name=name)
    return ExportPlan(spec, model, checkpoint, table, head_map, weights, generation, out)


def check_space(plan: ExportPlan, unfinished: Path) -> None:
    """Raises UserError where disk or memory will not do, with ways out."""
    written = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    total = sum(weight.num_bytes for weight in plan.weights)
    way_out = (
        "free some, choose a folder on another disk with --out, or export smaller weights"
        " (--weights int4)"
    )
    check_disk(plan.out, total - written, f"the bundle {plan.out}", way_out)
    needed = export_bytes(weight.working_bytes for weight in plan.weights)
    if not plan.spec.force_memory:
        check_fits(
            "exporting",
            needed,
            (
                (
                    "export with --dtype fp16 (no second copy of the largest tensor)"
                    if plan.spec.dtype == "fp32"
                    else "export on a larger machine and copy the bundle back"
                ),
            ),
        )


def _asked(plan: ExportPlan) -> dict[str, Any]:
    """The inputs that decide the bundle's bytes: an export is resumed only where all of them are
    the same.
    """
    options = asdict(plan.spec)
    elsewhere = (
        "model",
        "lora",
        "decoder_samples",
        "out",
        "force",
        "resume",
        "force_memory",
        "head_map",
        "revision",
    )
    for name in elsewhere:
        del options[name]
    return {
        "tool_version": TOOL_VERSION,
        "checkpoint": plan.checkpoint.fingerprint(),
        **options,
        "decoder_samples": plan.spec.decoder_samples and str(plan.spec.decoder_samples),
        "head_map": None if plan.head_map is None else plan.head_map.to_dict(),
    }


def precision_name(spec: ExportSpec) -> str:
    """fp16, fp16-int4, fp16-int4-kv-int8: what a bundle's folder is called after."""
    parts = (
        [spec.dtype]
        + [spec.precision.name] * (spec.precision.name != "none")
        + [f"decoder-{spec.decoder_weights}"] * (spec.decoder_weights != "none")
        + [f"kv-{spec.kv_dtype}"] * (spec.kv_dtype != "model")
        + ["no-lookahead" if spec.lookahead == EACH_FOR_ITSELF else f"lookahead{spec.lookahead}"]
        * (spec.lookahead is not None)
    )
    return "-".join(parts)


def settle_policy(spec: ExportSpec, checkpoint: Checkpoint) -> tuple[PolicyTable, HeadMap | None]:
    """The policy table, and the head map it stands on where it tells heads apart; both of the first
    --num-layers.
    """
    config = checkpoint.config
    num_tokens = config.grid.num_tokens
    prompt_slots = prompt_slots_of(config, spec.prompt_slots)
    if prompt_slots + num_tokens > config.max_positions:
        raise UserError(
            f"{prompt_slots} prompt slots and {num_tokens} image tokens are more than"
            f" the model's {config.max_positions} positions; use --prompt-slots"
            f" {config.max_positions - num_tokens} or less"
        )
    head_map = None
    if spec.policy is None or policy_of(spec.policy).needs_head_map:
        head_map = checkpoint.head_map(spec.head_map)
    if spec.num_layers is not None:
        config = first_layers(config, spec.num_layers)
        head_map = None if head_map is None else head_map.first_layers(spec.num_layers)
    asked = {
        name: getattr(spec, name) for name in ("window", "evict_every", "num_recent", "num_sinks")
    }
    has_options = any(value is not None for value in asked.values())
    has_costs = head_map is not None and bool(head_map.cost_options)
    policy = spec.policy or default_policy(has_costs, has_options)
    table = usual_policy(
        policy,
        config,
        budget=spec.budget,
        lookahead=spec.lookahead,
        head_map=head_map,
        groups=spec.groups,
        prompt_slots=prompt_slots,
        **asked,
    )
    return replace(table, kv_dtype=spec.kv_dtype).validate(), head_map


def _write_files(folder: Path, plan: ExportPlan, journal: Journal, progress: Progress) -> None:
    spec, checkpoint, table = plan.spec, plan.checkpoint, plan.table
    (folder / "onnx").mkdir(exist_ok=True)
    dtype = cast(ModelDtype, MODEL_DTYPES[spec.dtype].name)
    places = _write_weights(folder / "onnx" / WEIGHTS_FILE, plan.weights, journal, progress)
    specs = write_graphs(
        folder / "onnx", checkpoint.config, table, dtype, plan.weights, places, progress
    )
    measured = None
    if spec.decoder_samples is not None:
        contract, measured = make_int8_decoder(
            folder / "onnx", checkpoint, spec.decoder_samples, progress
        )
        specs.append(contract)
    for name in ("config.json", *family_of(checkpoint.config).prompt_files):
        shutil.copyfile(checkpoint.file(name), folder / name)
    if plan.head_map is not None:
        plan.head_map.save(folder / "head_map.json")
    offset, _ = places[EMBED_TOKENS]
    write_config(
        folder,
        BundleConfig(
            model_name=plan.model.name,
            model_revision=plan.model.revision,
            model_fingerprint=checkpoint.fingerprint(),
            layers_of_the_model=checkpoint.num_layers_of_the_model,
            model=checkpoint.config,
            dtype=dtype,
            precision=precision_facts(spec.precision.weights, spec.precision.head, plan.weights),
            target=spec.target,
            policy=table,
            generation=plan.generation,
            text_embeddings=TextEmbeddingTable(
                file=f"onnx/{WEIGHTS_FILE}",
                offset=offset,
                dtype=dtype,
                shape=(checkpoint.config.vocab_size, checkpoint.config.condition_dim),
            ),
            graphs={graph.name: graph for graph in specs},
            int8_decoder=measured,
        ),
    )


def _write_weights(
    path: Path, weights: list[Weight], journal: Journal, progress: Progress
) -> dict[str, tuple[int, int]]:
    total, written = sum(weight.num_bytes for weight in weights), 0

    def advance(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("weights", written, total)

    return write_weights(path, weights, journal, advance)


def write_graphs(
    folder: Path,
    config: ModelConfig,
    table: PolicyTable,
    dtype: str,
    weights: list[Weight],
    places: dict[str, tuple[int, int]],
    progress: Progress = lambda stage, done, total: None,
) -> list[GraphSpec]:
    """Writes every graph of the contract beside the weights file; evict graphs only where some
    group needs them, and the forms of steps and windows with operators of engines/operators where
    these know the caches.
    """
    by_name = {weight.name: weight for weight in weights}
    writers: list[Callable[[GraphWriter], tuple[GraphSpec, ir.Model]]] = [
        write_prefill,
        lambda writer: write_prefill(writer, top_k=True),
        write_decode_step,
        lambda writer: write_decode_step(writer, top_k=True),
        write_decode_window,
        lambda writer: write_decode_window(writer, top_k=True),
        write_image_decoder,
    ]
    if keeps_rows(table):
        writers += [partial(write_decode_rows, top_k=top_k) for top_k in (False, True)]
    writers += [partial(write_evict, spec=spec) for spec in evict_specs(config, table, dtype)]
    specs = []
    for done, write in enumerate(writers, start=1):
        spec, model = write(GraphWriter(config, table, dtype, by_name, places))
        ir.save(model, folder / f"{spec.name}.onnx")
        specs.append(spec)
        progress("graphs", done, len(writers))
    if can_fuse(dtype):
        fused = [write_fused_step, write_decode_window]
        if any(reads_codes(weight) for weight in weights):  # other products are ONNX Runtime's best
            fused.append(write_prefill)
        for write_fused in fused:
            for top_k in (False, True):
                writer = GraphWriter(
                    config, table, "float32", by_name, places, True, bundle_dtype=dtype
                )
                spec, model = write_fused(writer, top_k)
                ir.save(model, folder / f"{spec.name}{FUSED}.onnx")
    return specs


def generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """The sampling defaults: the checkpoint's `ssd_generation.json`, else the family's.

    Raises: UserError for a file that cannot be read or holds numbers that cannot be sampled with.
    """
    own = checkpoint.file("ssd_generation.json")
    if not is_file(own):
        usual = family_of(checkpoint.config).sampling
        return GenerationDefaults(usual.cfg_scale, usual.temperature)
    try:
        values = read_json(own, dict[str, Any], GENERATION_HELP)
        defaults = read_json(own, GenerationDefaults, GENERATION_HELP)
    except OSError as error:
        raise os_error(error, "read", own) from None
    unknown = next((name for name in values if not hasattr(defaults, name)), None)
    if unknown is not None:
        raise UserError(f"{own}: {unknown[:40]!r} is no setting; {GENERATION_HELP}")
    try:
        Sampling(defaults.cfg_scale, defaults.temperature)
    except UserError as error:
        raise UserError(f"{own}: {error}") from None
    return defaults
