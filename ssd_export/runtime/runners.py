"""The runners there are: one file and one row each.

A runner's class offers `from_bundle(bundle, provider, num_threads, exact)`. Whoever needs to know
what a runner can do asks its row; nothing else compares names.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssd_export.errors import UserError, first_line
from ssd_export.machine import num_cpus
from ssd_export.sampling import as_count

if TYPE_CHECKING:
    from ssd_export.bundle import Bundle
    from ssd_export.runtime.runner import InspectableRunner

# More threads than this for each CPU only wait for one another; some more than the CPUs are
# allowed, because a container's quota can be less than what a user knows of the machine.
MAX_THREADS_PER_CPU = 4
MAX_THREADS_ANYWHERE = 16


@dataclass(frozen=True)
class RunnerKind:
    """A runner and its capabilities.

    place: module and class, imported when a runner is opened. providers: where it computes, the
    usual one first. requires: the modules that must be installed, and install: what brings them.
    profiles_operators: `bench --profile` can ask it where a step's time goes. has_engines: it runs
    what `build-engine` built. memory_is_known: plan/memory.py knows what it takes on the CPU.
    widens_half: on the CPU it multiplies float16 weights as float32.
    """

    name: str
    title: str
    place: str
    providers: tuple[str, ...]
    requires: tuple[str, ...] = ()
    install: str = ""
    profiles_operators: bool = False
    has_engines: bool = False
    memory_is_known: bool = False
    widens_half: bool = False

    def provider(self, asked: str | None = None) -> str:
        """The provider asked for, or the usual one. Raises: UserError for one that it has not."""
        if asked is None:
            return self.providers[0]
        if asked not in self.providers:
            raise UserError(
                f"the {self.name} runner has no provider {asked!r}; use"
                f" {' or '.join(self.providers)}, or leave it out"
            )
        return asked

    def load(self) -> type[InspectableRunner]:
        """The runner's class. Raises: UserError for a package that is missing or does not load."""
        module, _, name = self.place.partition(":")
        try:
            for required in self.requires:  # some of it is imported when a bundle is opened
                importlib.import_module(required)
            return getattr(importlib.import_module(module), name)
        except ImportError as error:
            if error.name and error.name.split(".")[0] == "ssd_export":
                raise
            raise UserError(self._missing(error)) from error

    def _missing(self, error: ImportError) -> str:
        root = (error.name or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and root in self.requires:
            return f"the {self.name} runner needs {root}: {self.install}"
        reason = first_line(error)
        return (
            f"the {self.name} runner cannot load {root or 'a library'} ({reason}); install it again"
            f" ({self.install}), or use another --runner"
        )


KINDS = (
    RunnerKind(
        "ort",
        "ONNX Runtime",
        "ssd_export.runtime.ort_runner:OrtRunner",
        providers=("cpu", "cuda"),
        requires=("onnxruntime",),
        install='pip install "ssd-export[ort]", or [cuda] for a GPU',
        profiles_operators=True,
        memory_is_known=True,
        widens_half=True,
    ),
    RunnerKind(
        "torch",
        "PyTorch",
        "ssd_export.runtime.torch_runner:TorchRunner",
        providers=("cpu", "cuda"),
        requires=("torch", "safetensors"),
        install='pip install "ssd-export[export]"',
    ),
    RunnerKind(
        "trt",
        "TensorRT",
        "ssd_export.tensorrt.runner:TrtRunner",
        providers=("cuda",),
        install='pip install "ssd-export[tensorrt]" or "ssd-export[rtx]"',
        has_engines=True,
    ),
)
DEFAULT = KINDS[0].name
NAMES = tuple(kind.name for kind in KINDS)


def find_runner(name: str) -> RunnerKind:
    """The row of a runner. Raises: UserError for an unknown one, with those there are."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    listed = ", ".join(f"{kind.name} ({kind.title})" for kind in KINDS)
    raise UserError(f"unknown runner {name!r}; use one of {listed}")


def check_threads(num_threads: int | None, name: str = "num_threads") -> int | None:
    """The number, or None for the runner's choice. Raises: UserError for one that cannot help."""
    if num_threads is None:
        return None
    most = max(MAX_THREADS_ANYWHERE, MAX_THREADS_PER_CPU * max(num_cpus(), os.cpu_count() or 1))
    way_out = f"use 1 to {num_cpus()}, the CPUs there are, or leave it out"
    return as_count(num_threads, name, 1, way_out, most)


def open_runner(
    bundle: Bundle,
    name: str = DEFAULT,
    provider: str | None = None,
    num_threads: int | None = None,
    exact: bool = False,
) -> InspectableRunner:
    """A runner with the weights of a bundle.

    Args: provider: None takes the runner's usual one; num_threads: None chooses; exact: multiplied
    out and attended to as the reference does, where the fast way rounds differently.
    Raises: UserError for an unknown runner or provider, or what the runner lacks here.
    """
    kind = find_runner(name)
    provider, num_threads = kind.provider(provider), check_threads(num_threads)
    return kind.load().from_bundle(bundle, provider, num_threads, exact)
