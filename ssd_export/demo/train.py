"""Trains the demo model's transformer: resumable, the same for a seed, on two CPU cores or on a
GPU.

Model and data are Janus' own kind: prompt, then 576 image tokens, next-token loss. What is not:
matrices are trained with Muon (orthogonalized momentum, https://kellerjordan.github.io/posts/muon),
everything else with Adam; the loss of tokens that only the caption tells weighs more; half of the
heads are asked to look near (`SpatialHeads`); the output and input tables are sums of a row per
pattern, a row per paint and a row per code while training, and plain tables in the checkpoint
(`folded_state`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_export.config import EMBED_TOKENS, TAU, ModelConfig, VQConfig
from ssd_export.demo import codes
from ssd_export.demo.batches import Batch, Mix, PromptIds, draw_batch
from ssd_export.demo.classes import ClassIds, class_demo_config, class_factors, class_shares
from ssd_export.demo.tokenizer import train_tokenizer
from ssd_export.model.decoder import Attend, ImageTokenModel
from ssd_export.model.families import janus, llamagen


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome. num_steps may be raised on resuming: the rate is flat
    until the decay.

    sparse: images and places of the batches with gaps, which take turns; batch_size: images of
    those without, which are all batches after a part `sparse_share` of the steps.
    """

    num_steps: int
    has_classes: bool = False
    num_layers: int = 6
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 352
    batch_size: int = 8
    sparse: tuple[tuple[int, int], ...] = ((32, 144),)
    sparse_share: float = 0.95
    seed: int = 0
    muon_rate: float = 0.015
    adam_rate: float = 2e-3
    warmup_steps: int = 60
    decay_share: float = 0.6
    caption_weight: float = 4.0
    spatial_share: float = 0.5
    spatial_weight: float = 0.05
    average_decay: float = 0.998


def class_recipe(num_steps: int = 8000, seed: int = 0) -> Recipe:
    """The class-conditional demo model's. No head is asked to look near, and sequences of every
    length take turns: trained on 72 places alone the model lost four times as much on whole images.
    """
    return Recipe(
        num_steps,
        has_classes=True,
        sparse=((16, 72), (16, 144), (8, 288), (4, codes.GRID**2 - 1)),
        seed=seed,
        decay_share=0.5,
        spatial_weight=0.0,
    )


def demo_config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The shape of the demo model."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        intermediate_size=recipe.intermediate_size,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        max_positions=1024,
        codebook_size=codes.num_codes(),
        codebook_dim=8,
        vq=VQConfig(
            latent_channels=64, base_channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1
        ),
        family=janus.NAME,
        grid=janus.GRID,
        rows_per_image=janus.ROWS_PER_IMAGE,
    )


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense causal attention, as `attend` of the decoder."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class SpatialHeads:
    """Causal attention that measures on the way how far every head looks, with a penalty on those
    that look nearest.

    52 % of Janus-Pro-1B's heads put at most a fifth of their attention outside the image tokens of
    two grid rows; left to itself a model of 24 heads has a handful. So the half of its heads that
    looks nearest is asked to look nearer.
    metrics: of each layer, [heads], attention mass on image tokens outside the neighborhood over
    the mass on all image tokens (the metric of `calibrate`), from NUM_ASKING random image tokens of
    each image.
    """

    NUM_ASKING = 24

    def __init__(self, batch: Batch, rng: np.random.Generator) -> None:
        num_places = batch.places.shape[1]
        chosen = torch.from_numpy(
            rng.integers(0, num_places, (len(batch.places), self.NUM_ASKING))
        ).to(batch.places.device)
        asking = batch.places.gather(1, chosen)[:, :, None]
        # an image's tokens stand in the sequence after its prompt (join_rows)
        self.asking = chosen + batch.lengths[:, None]
        total = batch.ids.shape[1] + num_places
        index = torch.arange(total, device=batch.places.device)[None] - batch.lengths[:, None]
        is_image = (index >= 0) & (index < num_places)
        place = batch.places.gather(1, index.clamp(0, num_places - 1))[:, None]
        self.seen = (is_image[:, None] & (place <= asking))[:, None]
        self.outside = self.seen & (place <= asking - janus.GRID.neighborhood)[:, None]
        self.causal = (torch.arange(total, device=place.device) <= self.asking[:, :, None])[:, None]
        self.metrics: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends causally, and records how much of the layer's attention is outside the
        neighborhood.
        """
        index = self.asking[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        logits = query.gather(2, index) @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        mass = logits.masked_fill(~self.causal, -torch.inf).softmax(-1)
        outside, seen = ((mass * where).sum((0, 2, 3)) for where in (self.outside, self.seen))
        self.metrics.append(outside / seen.clamp(min=1e-6))
        return causal_attention(layer, query, key, value)

    def penalty(self, share: float) -> Tensor:
        """Mean metric of that share of all heads which has the smallest ones."""
        metrics = torch.cat(self.metrics)
        return metrics.sort().values[: round(share * len(metrics))].mean()


class FactoredTable(nn.Module):
    """A table [V, width] whose rows are sums: a row of each factor and, of codes, one more.

    factors: int64 [V] each, which row of it; codes.factors() are pattern and paint.
    """

    index: Tensor

    def __init__(
        self, width: int, scale: float, factors: Sequence[np.ndarray], has_own: bool = True
    ) -> None:
        super().__init__()
        self.register_buffer("index", torch.from_numpy(np.stack(factors)), persistent=False)
        self.factors = nn.ParameterList(
            nn.Parameter(scale * torch.randn(int(factor.max()) + 1, width)) for factor in factors
        )
        self.own = nn.Parameter(torch.zeros(len(factors[0]), width), requires_grad=has_own)

    def forward(self) -> Tensor:
        """Embeddings float32 [V, width]."""
        first, *others = (rows[index] for rows, index in zip(self.factors, self.index, strict=True))
        return sum(others, first) + self.own


class Trainee(nn.Module):
    """The model with factored tables in place of generation_embeddings and the last layer of
    generation_head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model, of_codes = ImageTokenModel(config, text_embedding=True), codes.factors()
        width = self.model.generation_embeddings.embedding_dim
        self.input_table = FactoredTable(width, 1.0 if config.has_aligner else 0.3, of_codes)
        self.output_table = FactoredTable(config.hidden_size, 0.02, of_codes)
        self.output_bias = nn.Parameter(
            torch.zeros(config.codebook_size), requires_grad=config.has_aligner
        )
        replaced = [
            self.model.generation_embeddings.weight,
            *self.model.generation_head.vision_head.parameters(),
        ]
        self.class_table = None
        if config.family == llamagen.NAME:
            self.class_table = FactoredTable(config.hidden_size, 0.3, class_factors(), False)
            replaced.append(self.model.language_model.embed_tokens.weight)
        for parameter in replaced:
            parameter.requires_grad_(False)
        initialize(self.model, config.num_layers)

    def forward(self, batch: Batch, attend: Attend = causal_attention) -> Tensor:
        """Logits for every target, [B, K + 1, V]."""
        table = self.class_table
        prompt = self.model.embed_text_tokens(batch.ids) if table is None else table()[batch.ids]
        image = self.input_table()[batch.inputs]
        if self.model.config.has_aligner:
            image = self.model.generation_aligner(image)
        hidden, positions = join_rows(prompt, image, batch.lengths, batch.places)
        hidden = self.model(hidden, positions, attend, batch.lengths)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        hidden = hidden[
            rows,
            batch.lengths[:, None] - 1 + torch.arange(batch.targets.shape[1], device=hidden.device),
        ]
        if self.model.config.has_aligner:
            hidden = F.gelu(self.model.generation_head.proj_out(hidden))
        return F.linear(hidden, self.output_table(), self.output_bias)

    def folded_state(self) -> dict[str, Tensor]:
        """The state dict of a plain ImageTokenModel that computes the same."""
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        state["generation_embeddings.weight"] = self.input_table().detach().clone()
        state["generation_head.vision_head.weight"] = self.output_table().detach().clone()
        if self.model.config.has_aligner:
            state["generation_head.vision_head.bias"] = self.output_bias.detach().clone()
        if self.class_table is not None:
            state[EMBED_TOKENS] = self.class_table().detach().clone()
        return state


def join_rows(
    prompt: Tensor, image: Tensor, lengths: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row's prompt [B, L, h], padding cut, followed by its image tokens [B, K, h]; and the
    RoPE position of each.
    """
    padded = prompt.shape[1]
    place = torch.arange(padded + image.shape[1], device=prompt.device).expand(len(prompt), -1)
    ends = lengths[:, None]
    source = torch.where(place < ends, place, (place - ends + padded).clamp(max=place.shape[1] - 1))
    both = torch.cat([prompt, image], dim=1)
    positions = torch.cat([place[:, :padded], ends + places], dim=1)
    return both.gather(1, source[..., None].expand_as(both)), positions.gather(1, source)


def initialize(model: nn.Module, num_layers: int) -> None:
    """Draws the weights of a new model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(
                parameter,
                std=0.02 / math.sqrt(2 * num_layers)
                if residual
                else parameter.shape[1] ** -0.5 / 2,
            )
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def loss_of(logits: Tensor, batch: Batch, caption_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Mean cross entropy per token plus caption_weight times the part of the telling tokens that
    says *what* they show.

    p(token) = p(ground or shape) p(token | ground or shape): where a shape begins is chance, what
    begins is told by the caption, so only the second factor gets the extra weight.
    """
    flat, target, weight = logits.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()
    ground, shape = flat[:, : codes.NUM_GROUND_CODES], flat[:, codes.NUM_GROUND_CODES :]
    normalizer = torch.stack([ground.logsumexp(1), shape.logsumexp(1)], dim=1)
    is_shape = (target >= codes.NUM_GROUND_CODES).long()
    own = normalizer.gather(1, is_shape[:, None])[:, 0]
    what = own - flat.gather(1, target[:, None])[:, 0]
    whether = normalizer.logsumexp(1) - own
    telling = what[batch.telling.flatten()]
    num_tokens = weight.sum()
    loss = (weight @ (what + whether) + caption_weight * telling.sum()) / num_tokens
    figures = {
        "token": weight @ (what + whether) / num_tokens,
        "what": telling.mean(),
        "whether": weight @ whether / num_tokens,
    }
    return loss, {name: value.detach().item() for name, value in figures.items()}


class Muon:
    """Momentum, orthogonalized by five Newton-Schulz steps, for matrices of equal shape together
    (float32).
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        shapes = sorted({tuple(m.shape) for m in matrices})
        self.groups = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.velocity = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Takes one step at a learning rate: orthogonalized momentum, scaled by the matrices'
        shape.
        """
        for group, velocity in zip(self.groups, self.velocity, strict=True):
            gradient = torch.stack([m.grad for m in group if m.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalized(gradient.lerp(velocity, self.momentum))
            scale = max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - 0.01 * rate).sub_(change, alpha=rate * scale)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest (nearly) orthogonal matrix of each [K, m, n]; quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Training:
    """State of a run in a folder: `state.pt` to resume from, `log.jsonl`, `transformer.safetensors`
    at the end.
    """

    def __init__(self, recipe: Recipe, folder: Path, device: str = "cpu") -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.device = recipe, folder, device
        self.tokenizer = train_tokenizer()
        self.prompt_ids: Callable[[str, bool], list[int]] = PromptIds(self.tokenizer)
        self.config = demo_config(recipe, self.tokenizer.get_vocab_size())
        if recipe.has_classes:
            self.prompt_ids, self.config = ClassIds(), class_demo_config(self.config)
        self.trainee = Trainee(self.config).to(device)
        matrices = [
            p for n, p in self.trainee.named_parameters() if ".layers." in n and p.ndim == 2
        ]
        chosen = {id(m) for m in matrices}
        others = [p for p in self.trainee.parameters() if p.requires_grad and id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(
            others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = {n: p.detach().clone() for n, p in self.trainee.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        if (folder / "state.pt").exists():
            self._load()

    def rate_factor(self) -> float:
        """Share of the learning rate at this step: a warm-up, then a decay."""
        recipe = self.recipe
        left = (recipe.num_steps - self.step) / max(1, recipe.decay_share * recipe.num_steps)
        return min(1.0, (self.step + 1) / recipe.warmup_steps, max(left, 0.02))

    def mix(self) -> Mix:
        """Composition of the batch at this step."""
        recipe = self.recipe
        done = self.step / recipe.num_steps
        whole = (recipe.batch_size, codes.GRID**2 - 1)
        sparse = recipe.sparse[self.step % len(recipe.sparse)]
        size, num_places = sparse if done < recipe.sparse_share else whole
        return Mix(
            size=size,
            num_places=num_places,
            shares=class_shares(done) if recipe.has_classes else shares(done),
            spoil=0.5 * max(0.0, 1 - done / (1 - recipe.decay_share)),
        )

    def run(self, seconds_between_saves: float = 180) -> Iterator[dict[str, float]]:
        """Trains to the last step; yields the figures of every step."""
        saved = time.monotonic()
        while self.step < self.recipe.num_steps:
            began = time.monotonic()
            figures = self._one_step()
            self.seconds += time.monotonic() - began
            if time.monotonic() - saved > seconds_between_saves:
                self.save()
                saved = time.monotonic()
            yield figures
        self.save()

    def _one_step(self) -> dict[str, float]:
        rng = np.random.default_rng([self.recipe.seed, self.step])
        batch = draw_batch(rng, self.prompt_ids, self.mix())
        batch = Batch(
            *(getattr(batch, name).to(self.device) for name in Batch.__dataclass_fields__)
        )
        heads = SpatialHeads(batch, rng)
        loss, figures = loss_of(self.trainee(batch, heads), batch, self.recipe.caption_weight)
        penalty = heads.penalty(self.recipe.spatial_share)
        (loss + self.recipe.spatial_weight * penalty).backward()
        figures |= {
            "outside": penalty.item(),
            "spatial_heads": (torch.cat(heads.metrics) <= TAU).sum().item(),
        }
        factor = self.rate_factor()
        self.adam.param_groups[0]["lr"] = factor * self.recipe.adam_rate
        norm = nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.step()
        self.muon.step(factor * self.recipe.muon_rate)
        self.trainee.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return {"step": self.step, **figures, "gradient_norm": float(norm), "seconds": self.seconds}

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.average_decay, self.step / (self.step + 10))
        for name, value in self.trainee.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    def averaged_state(self) -> dict[str, Tensor]:
        """Folded state dict of the averaged weights."""
        kept = {name: value.clone() for name, value in self.trainee.state_dict().items()}
        self.trainee.load_state_dict(self.average)
        folded = self.trainee.folded_state()
        self.trainee.load_state_dict(kept)
        return folded

    def save(self) -> None:
        """Whole or not at all: written beside, then renamed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "trainee": self.trainee.state_dict(),
            "average": self.average,
            "adam": self.adam.state_dict(),
            "velocity": self.muon.velocity,
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location=self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.trainee.load_state_dict(state["trainee"])
        self.average = state["average"]
        self.adam.load_state_dict(state["adam"])
        self.muon.velocity = state["velocity"]


def shares(done: float) -> tuple[float, float, float, float]:
    """Share of single, counting, two objects, relation after a part `done` of the training.

    Single objects first; later most of all counting, whose images have most places to learn.
    """
    single = max(0.1, 0.7 - 4 * done)
    rest = 1 - single
    return (single, 0.58 * rest, 0.21 * rest, 0.21 * rest)


def log_line(folder: Path, stage: str, figures: dict[str, float]) -> None:
    """Adds a line to `log.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(
            json.dumps(
                {"stage": stage, **{name: round(value, 4) for name, value in figures.items()}}
            )
            + "\n"
        )
