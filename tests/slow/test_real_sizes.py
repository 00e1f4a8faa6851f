"""Models of the published sizes with random weights, on a CPU: about ten minutes and 16 GB of memory each.

bash launch/test.sh -m slow -n 0 -s tests/slow
"""

import json
import math
import resource
import shutil
import subprocess
import sys
import time

import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy

from spo_jax.formats.hub import local
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import AutoencoderKL, CLIPModel, CLIPTextModel, UNet2DConditionModel, published
from spo_jax.runs.metrics import read_metrics
from tests.system.commands import ROOT, environment

pytestmark = pytest.mark.slow
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def random_params(shapes, seed=0):
    """float16 weights that keep activations at their size: kernels of variance 1 / fan-in, scales 1, biases 0."""
    generator = np.random.default_rng(seed)
    pool = generator.standard_normal(2**20 + 7, dtype=np.float32)

    def draw(path, shape):
        if path[-1] in ("scale", "bias", "logit_scale"):
            return np.full(shape, float(path[-1] != "bias"), np.float16)
        spread = 1 / math.sqrt(math.prod(shape[:-1])) if path[-1] == "kernel" else 0.02
        start = generator.integers(len(pool))
        return (spread * np.resize(np.roll(pool, start), shape)).astype(np.float16)

    flat = flax.traverse_util.flatten_dict(shapes)
    return flax.traverse_util.unflatten_dict({path: draw(path, leaf.shape) for path, leaf in flat.items()})


def write_model(folder, weights, config, shapes, prefix=""):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_params(folder / weights, random_params(shapes), dtype=np.float16, prefix=prefix)


def write_sd15(folder):
    """A pipeline folder in the published layout; its tokenizer is the emoji one, at CLIP's length."""
    parts = {
        "unet": (DIFFUSERS, published.UNET_SD15, UNet2DConditionModel),
        "vae": (DIFFUSERS, published.VAE_SD, AutoencoderKL),
        "text_encoder": (TRANSFORMERS, published.TEXT_VIT_L, CLIPTextModel),
    }
    for name, (weights, config, model) in parts.items():
        write_model(folder / name, weights, config, network_shapes(model.from_config(config)))
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(local("emoji:model") / name, folder / name)
    shutil.copy(local("emoji:model") / "model_index.json", folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published.SCHEDULER_SD15), encoding="utf-8")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text(encoding="utf-8")) | {"model_max_length": 77}
    tokenizer.write_text(json.dumps(settings), encoding="utf-8")


def timed(arguments, **kwargs):
    """Runs a command and says how long it took and how much memory the largest command so far needed."""
    start = time.time()
    result = subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True, **kwargs)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{time.time() - start:.0f} s, at most {peak:.1f} GiB so far: {' '.join(arguments)[:120]}")
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_one_iteration_of_sd15(tmp_path):
    """``configs/sd15.py`` from the prompts to the report: 256 pixels, 1 prompt, k = 2, 4 steps."""
    write_sd15(tmp_path / "sd15")
    config = published.CLIP_VIT_H
    shapes = network_shapes(CLIPModel.from_config(config, step_aware=True))
    write_model(tmp_path / "scorer", TRANSFORMERS, config, shapes, prefix="model.")
    config = json.loads((local("emoji:model") / "clip" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = 77
    write_model(
        tmp_path / "judge", TRANSFORMERS, config, network_shapes(CLIPModel.from_config(config, step_aware=False))
    )
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": "a red apple"}]), encoding="utf-8")

    options = {"model": "sd15", "scorer.path": "scorer", "evaluation.judge": "judge"}
    options |= {"prompts": "prompts.json", "evaluation.prompts": "prompts.json"}
    options = {name: tmp_path / value for name, value in options.items()}
    options |= {"dtype": "float32", "num_batches": 1, "prompts_per_batch": 1, "scorer.chunk": 1, "remat": True}
    options |= {"sampling.height": 256, "sampling.width": 256, "sampling.num_steps": 4, "sampling.num_plain_steps": 1}
    options |= {"sampling.num_candidates": 2, "pairs.threshold": 0.0, "train.minibatch_size": 1}
    options |= {"evaluation.num_prompts": 1, "evaluation.batch_size": 1, "validation.every": 0}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    workdir = tmp_path / "w"
    arguments = [sys.executable, "-m", "spo_jax.main", "--config=configs/sd15.py", f"--workdir={workdir}", *flags]
    timed(arguments, env=environment())

    (row,) = read_metrics(workdir / "metrics.jsonl")
    assert row["num_pairs"] == row["num_updates"] == 3
    np.testing.assert_allclose(row["loss"], math.log(2), atol=0.05)
    assert row["grad_norm"] > 0
    adapters = safetensors.numpy.load_file(workdir / "pytorch_lora_weights.safetensors")
    assert len(adapters) == 32 * 4 * 2, "to_q, to_k, to_v and to_out of 32 attentions"
    assert (workdir / "report.html").is_file()


THEIRS = """
import sys, numpy as np, torch, json, safetensors.torch
from diffusers import UNet2DConditionModel
folder = sys.argv[1]
with torch.device("meta"):
    unet = UNet2DConditionModel.from_config(json.load(open(f"{folder}/unet/config.json")))
weights = safetensors.torch.load_file(f"{folder}/unet/diffusion_pytorch_model.safetensors")
unet.load_state_dict({k: weights.pop(k).float() for k in list(weights)}, assign=True)
x = {k: torch.from_numpy(v) for k, v in np.load(f"{folder}/inputs.npz").items()}
added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
with torch.no_grad():
    y = unet(x["latents"].permute(0, 3, 1, 2), x["t"], x["context"], added_cond_kwargs=added).sample
np.save(f"{folder}/theirs.npy", y.permute(0, 2, 3, 1).numpy())
"""
OURS = """
import sys, jax, numpy as np
from pathlib import Path
from spo_jax.formats.pipeline import read_unet
from spo_jax.types import AddedConditions
folder = Path(sys.argv[1])
unet, params = read_unet(folder / "unet")
x = np.load(folder / "inputs.npz")
added = AddedConditions(x["pooled"], x["time_ids"])
y = jax.jit(unet.apply)({"params": params}, x["latents"], x["t"], x["context"], added)
np.save(folder / "ours.npy", y)
"""


def test_forward_pass_of_the_sdxl_unet_is_that_of_pytorch(tmp_path):
    """float32 computation with float16 weights, 256 pixels; tolerance 1e-4 of the output's spread."""
    config = published.UNET_SDXL
    shapes = network_shapes(UNet2DConditionModel.from_config(config))
    write_model(tmp_path / "unet", DIFFUSERS, config, shapes)
    generator = np.random.default_rng(0)
    inputs = {"latents": (1, 32, 32, 4), "context": (1, 77, 2048), "pooled": (1, 1280)}
    inputs = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in inputs.items()}
    time_ids = np.array([[256, 256, 0, 0, 256, 256]], np.float32)
    np.savez(tmp_path / "inputs.npz", **inputs, time_ids=time_ids, t=np.array([501.0], np.float32))
    for code in (THEIRS, OURS):
        timed([sys.executable, "-c", code, str(tmp_path)], env=environment())
    theirs, ours = np.load(tmp_path / "theirs.npy"), np.load(tmp_path / "ours.npy")
    print(f"largest difference {np.abs(ours - theirs).max():.2e}, spread {theirs.std():.3f}")
    assert np.isfinite(theirs).all() and theirs.std() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.std())
