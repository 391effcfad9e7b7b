"""The engines of a bundle that may be loaded on this machine: which folder, which files, which
weights they share.

An engine is code: only files whose hash is in the manifest are loaded, after engine.json was
checked against the GPU, the system, TensorRT's version and the bundle
(tensorrt/engine_manifest.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ssd_export.bundle import Bundle
from ssd_export.errors import UserError
from ssd_export.plan.sizes import StoredWeight
from ssd_export.tensorrt.engine_manifest import (
    EngineManifest,
    Here,
    check_batch,
    check_provenance,
    engine_folders,
    read_engine_json,
    rebuild,
    this_arch,
    this_os,
)
from ssd_export.tensorrt.flavors import EXTRAS, Flavor, is_installed, load_flavor
from ssd_export.tensorrt.plugin import PLUGIN_NAMES, load_library
from ssd_export.tensorrt.profiles import IMAGE_DECODER, Profile
from ssd_export.tensorrt.step_form import DECODE_WINDOW, PREFILL, Form


@dataclass(frozen=True)
class EngineFiles:
    """A folder of engines that fits this machine. manifest: its engine.json."""

    bundle: Bundle
    folder: str
    manifest: EngineManifest
    flavor: Flavor

    @property
    def rebuild(self) -> str:
        """The advice that ends a refusal."""
        return rebuild(str(self.bundle.path))

    @property
    def evicts_in_step(self) -> bool:
        """Whether the decode step's plugin evicts by itself (R7), so that there is no evict
        engine.
        """
        return self.manifest.plugin is not None

    @property
    def form(self) -> Form:
        """Form of the decode step's attention (step_form.py)."""
        return self.manifest.form

    @property
    def min_images(self) -> int:
        """The least number of images that the engines generate at once."""
        return self.manifest.batch[0]

    @property
    def max_images(self) -> int:
        """The greatest number of images that the engines generate at once."""
        return self.manifest.batch[2]

    @property
    def prompt_slots(self) -> int:
        """Prompt slots that the engines were built for."""
        return self.manifest.prompt_slots

    @property
    def decoder_images(self) -> int:
        """Number of images that the image decoder takes at a time, where there are as many."""
        return max(profile.images[2] for profile in self.profiles(IMAGE_DECODER))

    @property
    def window(self) -> int:
        """Places of a pass of lookahead, 0 where there is no engine for it."""
        return self.profiles(DECODE_WINDOW)[0].window if self.has(DECODE_WINDOW) else 0

    def profiles(self, graph: str) -> tuple[Profile, ...]:
        """Sizes that the engine of a graph is tuned for, in the order of its profiles."""
        return self.manifest.graphs[graph].profiles

    def check_batch(self, num_images: int) -> None:
        """Raises UserError for a batch that the engines do not generate."""
        check_batch(self.manifest, num_images, str(self.bundle.path))

    def has(self, graph: str) -> bool:
        """Whether there is an engine of that graph."""
        return graph in self.manifest.graphs

    def path(self, graph: str) -> Path:
        """The file of a graph's engine, checked. Raises: UserError where there is none, or another
        than engine.json describes.
        """
        if not self.has(graph):
            option = " --top-k" if graph.endswith("_top_k") else ""
            raise UserError(
                f"{self.folder} has no engine of {graph}; {self.rebuild}{option}, or use"
                " --runner ort"
            )
        entry = self.manifest.graphs[graph]
        name = f"{self.folder}/{entry.engine}"
        if name not in self.bundle.files or self.bundle.files[name].sha256 != entry.sha256:
            raise UserError(f"{name} is not the engine that engine.json describes; {self.rebuild}")
        return self.bundle.file(name)

    def num_bytes(self, graphs: Iterable[str]) -> int:
        """Bytes of the engine files, which is about what they take on the device."""
        return sum(self.manifest.graphs[graph].bytes for graph in graphs if self.has(graph))

    def weights(self, graph: str) -> dict[str, StoredWeight]:
        """The weights that the engine takes as inputs, by name."""
        return self.manifest.graphs[graph].weights

    def aliases(self, graph: str) -> dict[str, str]:
        """Output -> the input whose memory it is."""
        return self.manifest.graphs[graph].aliases

    def fills_caches(self, graph: str) -> bool:
        """Whether the engine is a prefill that writes keys and values into the caches."""
        return self.has(graph) and graph.startswith(PREFILL) and bool(self.aliases(graph))

    def all_weights(self) -> dict[str, StoredWeight]:
        """Weights shared by all engines."""
        return {
            name: weight
            for graph in self.manifest.graphs
            for name, weight in self.weights(graph).items()
        }

    @property
    def weights_path(self) -> Path:
        """The file of the weights that engines are given as inputs."""
        return self.bundle.file(self.manifest.weights_file)

    def register_plugin(self) -> bool:
        """Makes the plugin known to TensorRT; returns whether the engine file itself carries its
        library.

        Raises: UserError where the library is missing.
        """
        plugin = self.manifest.plugin
        if plugin is None or plugin.in_engine:
            return plugin is not None
        name = f"{self.folder}/{plugin.library}"
        if name not in self.bundle.files or self.bundle.files[name].sha256 != plugin.sha256:
            raise UserError(
                f"the engines need the plugin library {name}, which is not there as it was built;"
                f" {self.rebuild}"
            )
        names = PLUGIN_NAMES if self.window else PLUGIN_NAMES[:1]
        load_library(self.flavor, self.bundle.file(name).resolve(), names)
        return False


def find_engines(bundle: Bundle, compute_capability: int) -> EngineFiles:
    """The bundle's engines for this machine.

    Raises: UserError, one line with the command that builds fitting ones, where there are none.
    """
    folders, again = engine_folders(bundle), rebuild(str(bundle.path))
    if not folders:
        raise UserError(
            f"bundle {bundle.path} has no TensorRT engines; {again}, or use --runner ort"
        )
    engines: dict[str, EngineManifest] = {}
    unreadable: list[UserError] = []
    for folder in folders:  # a folder that was copied in part says nothing of the others
        try:
            engines[folder] = read_engine_json(bundle, folder)
        except UserError as error:
            unreadable.append(error)
    refusals: list[UserError] = []
    # Where none fits, the reason is that of the engines that come nearest: those for this GPU.
    for folder in sorted(
        engines,
        key=lambda folder: compute_capability not in engines[folder].compute_capabilities,
    ):
        try:
            return _checked(bundle, folder, engines[folder], compute_capability)
        except UserError as error:
            refusals.append(error)
    raise (refusals + unreadable)[0]


def _checked(
    bundle: Bundle, folder: str, manifest: EngineManifest, compute_capability: int
) -> EngineFiles:
    name = manifest.flavor
    if not is_installed(name):
        raise UserError(
            f"the engines of {folder} need {name}, which is not installed: pip install"
            f" {EXTRAS[name]}"
        )
    flavor = load_flavor(name)
    check_provenance(
        manifest,
        Here(
            name,
            flavor.version,
            compute_capability,
            this_os(),
            this_arch(),
            bundle.hash,
            str(bundle.path),
        ),
    )
    return EngineFiles(bundle, folder, manifest, flavor)
