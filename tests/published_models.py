"""Small models in the layout of the repositories that the configs name, for ``tests/hub_server.py``."""

import functools
import hashlib
import io
import json

import safetensors.numpy
import torch

from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.formats.hub import local
from spo_jax.formats.remote import parse_remote
from tests.hub_server import files_of

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PREFERENCE_MODELS = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
CLIP_L14 = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
NOT_READ = {
    "README.md": b"a page",
    "modeling_evil.py": b"raise SystemExit",
    "v1-5-pruned.safetensors": b"0" * 2000,
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"0" * 2000,
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"0" * 2000,
}


PIPELINE = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")


@functools.cache
def repositories() -> dict[str, dict[str, bytes]]:
    """What ``configs/sd15.py`` and ``configs/spm_sd15.py`` need: the emoji models, whose pictures differ in score."""
    emoji = files_of(local("emoji:model"))
    pipeline = {path: content for path, content in emoji.items() if path.split("/")[0] in PIPELINE}
    captions = local("emoji:prompts/spo.txt").read_text(encoding="utf-8").splitlines()
    training, held_out = parse_remote(PROMPT_SETS["spo-4k"]), parse_remote(PROMPT_SETS["pickapic-test"])
    return {
        SD15: pipeline | NOT_READ,
        PREFERENCE_MODELS: preference_models(("sd-v1-5", "sdxl")),
        CLIP_L14: files_of(local("emoji:model/clip")),
        PICKSCORE: files_of(local("emoji:model/clip")),
        f"github:{training.repo}": {training.inside: json.dumps([{"caption": c} for c in captions[:24]]).encode()},
        f"github:{held_out.repo}": {held_out.inside: json.dumps([{"prompt": c} for c in captions[24:32]]).encode()},
    }


def preference_models(names: tuple[str, ...]) -> dict[str, bytes]:
    """The emoji preference model in the published layout; the published ones have no config, being a ViT-H/14."""
    scorer = local("emoji:model/scorer")
    weights = safetensors.numpy.load_file(scorer / "model.safetensors")
    content = io.BytesIO()
    prefix = "model."
    torch.save({prefix + key.removeprefix(prefix): torch.from_numpy(value) for key, value in weights.items()}, content)
    files = {f"{name}_step-aware_preference_model.bin": content.getvalue() for name in names}
    return files | {"config.json": (scorer / "config.json").read_bytes()}


def prompts_as_served(files: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """The two prompt files of a config with the checksums of what is served in their place: texts are not shipped."""
    names = {"config.prompts": PROMPT_SETS["spo-4k"], "config.evaluation.prompts": PROMPT_SETS["pickapic-test"]}
    given = {}
    for key, name in names.items():
        remote = parse_remote(name)
        digest = hashlib.sha256(files[f"github:{remote.repo}"][remote.inside]).hexdigest()
        given[key] = name.replace(remote.sha256, digest)
    return given
