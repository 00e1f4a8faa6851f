"""One iteration of SPO as the released PyTorch program computes it, with diffusers, transformers and peft.

    text encoder ─► N steps: guided UNet, decode and score candidates, best against worst ─► minibatches of pairs:
    policy and reference once for the winner and once for the loser, ratio, AdamW on the adapters

It computes what that program computes, in its order and as often: the reference is a second copy of the UNet, and both
run twice a pair although winner and loser start from the same latents. Nothing here imports JAX, so that the process
has the memory of a PyTorch program.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from peft import LoraConfig
from torch.nn import functional

from benchmarks.measure import GIB, Batch, Turn, Work, measured, turn_of
from benchmarks.torch_scorer import image_features, read_scorer, text_features

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclasses.dataclass
class Program:
    """What is loaded."""

    work: Work
    device: torch.device
    tokenizer: transformers.CLIPTokenizer
    text_encoder: torch.nn.Module
    unet: torch.nn.Module  # with adapters
    reference: torch.nn.Module
    vae: torch.nn.Module
    scorer: torch.nn.Module
    optimizer: torch.optim.Optimizer
    alphas: torch.Tensor  # cumulative products, float32 [1000]
    timesteps: list[int]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[c, h, w]."""
        side = self.work.pixels // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.unet.config.in_channels, side, side


class Texts(NamedTuple):
    """Embeddings [B, L, d] and [1, L, d] of prompts and of the empty one; the scorer's features [B, e]."""

    positive: torch.Tensor
    negative: torch.Tensor
    features: torch.Tensor


class Pairs(NamedTuple):
    """P transitions: from latents at a timestep to the better and the worse candidate at the one before."""

    latents: torch.Tensor
    win: torch.Tensor
    lose: torch.Tensor
    timesteps: torch.Tensor
    previous: torch.Tensor
    prompts: torch.Tensor  # index of each one's prompt


# Gives standard normal numbers of a shape; ``Choices`` a candidate's number below k for each of B prompts.
Noise = Callable[[tuple[int, ...]], torch.Tensor]
Choices = Callable[[int, int], torch.Tensor]


def prepare(device: str, *, exact: bool = False) -> str:
    """PyTorch's name of "cpu" or "gpu", with as many threads as there are cores.

    On a GPU float32 factors are rounded to TF32 as by JAX's default, unless the results are to be ``exact``.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device == "cpu":
        return "cpu"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    return "cuda"


def load(work: Work, folder: Path, device: str, dtype: torch.dtype) -> Program:
    """Reads the models; networks compute in ``dtype``, adapters are float32."""

    transformers.logging.disable_progress_bar()

    def unet() -> torch.nn.Module:
        network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        return network.requires_grad_(False).to(device)

    policy, reference = unet(), unet().eval()
    # The released program draws A with a deviation of 1 / rank, "gaussian" in peft.
    policy.add_adapter(
        LoraConfig(r=work.rank, lora_alpha=work.rank, init_lora_weights="gaussian", target_modules=TARGETS)
    )
    adapters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    noise = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    betas = torch.linspace(noise["beta_start"] ** 0.5, noise["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return Program(
        work=work,
        device=torch.device(device),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder.requires_grad_(False).eval().to(device),
        unet=policy,
        reference=reference,
        vae=vae.requires_grad_(False).eval().to(device),
        scorer=read_scorer(folder / "scorer", dtype).to(device),
        optimizer=torch.optim.AdamW(
            adapters,
            lr=work.learning_rate,
            betas=tuple(work.betas),
            eps=work.eps,
            weight_decay=work.weight_decay,
        ),
        alphas=torch.cumprod(1 - betas, 0).float().to(device),
        timesteps=[1000 // work.steps * i + noise["steps_offset"] for i in reversed(range(work.steps))],
    )


# ----------------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def encode(program: Program, prompts: list[str]) -> Texts:
    """Both text encoders run once a batch."""

    def embed(texts: list[str]) -> torch.Tensor:
        return program.text_encoder(_tokens(program, texts)).last_hidden_state

    features = text_features(program.scorer, _tokens(program, prompts))
    return Texts(embed(prompts), embed([""]), features)


def _tokens(program: Program, texts: list[str]) -> torch.Tensor:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return program.tokenizer(texts, **options).input_ids.to(program.device)


@torch.no_grad()
def sample(program: Program, texts: Texts, noise: Noise, choices: Choices) -> tuple[Pairs, torch.Tensor]:
    """The pairs of all pool steps and prompts, step by step, and the scores [S, B, k]."""
    work, shape = program.work, program.latent_shape
    b, k = len(work.texts), work.candidates
    step_size, rows = 1000 // work.steps, torch.arange(b, device=program.device)
    latents = noise((b, *shape))
    candidates, pairs, all_scores = None, [], []

    def close(x0: torch.Tensor, timestep: int) -> None:
        """Scores the candidates of the last step by their x0 [B k, ...]; best and worst are a pair."""
        scores = score(program, x0, timestep, texts.features.repeat_interleave(k, 0)).reshape(b, k)
        best, worst = scores.argmax(1), scores.argmin(1)
        p = torch.softmax(torch.stack([scores[rows, best], scores[rows, worst]]), dim=0)
        keep = (p[0] - p[1] > 0).nonzero()[:, 0]  # waits for the device, as the released program does at each step
        times = (torch.full((len(keep),), t, device=program.device) for t in (last, max(last - step_size, 0)))
        pair = latents[keep], candidates[keep, best[keep]], candidates[keep, worst[keep]], *times, keep
        pairs.append(Pairs(*pair))
        all_scores.append(scores)

    for i, timestep in enumerate(program.timesteps):
        if candidates is None:
            output = guided(program, program.unet, latents, timestep, texts.negative, texts.positive)
            x0, eps = _x0(program, latents, output, timestep), output
        else:
            flat = candidates.flatten(0, 1)
            output = guided(
                program, program.unet, flat, timestep, texts.negative, texts.positive.repeat_interleave(k, 0)
            )
            clean = _x0(program, flat, output, timestep)
            close(clean, timestep)
            choice = choices(b, k)
            latents, x0, eps = (x.unflatten(0, (b, k))[rows, choice] for x in (flat, clean, output))
        last = timestep
        mean, sigma = _transition(program, x0, eps, timestep, max(timestep - step_size, 0))
        if i < work.plain_steps:
            latents = mean + sigma * noise((b, *shape))
        else:
            candidates = mean[:, None] + sigma * noise((b, k, *shape))
    close(candidates.flatten(0, 1), 0)
    return Pairs(*(torch.cat(parts) for parts in zip(*pairs, strict=True))), torch.stack(all_scores)


def guided(
    program: Program,
    unet: torch.nn.Module,
    latents: torch.Tensor,
    timesteps: torch.Tensor | int,
    negative: torch.Tensor,
    positive: torch.Tensor,
) -> torch.Tensor:
    """The guided noise prediction, float32, by one call of [negative; prompt]."""
    context = torch.cat([negative.expand_as(positive), positive])
    times = timesteps.repeat(2) if isinstance(timesteps, torch.Tensor) else timesteps
    output = unet(torch.cat([latents, latents]).to(unet.dtype), times, context).sample.float()
    without, text = output.chunk(2)
    return without + program.work.guidance * (text - without)


def decode(program: Program, x0: torch.Tensor) -> torch.Tensor:
    """Images [n, 3, H, W], about in [-1, 1]."""
    return program.vae.decode((x0 / program.vae.config.scaling_factor).to(program.vae.dtype)).sample


def score(program: Program, x0: torch.Tensor, timestep: int, features: torch.Tensor) -> torch.Tensor:
    """Scores [n] of clean latents [n, ...] for the text features of each."""
    times = torch.full((len(x0),), timestep, device=program.device)
    images = image_features(program.scorer, decode(program, x0), times)
    return program.scorer.logit_scale.float().exp() * (images * features).sum(-1)


def _x0(program: Program, latents: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
    alpha = program.alphas[timestep]
    return (latents - (1 - alpha).sqrt() * eps) / alpha.sqrt()


def _transition(
    program: Program, x0: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor | int, previous: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sigma of a DDIM step with eta 1."""
    alpha, before = program.alphas[timestep], program.alphas[previous]
    sigma = ((1 - before) / (1 - alpha) * (1 - alpha / before)).sqrt()
    if sigma.ndim:
        before, sigma = before[:, None, None, None], sigma[:, None, None, None]
    return before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps, sigma


# ------------------------------------------------------------------------------------------------------------- update
def update(program: Program, texts: Texts, pairs: Pairs, order: torch.Tensor) -> list[dict[str, float]]:
    """One step of the optimizer for each minibatch of pairs in ``order``; loss and gradient's norm of each."""
    told = []
    for index in order.split(program.work.minibatch):
        batch = Pairs(*(x[index] for x in pairs))
        positive = texts.positive[batch.prompts]
        log_ratios = []
        for following in (batch.win, batch.lose):
            policy = _log_prob(program, program.unet, batch, following, texts.negative, positive)
            with torch.no_grad():
                reference = _log_prob(program, program.reference, batch, following, texts.negative, positive)
            low, high = 1 - program.work.clip_range, 1 + program.work.clip_range
            log_ratios.append((policy - reference).exp().clamp(low, high).log())
        loss = -functional.logsigmoid(program.work.beta * (log_ratios[0] - log_ratios[1])).mean()
        loss.backward()
        grads = [p.grad for group in program.optimizer.param_groups for p in group["params"]]
        told.append((loss.detach(), torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
        program.optimizer.step()
        program.optimizer.zero_grad()
    return [{"loss": float(loss), "grad_norm": float(norm)} for loss, norm in told]


def _log_prob(
    program: Program,
    unet: torch.nn.Module,
    pairs: Pairs,
    following: torch.Tensor,
    negative: torch.Tensor,
    positive: torch.Tensor,
) -> torch.Tensor:
    """Log-probability [P] of a transition: its mean over the elements of the latents."""
    eps = guided(program, unet, pairs.latents, pairs.timesteps, negative, positive)
    alpha = program.alphas[pairs.timesteps][:, None, None, None]
    x0 = (pairs.latents - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    mean, sigma = _transition(program, x0, eps, pairs.timesteps, pairs.previous)
    return torch.distributions.Normal(mean, sigma).log_prob(following).mean(dim=(1, 2, 3))


# --------------------------------------------------------------------------------------------------------------- turn
def measure(turn: Turn) -> dict[str, Any]:
    """One turn of this program."""
    work, device = turn.work, prepare(turn.device)
    torch.manual_seed(0)
    began = time.perf_counter()
    loaded = load(work, Path(turn.folder), device, getattr(torch, turn.dtype))
    load_seconds = time.perf_counter() - began
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, device=device)

    def choices(count: int, below: int) -> torch.Tensor:
        return torch.randint(below, (count,), device=device)

    def batches() -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            texts = encode(loaded, work.texts)
            pairs, scores = sample(loaded, texts, noise, choices)
            wait()
            sampled = time.perf_counter()
            told = update(loaded, texts, pairs, torch.randperm(len(pairs.prompts), device=device))
            wait()
            end = time.perf_counter()
            assert len(pairs.prompts) == work.pairs, "some pairs have equal scores"
            yield Batch(sampled - start, end - sampled, float(scores.mean()), fmean(u["loss"] for u in told))

    def device_peak() -> float:
        return torch.cuda.max_memory_allocated() / GIB

    def forget() -> None:
        torch.cuda.reset_peak_memory_stats()

    on_gpu = (device_peak, forget) if device == "cuda" else None
    return {"load": load_seconds, **measured(batches(), turn.repeats, on_gpu)}


if __name__ == "__main__":
    print(json.dumps(measure(turn_of(sys.argv[1]))))
