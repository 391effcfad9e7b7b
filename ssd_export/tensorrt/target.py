"""Targets that an engine is built for: recipes in targets/*.toml, and the GPU of this machine.

A recipe: title, flavors (in order of preference), compute_capabilities (times ten), batch
("MIN:OPT:MAX" images), decoder_images (how many the image decoder takes at a time besides one),
workspace_mib, shared_weights (weights are inputs of prefill and decode_step, so that both use one
copy), memory_gib of the smallest machine, shares_memory (the system lives in it too).
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ssd_export.errors import UserError, first_line
from ssd_export.files import read_file
from ssd_export.os_errors import os_error
from ssd_export.tensorrt.flavors import is_installed, missing
from ssd_export.typed_json import parse_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "targets"
AUTO = "auto"
MAX_BYTES = 1 << 16  # of a recipe, which has a few hundred
INSTALL_AGAIN = "install ssd-export again"
CHOSEN_BY_AUTO = ("jetson-orin", "jetson-thor", "hopper", "a100", "ampere", "ada", "blackwell")
FIRST_WITH_FP8 = 89  # compute capability times ten: Ada
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Batch:
    """Images generated at once: least, the number to tune for, most."""

    min: int
    opt: int
    max: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Parses MIN:OPT:MAX. Raises: UserError for anything else, or numbers out of order."""
        match = re.fullmatch(r"(\d{1,5}):(\d{1,5}):(\d{1,5})", text)
        numbers = [int(number) for number in match.groups()] if match else []
        if not numbers or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise UserError(
                f"--batch {text} is not MIN:OPT:MAX images in order, at least 1; for example"
                " --batch 1:4:8"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class Target:
    """A recipe. name: what --target takes."""

    name: str
    title: str
    flavors: tuple[str, ...]
    compute_capabilities: tuple[int, ...]
    batch: Batch
    decoder_images: int
    workspace_mib: int
    shared_weights: bool


def target_names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def fp8_targets() -> list[str]:
    """Targets all of whose GPUs multiply in fp8."""
    capabilities = {name: _read(name).compute_capabilities for name in target_names()}
    return [
        name for name, values in capabilities.items() if values and min(values) >= FIRST_WITH_FP8
    ]


def memory_of(name: str) -> tuple[int, bool]:
    """(bytes of memory, whether the system shares it) of the smallest machine of a target; 0 where
    it says nothing.

    Raises: UserError for an unknown name.
    """
    if name not in target_names():
        raise UserError(
            f"unknown --target {name!r}; choose a size such as 8GB, or one of"
            f" {', '.join(target_names())}"
        )
    values = _read(name)
    return int(values.memory_gib * (1 << 30)), values.shares_memory


def read_target(name: str) -> Target:
    """The recipe of that name. Raises: UserError for an unknown name, or one that needs no
    engine.
    """
    if name not in target_names():
        raise UserError(
            f"unknown --target {name!r}; choose auto or one of {', '.join(target_names())}"
        )
    values = _read(name)
    if not values.flavors:
        raise UserError(
            f"{values.title} needs no engine: ssd-export generate --runner ort runs the bundle"
            " as it is"
        )
    return Target(
        name=name,
        title=values.title,
        flavors=values.flavors,
        compute_capabilities=values.compute_capabilities,
        batch=Batch.parse(values.batch),
        decoder_images=values.decoder_images,
        workspace_mib=values.workspace_mib,
        shared_weights=values.shared_weights,
    )


@dataclass(frozen=True)
class _Recipe:
    """A file of targets/, as it is written there."""

    title: str
    flavors: tuple[str, ...]
    compute_capabilities: tuple[int, ...]
    batch: str
    decoder_images: int
    workspace_mib: int
    shared_weights: bool
    memory_gib: float = 0.0
    shares_memory: bool = False


def _read(name: str) -> _Recipe:
    """The file of that name. Raises: UserError for one that is damaged."""
    path = RECIPES / f"{name}.toml"
    try:
        content = read_file(path, MAX_BYTES)
        values = json.dumps(tomllib.loads(content.decode()), default=str)
    except OSError as error:
        raise os_error(error, "read", path) from None
    except (ValueError, RecursionError) as error:  # malformed, or not UTF-8
        raise UserError(f"{path} is not TOML ({first_line(error)}); {INSTALL_AGAIN}") from None
    return parse_json(values.encode(), _Recipe, str(path), INSTALL_AGAIN)


def choose_target(name: str, capability: int | None) -> Target:
    """The recipe asked for; for `auto` that of the GPU here, narrowed to it, and rtx where there is
    no GPU.

    Raises: UserError for an unknown name, or a GPU that no recipe names.
    """
    if name != AUTO:
        return read_target(name)
    if capability is None:
        return read_target("rtx")
    for target in map(read_target, CHOSEN_BY_AUTO):
        if capability in target.compute_capabilities:
            return narrowed(target, capability)
    raise UserError(
        f"no target for this GPU (compute capability {capability / 10:.1f}); use --runner ort,"
        " which needs no engine"
    )


def narrowed(target: Target, capability: int) -> Target:
    """The same recipe for one GPU alone."""
    return replace(target, compute_capabilities=(capability,))


def choose_flavor(asked: str, target: Target) -> str:
    """The flavor asked for; for `auto` the first of the recipe that is installed.

    Raises: UserError for one that the target does not have, or where none is installed.
    """
    if asked != AUTO:
        if asked not in target.flavors:
            raise UserError(
                f"--flavor {asked} does not build for {target.name}; use --flavor"
                f" {target.flavors[0]}"
            )
        return asked
    for name in target.flavors:
        if is_installed(name):
            return name
    raise UserError(missing(list(target.flavors)))


def gpu_here() -> int | None:
    """Compute capability, times ten, of the first GPU of this machine; None without a GPU or its
    driver.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device):
        return None
    if cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device):
        return None
    return 10 * major.value + minor.value
