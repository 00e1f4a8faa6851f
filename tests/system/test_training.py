"""The training command: what it writes, that it compiles once, survives SIGKILL, and does not depend on devices."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
import safetensors.numpy

from spo_jax.training.metrics import read_metrics
from tests.system.commands import ROOT, command, environment, run

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two and a half batches: six batches are more than two epochs, and each epoch's last batch wraps around."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lines = (ROOT / "spo_jax/emoji/prompts/spo.txt").read_text(encoding="utf-8").splitlines()[:20]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache, prompts):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(command(workdir, prompts=prompts), environment(cache) | {"JAX_LOG_COMPILES": "1"})
    assert result.returncode == 0, result.stderr
    return workdir, result


def numbers(workdir):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(workdir / "metrics.jsonl")]


def test_evidence_is_written(undisturbed):
    workdir, _ = undisturbed
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    for model in ("base", "tuned"):
        assert set(summary[model]) == {"preference_score", "colorfulness", "alignment_top1"}
    assert {"win_rate", "win_rate_preference_score", "seconds", "seed", "config"} <= set(summary)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = "loss preference_score_mean preference_score_std valid_fraction win_ratio lose_ratio win_clipped"
    expected += " lose_clipped grad_norm seconds_sample seconds_score seconds_update"
    assert set(expected.split()) <= set(rows[0])
    assert any(row["num_pairs"] > 8 for row in rows), "the test should need several updates a batch"
    report = (workdir / "report.html").read_text(encoding="utf-8")
    assert "http" not in report and "data:image/png" in report
    assert list((workdir / "tensorboard").glob("events.*"))
    assert len(list((workdir / "checkpoints").iterdir())) == 2


def test_pool_and_update_compile_once(undisturbed):
    _, result = undisturbed
    for program in ("collect", "update"):
        count = result.stderr.count(f"Finished XLA compilation of jit({program})")
        assert count == 1, f"{program} was compiled {count} times"


def test_killed_run_goes_on_and_ends_bit_identical(undisturbed, tmp_path, cache, prompts):
    """SIGKILL in the middle of the first and of the second epoch, then the same command to the end."""
    workdir, _ = undisturbed
    arguments, env = command(tmp_path, prompts=prompts), environment(cache)
    for rows_before_kill in (2, 4):
        process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(read_metrics(tmp_path / "metrics.jsonl")) < rows_before_kill:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 6
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / LORA).read_bytes() == (workdir / LORA).read_bytes()
    assert numbers(tmp_path) == numbers(workdir)


def test_eight_devices_give_the_result_of_one(undisturbed, tmp_path, cache, prompts):
    workdir, _ = undisturbed
    result = run(command(tmp_path, prompts=prompts), environment(cache, num_devices=8))
    assert result.returncode == 0, result.stderr
    ours, theirs = (safetensors.numpy.load_file(folder / LORA) for folder in (tmp_path, workdir))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_diffusers_and_peft_make_the_same_picture_with_the_adapters(undisturbed, tmp_path, strength):
    """From the same latents, at most 2/255 apart; also with adapters a hundred times as strong."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from spo_jax.checkpoints.lora import read_lora
    from spo_jax.checkpoints.pipeline import read_pipeline
    from spo_jax.diffusion.schedule import make_schedule
    from spo_jax.emoji import resolve
    from spo_jax.generate import draw_noise
    from spo_jax.images import to_uint8
    from spo_jax.training.evaluation import encode_prompts
    from spo_jax.training.rollout import make_encode, make_generate

    workdir, _ = undisturbed
    tensors = safetensors.numpy.load_file(workdir / LORA)
    tensors = {k: v * (strength if "lora_B" in k else 1.0) for k, v in tensors.items()}
    safetensors.numpy.save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / LORA)
    folder, steps = resolve("emoji:model"), 10
    prompts = ["a red apple on a teal background", "a fox on a blue background"]
    pipeline = read_pipeline(folder)
    latents, _ = draw_noise(0, 0, 2, pipeline.latent_shape, steps)
    encoded = encode_prompts(make_encode(pipeline, scorer=None), pipeline.params, pipeline, None, prompts)
    generate = make_generate(pipeline, make_schedule(pipeline.scheduler_config, steps), guidance_scale=5.0, eta=0.0)
    lora = read_lora(tmp_path, pipeline.params["unet"])
    without, with_lora = (
        to_uint8(generate(pipeline.params, variables, encoded, latents)).astype(int)
        for variables in ({"params": pipeline.params["unet"]}, {"params": pipeline.params["unet"], "lora": lora})
    )

    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(tmp_path), weight_name=LORA)
    images = theirs(
        prompts,
        latents=torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2)),
        num_inference_steps=steps,
        guidance_scale=5.0,
        eta=0.0,
        output_type="np",
    ).images
    theirs_uint8 = np.round(images * 255).astype(int)
    assert np.abs(with_lora - theirs_uint8).max() <= 2
    if strength > 1:
        assert np.abs(with_lora - without).max() > 10, "the adapters should show"
