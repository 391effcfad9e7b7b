"""An ImageGenerator as the micro-batcher and the page see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from PIL import Image

from ssd_export.model.families import check_takes_classes, family_of, num_classes
from ssd_export.noise import ImageSeed
from ssd_export.runtime.generate import ImageGenerator
from ssd_export.runtime.prompt_batch import ImageRequest, bundle_sampling
from ssd_export.serve.batcher import BatchRow
from ssd_export.serve.metrics import Metrics
from ssd_export.serve.schema import GenerationRequest, GroupFacts, ServerFacts


class GeneratorBatches:
    """Batches of one generator, as the batcher's BatchGenerator."""

    def __init__(
        self,
        generator: ImageGenerator,
        metrics: Metrics,
        lookahead: int | str = 1,
    ) -> None:
        """Takes the generator over: `close` closes it. Args: lookahead: tokens of an image that a
        pass tries. Raises: UserError where the runner cannot.
        """
        generator.check_lookahead(lookahead)
        self.generator, self._metrics, self._lookahead = generator, metrics, lookahead
        self.max_images: int = generator.runner.max_images
        self.num_rows: int = generator.config.grid.height
        self.tokens_evicted: int | None = None

    def rows(
        self, requests: Sequence[ImageRequest], wants_preview: Callable[[int, int], bool]
    ) -> Iterator[BatchRow]:
        """Generates the images; previews of those alone that want one are decoded."""
        later = self.generator.runner.decodes_beside_steps
        generated = self.generator.stream_requests(
            requests, wants_preview=wants_preview, lookahead=self._lookahead, decodes=not later
        )
        with closing(generated) as rows:
            for event in rows:
                self._metrics.cache_bytes(event.cache.bytes)
                self.tokens_evicted = event.cache.tokens_evicted
                is_last = event.row == self.num_rows - 1
                decode = partial(self._decode, event.tokens) if later and is_last else None
                yield BatchRow(event.row, self.num_rows, event.images, decode)

    def _decode(self, tokens: np.ndarray, place: int) -> Image.Image:
        return self.generator.decode_tokens(tokens[place])

    def warm(self) -> None:
        """Makes the first row and a preview, so that no request waits for sessions to open."""
        sampling = bundle_sampling(self.generator.bundle)
        config = self.generator.config
        (prompt,) = family_of(config).example_prompts(config, 1)
        request = ImageRequest(prompt, sampling, ImageSeed(0, 0))
        generated = self.generator.stream_requests(
            [request], lambda *_: True, lookahead=self._lookahead
        )
        with closing(generated) as rows:
            next(rows)

    def close(self) -> None:
        """Closes the generator."""
        self.generator.close()


def image_requests(body: GenerationRequest, generator: ImageGenerator) -> list[ImageRequest]:
    """Requests of a body, an entry an image.

    Raises: UserError for a prompt or number that cannot be generated with.
    """
    if body.class_ is not None:
        check_takes_classes(generator.config)
    prompt = body.prompt if body.class_ is None else str(body.class_)
    sampling = bundle_sampling(generator.bundle).changed(
        body.cfg_scale, body.temperature, body.top_k
    )
    return [
        ImageRequest(prompt, sampling, ImageSeed(body.seed, number), body.negative_prompt or "")
        for number in range(body.n or 1)
    ]


def server_facts(batches: GeneratorBatches, runner: str, max_batch: int) -> ServerFacts:
    """Facts that the page shows of the bundle."""
    generator = batches.generator
    config, table = generator.config, generator.table
    allocated, full = generator.cache_bytes_per_image()
    return ServerFacts(
        model=generator.bundle.config.model_name,
        policy=table.name,
        budget=table.budget,
        grid=(config.grid.height, config.grid.width),
        image_size=(config.image_width, config.image_height),
        runner=runner,
        max_batch=max_batch,
        layers=[
            [
                GroupFacts(
                    heads=group.num_heads,
                    slots=group.num_slots,
                    ranks_by="score" if group.rule.by_score else "position",
                )
                for group in groups
            ]
            for groups in table.layers
        ],
        bytes_an_image=allocated,
        full_cache_bytes_an_image=full,
        classes=num_classes(config),
        tokens_evicted=batches.tokens_evicted,
    )
