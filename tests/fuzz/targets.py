"""Every file that is parsed: how the product reads it, and what whole ones look like.

A target writes bytes where the product looks for the file, and reads it as the product does. A
UserError is the right end of a wrong file; so is no error at all. Everything else is a finding.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save

from ssd_export.bundle.config_reader import parse_config
from ssd_export.bundle.latest import LATEST, latest_bundle
from ssd_export.bundle.manifest import MANIFEST, FileEntry, Manifest, is_inside, read_manifest
from ssd_export.export.exporter import generation_defaults
from ssd_export.export.journal import Journal
from ssd_export.model.checkpoint import Checkpoint, open_checkpoint
from ssd_export.model.families import janus
from ssd_export.model.find import DEMO_CHECKPOINT
from ssd_export.model.prompt import TemplateEncoder
from ssd_export.model.weight_files import WeightFile, open_weight_files
from ssd_export.policy.head_map import HeadMap
from ssd_export.policy.make import make_policy
from ssd_export.prompt_files.lines import read_prompts
from ssd_export.prompt_files.results import NAME, Result, Results
from ssd_export.sweep.cells import read_strip
from ssd_export.tensorrt import target as targets
from ssd_export.tensorrt.engine_manifest import FILE, read_engine_json
from ssd_export.typed_json import to_json
from tests.bundle.small_bundles import MODEL, small_config
from tests.janus_checkpoints import TinyJanus, write_transformers_checkpoint
from tests.tensorrt.test_engine_manifest import ENGINE as ENGINES

PROMPT = "a red circle \N{SNOWMAN} <|endoftext|> \n on white"
HASH = "b" * 64


@dataclass(frozen=True)
class Target:
    """read: puts the bytes into the folder and reads them; seeds: whole files; is_json: mutate its
    values, too.
    """

    name: str
    read: Callable[[Path, bytes], Any]
    seeds: Callable[[], list[bytes]]
    is_json: bool = False


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_ssd_config(folder: Path, content: bytes) -> None:
    parse_config(content, "b/ssd_config.json")


def ssd_configs() -> list[bytes]:
    tables = [make_policy(name, MODEL, budget=0.2) for name in ("h2o", "streaming-llm")]
    return [to_json(small_config(policy=table)).encode() for table in tables]


def read_bundle_manifest(folder: Path, content: bytes) -> None:
    put(folder, MANIFEST, content)
    for name in read_manifest(folder).files:
        assert is_inside(name), f"the manifest's {name!r} is outside the bundle"


def bundle_manifests() -> list[bytes]:
    files = {name: FileEntry(12, HASH) for name in ("onnx/prefill.onnx", "ssd_config.json")}
    return [to_json(Manifest.of(files)).encode()]


def read_head_map(folder: Path, content: bytes) -> None:
    HeadMap.load(put(folder, "head_map.json", content))


def head_maps() -> list[bytes]:
    small = HeadMap("janus", janus.GRID, 2, 2, 1, 8, ((0.1, 0.9), (0.5, 0.2)), 0.4)
    return [small_text(small), (DEMO_CHECKPOINT / "head_map.json").read_bytes()[:200_000]]


def small_text(head_map: HeadMap) -> bytes:
    with scratch_file() as path:
        head_map.save(path)
        return path.read_bytes()


@contextmanager
def scratch_file() -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def read_targets(folder: Path, content: bytes) -> None:
    put(folder, "rtx.toml", content)
    with mock.patch.object(targets, "RECIPES", folder):
        targets.read_target("rtx")
        targets.memory_of("rtx")


def recipes() -> list[bytes]:
    return [path.read_bytes() for path in sorted(targets.RECIPES.glob("*.toml"))]


def read_safetensors(folder: Path, content: bytes) -> None:
    read_all(open_weight_files(put(folder, "model.safetensors", content).parent))


def read_pickle(folder: Path, content: bytes) -> None:
    read_all(open_weight_files(put(folder, "pytorch_model.bin", content).parent))


def read_all(files: list[WeightFile]) -> None:
    for file in files:
        for name in file.shapes:
            file.dtype(name)
            file.read(name)


def safetensors_files() -> list[bytes]:
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, np.float16)}
    return [save(state), save(state, {"format": "pt"}), save({})]


def pickles() -> list[bytes]:
    file = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}, file)
    return [file.getvalue()]


def read_index(folder: Path, content: bytes) -> None:
    put(folder, "part.safetensors", safetensors_files()[0])
    put(folder, "model.safetensors.index.json", content)
    read_all(open_weight_files(folder))


def indexes() -> list[bytes]:
    weight_map = {"a": "part.safetensors", "b.weight": "part.safetensors"}
    return [json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}).encode()]


@cache
def tiny_checkpoint() -> dict[str, bytes]:
    """The files of a small checkpoint."""
    with scratch_file() as path:
        write_transformers_checkpoint(path, TinyJanus(num_layers=1))
        return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def with_file(folder: Path, name: str, content: bytes) -> Checkpoint:
    for other, whole in tiny_checkpoint().items():
        if other != name and not (folder / other).exists():
            put(folder, other, whole)
    put(folder, name, content)
    return open_checkpoint(folder)


def read_checkpoint_config(folder: Path, content: bytes) -> None:
    with_file(folder, "config.json", content)


QUERY = "model.language_model.layers.0.self_attn.q_proj"
ADAPTER_CONFIG = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 6.0, "use_rslora": false}'


@cache
def adapter_weights() -> bytes:
    """Factors for the queries of tiny_checkpoint()."""
    with scratch_file() as path:
        put(path.parent, "model.safetensors", tiny_checkpoint()["model.safetensors"])
        rows, columns = open_weight_files(path.parent)[0].shapes[f"{QUERY}.weight"]
    factors = {"A": np.ones((2, columns), np.float32), "B": np.ones((rows, 2), np.float32)}
    return save({f"base_model.model.{QUERY}.lora_{name}.weight": factors[name] for name in "AB"})


def adapter_configs() -> list[bytes]:
    adapter_weights()  # which writes files: not while it is watched
    return [ADAPTER_CONFIG]


def read_adapter_config(folder: Path, content: bytes) -> None:
    read_adapter(folder, content, adapter_weights())


def read_adapter_weights(folder: Path, content: bytes) -> None:
    read_adapter(folder, ADAPTER_CONFIG, content)


def read_adapter(folder: Path, config: bytes, weights: bytes) -> None:
    put(folder, "lora/adapter_config.json", config)
    put(folder, "lora/adapter_model.safetensors", weights)
    for name, whole in tiny_checkpoint().items():
        put(folder, name, whole)
    checkpoint = open_checkpoint(folder, folder / "lora")
    checkpoint.tensor("language_model.layers.0.self_attn.q_proj.weight")


def read_generation(folder: Path, content: bytes) -> None:
    generation_defaults(with_file(folder, "ssd_generation.json", content))


def read_tokenizer(folder: Path, content: bytes) -> None:
    path = put(folder, "tokenizer.json", content)
    encoder = TemplateEncoder.from_file(path, janus.PROMPT, janus.TITLE, 102_400)
    encoder.encode([PROMPT], 64)


def tokenizers() -> list[bytes]:
    return [tiny_checkpoint()["tokenizer.json"], (DEMO_CHECKPOINT / "tokenizer.json").read_bytes()]


def read_png(folder: Path, content: bytes) -> None:
    read_strip(put(folder, "strip.png", content))


def pngs() -> list[bytes]:
    made = []
    for mode in ("RGB", "P", "LA"):
        file = io.BytesIO()
        Image.new(mode, (24, 8)).save(file, "PNG")
        made.append(file.getvalue())
    return made


def prompts_reader(suffix: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, content: bytes) -> None:
        read_prompts(put(folder, f"prompts{suffix}", content))

    return read


def read_results(folder: Path, content: bytes) -> None:
    put(folder, NAME, content)
    with Results(folder, HASH):
        pass


def results() -> list[bytes]:
    done = Result(1, 0, "000001-0.png", None, "red", "", 7, 0, 5.0, 1.0, 0, HASH)
    return [to_line(done) * 2, to_line(done)[:-9]]


def to_line(result: Result) -> bytes:
    return json.dumps(json.loads(to_json(result))).encode() + b"\n"


def read_engines(folder: Path, content: bytes) -> None:
    class Files:
        path = folder

        def read(self, name: str) -> bytes:
            return content

    read_engine_json(Files(), f"engines/rtx/{FILE}")


def read_latest(folder: Path, content: bytes) -> None:
    put(folder, str(LATEST), content)
    here = Path.cwd()
    os.chdir(folder)
    try:
        latest_bundle()
    finally:
        os.chdir(here)


def read_journal(folder: Path, content: bytes) -> None:
    put(folder, "journal.jsonl", content)
    with Journal(folder, {"model": "demo"}, resume=True) as journal:
        for line in journal.finished:
            assert isinstance(line, dict)


def journals() -> list[bytes]:
    with scratch_file() as path:
        with Journal(path, {"model": "demo"}, resume=False) as journal:
            journal.note("a", 12, HASH)
        return [(path / "journal.jsonl").read_bytes()]


TARGETS = {
    one.name: one
    for one in (
        Target("ssd_config", read_ssd_config, ssd_configs, is_json=True),
        Target("manifest", read_bundle_manifest, bundle_manifests, is_json=True),
        Target("head_map", read_head_map, head_maps, is_json=True),
        Target("engine_manifest", read_engines, lambda: [to_json(ENGINES).encode()], is_json=True),
        Target("targets_toml", read_targets, recipes),
        Target("safetensors", read_safetensors, safetensors_files),
        Target("pickle", read_pickle, pickles),
        Target("weight_index", read_index, indexes, is_json=True),
        Target(
            "checkpoint_config",
            read_checkpoint_config,
            lambda: [tiny_checkpoint()["config.json"]],
            is_json=True,
        ),
        Target(
            "ssd_generation",
            read_generation,
            lambda: [b'{"cfg_scale": 5.0, "temperature": 1.0}'],
            is_json=True,
        ),
        Target("adapter_config", read_adapter_config, adapter_configs, is_json=True),
        Target("adapter_weights", read_adapter_weights, lambda: [adapter_weights()]),
        Target("tokenizer", read_tokenizer, tokenizers, is_json=True),
        Target("png", read_png, pngs),
        Target("prompts_txt", prompts_reader(".txt"), lambda: [PROMPT.encode()]),
        Target(
            "prompts_csv",
            prompts_reader(".csv"),
            lambda: [b'prompt,seed,cfg_scale\n"a ""red"" circle",7,5\nblue,,\n'],
        ),
        Target(
            "prompts_jsonl",
            prompts_reader(".jsonl"),
            lambda: [b'{"prompt": "red", "seed": 7}\n{"prompt": "blue", "top_k": 3}\n'],
        ),
        Target("results", read_results, results),
        Target("journal", read_journal, journals),
        Target("latest", read_latest, lambda: [b"demo-ssd-auto-b0.2-fp32\n", b"/abs/path\n"]),
    )
}
