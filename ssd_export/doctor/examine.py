"""Tries what this machine has, and says what of this package works here.

A finding that is absent is no fault by itself: a board has no torch. What it costs stands with the
ability that needs it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ssd_export.doctor import packages, probes
from ssd_export.doctor.child import Answer, ask
from ssd_export.extras import fix
from ssd_export.machine import free_bytes, free_disk_bytes, gib, num_cpus, total_bytes
from ssd_export.report.environment import device_name
from ssd_export.runtime.ort_operators import BUILD, HOW_TO_BUILD
from ssd_export.runtime.runners import KINDS, RunnerKind
from ssd_export.version import TOOL_VERSION

State = Literal["ok", "absent", "broken"]
FLAVORS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}  # and the extra that brings them
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_LIBRARIES = (
    "onnxruntime-gpu needs NVIDIA's driver, and CUDA and cuDNN of the versions that it was built"
    " for; the CPU needs none of them"
)
OLDEST_PYTHON = (3, 10)
SHOWN_EXTRAS = ("export", "ort", "cuda", "rtx", "tensorrt", "kernels", "serve", "ray", "bench")
SOME_LACK = 32  # exit code, plus a bit for each ability that lacks something
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something of the machine. says: what was found; fix: the command that brings or mends it."""

    name: str
    state: State
    says: str
    fix: str = ""


@dataclass(frozen=True)
class Ability:
    """A thing that a user can do here. problem: "" where it works; says: where it computes."""

    name: str
    problem: str = ""
    fix: str = ""
    says: str = ""

    @property
    def works(self) -> bool:
        """Whether it can be done here."""
        return not self.problem


@dataclass(frozen=True)
class Examination:
    """All of it, in the order in which it is shown."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]

    def exit_code(self, wanted: tuple[str, ...]) -> int:
        """0 where everything wanted works, else SOME_LACK plus 1, 2, 4, ... for each that does not,
        in the order of `abilities`.
        """
        lacking = [
            1 << place
            for place, ability in enumerate(self.abilities)
            if ability.name in wanted and not ability.works
        ]
        return SOME_LACK + sum(lacking) if lacking else 0

    def to_dict(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        """Plain data, as --json prints it."""
        return {
            "ssd_export": TOOL_VERSION,
            "findings": [asdict(finding) for finding in self.findings],
            "abilities": [asdict(one) | {"works": one.works} for one in self.abilities],
            "exit_code": self.exit_code(wanted),
        }


ABILITIES = ("export", "build-engine", *(kind.name for kind in KINDS))


def examine(progress: Progress = lambda stage, done, total: None) -> Examination:
    """Tries everything, some seconds long, each library in a separate process."""
    trials = _Trials(progress)
    findings = (
        _python(),
        *_packages(),
        *trials.onnxruntime(),
        trials.torch(),
        *trials.tensorrt(),
        *trials.gpu(),
        *_resources(),
    )
    abilities = (
        trials.export(),
        trials.build_engine(),
        *(trials.runner(kind) for kind in KINDS),
    )
    return Examination(findings, abilities)


class _Trials:
    """Answers, each asked for once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._answers: dict[tuple[str, ...], Answer] = {}

    def __call__(self, probe: Callable[..., probes.Facts], *arguments: str) -> Answer:
        name = (probe.__name__, *arguments)
        if name not in self._answers:
            self._progress(f"trying {' '.join(name)}", 0, 1)
            self._answers[name] = ask(probe, *arguments)
            self._progress(f"trying {' '.join(name)}", 1, 1)
        return self._answers[name]

    def onnxruntime(self) -> Iterator[Finding]:
        """The library, and every provider that it was built with."""
        found = self(probes.onnxruntime)
        if not found.works:
            yield _lacking("onnxruntime", found, "ort", packages.ONE_OF)
            return
        yield Finding("onnxruntime", "ok", found.facts["version"])
        for name in found.facts["providers"]:
            tried = self(probes.provider, name)
            if tried.works:
                yield Finding(name, "ok", "runs a graph")
            elif name not in PROVIDERS.values():
                yield Finding(name, "absent", tried.problem, "nothing of this package uses it")
            elif name == PROVIDERS["cuda"]:
                there: State = "broken" if self(probes.gpu).works else "absent"
                yield Finding(name, there, tried.problem, CUDA_LIBRARIES)
            else:
                yield Finding(name, "broken", tried.problem, fix("ort"))
        yield self._operators()

    def _operators(self) -> Finding:
        """The library that makes steps on the CPU shorter."""
        found = self(probes.operators)
        if not found.works:
            return Finding("operators", "broken", found.problem, HOW_TO_BUILD)
        if path := found.facts["path"]:
            return Finding(
                "operators", "ok", f"{path}: attention of a layer, norms of the image decoder"
            )
        return Finding(
            "operators", "absent", "not built: steps and int8 images on the CPU take longer", BUILD
        )

    def torch(self) -> Finding:
        """torch, and the GPU that it sees."""
        found = self(probes.torch)
        if not found.works:
            return _lacking("torch", found, "export", ("torch",))
        facts = found.facts
        gpu = facts["gpu"] or (f"no GPU (built for CUDA {facts['cuda']})" if facts["cuda"] else "")
        says = f"{facts['version']}, {gpu or 'built for the CPU'}, {facts['threads']} thread(s)"
        return Finding("torch", "ok", says)

    def tensorrt(self) -> Iterator[Finding]:
        """Both flavors, and the plugin library where TensorRT is there to load it."""
        for name, extra in FLAVORS.items():
            found = self(probes.flavor, name)
            if found.works:
                yield Finding(name, "ok", found.facts["version"])
            else:
                yield Finding(name, _state(found), found.problem, fix(extra))
        if self(probes.flavor, "tensorrt").works:
            found = self(probes.plugin, "tensorrt")
            says = found.facts.get("library", found.problem)
            yield Finding("plugin library", "ok" if found.works else "absent", says)

    def gpu(self) -> Iterator[Finding]:
        """The GPU and its driver."""
        found, name = self(probes.gpu), device_name()
        if not found.works:
            state: State = "absent" if name is None else "broken"
            says = found.problem if name is None else f"{name}: {found.problem}"
            yield Finding("GPU", state, says, "install NVIDIA's driver, where there is a GPU")
            return
        facts = found.facts
        says = f"{name or 'NVIDIA GPU'}, compute capability {facts['capability']}"
        yield Finding("GPU", "ok", f"{says}, driver for CUDA {facts['cuda']}")
        driver = self(probes.cuda_python)
        says = "opens the driver" if driver.works else driver.problem
        yield Finding("cuda-python", "ok" if driver.works else _state(driver), says)

    def export(self) -> Ability:
        """Whether export can work."""
        found = self(probes.exporter)
        return Ability("export", found.problem, "" if found.works else fix("export"))

    def build_engine(self) -> Ability:
        """Whether an engine can be built: by TensorRT-RTX anywhere, by TensorRT beside a GPU."""
        loaded = [name for name in FLAVORS if self(probes.flavor, name).works]
        if "tensorrt-rtx" in loaded:
            return Ability("build-engine", says="for GPUs of other machines, too")
        if loaded and self(probes.gpu).works:
            return Ability("build-engine", says="for the GPU of this machine")
        if loaded:
            why = "TensorRT builds only beside the GPU that will run the engine, and there is none"
            return Ability("build-engine", why, fix("rtx"))
        broken = [self(probes.flavor, name) for name in FLAVORS if packages.version(name)]
        why = broken[0].problem if broken else "neither TensorRT-RTX nor TensorRT is installed"
        return Ability("build-engine", why, fix("rtx"))

    def runner(self, kind: RunnerKind) -> Ability:
        """Whether a runner can generate, and where."""
        found = self(probes.runner, kind.name)
        if not found.works:
            return Ability(kind.name, found.problem, kind.install)
        if kind.has_engines:
            return self._engine_runner(kind)
        if "torch" in kind.requires:
            tried = self(probes.torch)
            places = ["cpu", "cuda"] if tried.facts.get("gpu") else ["cpu"]
            return Ability(kind.name, tried.problem, kind.install, f"on {' and '.join(places)}")
        if "onnxruntime" not in kind.requires:
            return Ability(kind.name)  # it can be imported: no more is known of it
        tried = self(probes.provider, PROVIDERS["cpu"])
        places = [
            place
            for place in kind.providers
            if PROVIDERS[place] in self(probes.onnxruntime).facts.get("providers", ())
            and self(probes.provider, PROVIDERS[place]).works
        ]
        return Ability(kind.name, tried.problem, kind.install, f"on {' and '.join(places)}")

    def _engine_runner(self, kind: RunnerKind) -> Ability:
        if not any(self(probes.flavor, name).works for name in FLAVORS):
            return Ability(kind.name, self.build_engine().problem, kind.install)
        for probe, way_out in (
            (probes.gpu, "use --runner ort, or a machine with an NVIDIA GPU"),
            (probes.cuda_python, kind.install),
        ):
            if not self(probe).works:
                return Ability(kind.name, self(probe).problem, way_out)
        return Ability(kind.name, says="on the GPU")


def _python() -> Finding:
    says = (
        f"{platform.python_version()} at {sys.executable}, {platform.system()}"
        f" {platform.machine()} {platform.release()}"
    )
    if sys.version_info < OLDEST_PYTHON or sys.maxsize < 1 << 32:
        return Finding("Python", "broken", says, "use a 64-bit Python 3.10 or newer")
    return Finding("Python", "ok", says)


def _packages() -> Iterator[Finding]:
    """Findings on packages that are too old, missing where everything needs them, or in each
    other's way.
    """
    listed = packages.packages(SHOWN_EXTRAS)
    there = sorted({f"{one.name} {one.version}" for one in listed if one.version})
    source = Path(__file__).parents[2]
    yield Finding("ssd-export", "ok", f"{TOOL_VERSION} at {source}")
    if there:
        yield Finding("packages", "ok", ", ".join(there))
    for one in listed:
        if one.is_old:
            says = f"{one.version} is older than {one.least}, the oldest that works"
            command = f'{sys.executable} -m pip install "{one.name}>={one.least}"'
            yield Finding(one.name, "broken", says, command)
        elif not one.version and not one.extra:
            says = "is not installed, and everything needs it"
            yield Finding(one.name, "broken", says, f"{sys.executable} -m pip install {one.name}")
    both = packages.clashing()
    if both:
        again = f"{sys.executable} -m pip uninstall {' '.join(both)}, then install one of them"
        says = "write into one folder: which of them is loaded is chance"
        yield Finding(" and ".join(both), "broken", says, again)


def _resources() -> Iterator[Finding]:
    """Memory, disk and CPUs, as everything else here counts them."""
    free, total = free_bytes(), total_bytes()
    memory = "unknown to this system" if free is None else f"{gib(free)} free"
    if total is not None:
        memory += f" of {gib(total)} (container limits included, page cache counted as free)"
    yield Finding("memory", "ok", memory)
    here, disk = Path.cwd(), free_disk_bytes(Path())
    says = f"{'unknown' if disk is None else gib(disk)} free at {here}"
    if os.access(here, os.W_OK | os.X_OK):
        yield Finding("disk", "ok", says)
    else:
        yield Finding("disk", "broken", f"{says}, where this user may not write", "cd elsewhere")
    asked = os.environ.get("OMP_NUM_THREADS")
    threads = f"{num_cpus()} of {os.cpu_count()} CPUs may be used"
    yield Finding("threads", "ok", threads + (f"; OMP_NUM_THREADS={asked}" if asked else ""))


def _lacking(name: str, answer: Answer, extra: str, distributions: tuple[str, ...]) -> Finding:
    """A library that cannot be imported: not there, or there and broken."""
    there = any(map(packages.version, distributions))
    return Finding(name, "broken" if there else "absent", answer.problem, fix(extra))


def _state(answer: Answer) -> State:
    return "absent" if "not installed" in answer.problem else "broken"
