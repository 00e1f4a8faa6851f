"""Training of a preference model by the command: what it writes, that it survives SIGKILL and damaged records."""

import json
import re
import shutil
import sys
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.data.builder import write_split
from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_clip
from spo_jax.formats.safetensors_io import read_tensors
from spo_jax.runs.metrics import read_metrics
from tests.preference_data import DAMAGE, damage, record
from tests.small_pipeline import small_pipeline
from tests.system.commands import command, environment, kill_after, mistake, run, signal_after
from tests.system.forks import run_forked

BATCH, RECORDS, EPOCHS = 16, 160, 2  # ten steps are an epoch
TEN_WAYS = list(DAMAGE)[:10]
SMALL = {
    "num_steps": 20,
    "train.batch_size": BATCH,
    "train.warmup_steps": 4,
    "train.ema_decay": 0.5,
    "log_every": 1,
    "checkpoint.every": 2,
    "validation.every": 10,
    "validation.num_pairs": 20,
    "validation.batch_size": 8,
    "validation.timesteps": "(0, 701)",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten training records are damaged, in ten ways; 30 good ones to validate, a third of them ties."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    records = [record(i) for i in range(RECORDS)]
    for i, how in enumerate(TEN_WAYS):
        records[16 * i] = damage(records[16 * i], how)
    write_split(folder, "train", records)
    write_split(folder, "validation", [record(i) for i in range(2000, 2030)])
    return folder


def spm_command(workdir, data, **overrides):
    options = SMALL | {"model": small_pipeline()}
    options |= {"data.train": f"{data}@train", "data.validation": f"{data}@validation"} | overrides
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "spo_jax.main", "--config=configs/spm_tiny.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(spm_command(workdir, data), environment() | {"JAX_LOG_COMPILES": "1"})
    assert result.returncode == 0, result.stderr
    return workdir, result


def numbers(workdir):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(workdir / "metrics.jsonl")]


def test_evidence_is_written_and_the_update_compiles_once(undisturbed):
    workdir, result = undisturbed
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert summary["best_step"] in (10, 20)
    for model in ("start", "best", "last"):
        assert list(summary["accuracy"][model]) == ["0", "701"]
        row = summary["accuracy"][model]["701"]
        low, high = row["accuracy"]["scorer"]["interval"]
        assert low <= row["accuracy"]["scorer"]["value"] <= high
        assert set(row["gain"]) == {"told_0"}
    # Before training the time layers change nothing, so the timestep makes no difference.
    assert summary["accuracy"]["start"]["701"]["gain"]["told_0"]["value"] == 0
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    for file in ("report.html", "README.md"):
        assert "gain of knowing t" in (workdir / file).read_text(encoding="utf-8")
    expected = "loss accuracy grad_norm learning_rate records_used records_skipped records_unlabelled num_pairs"
    assert set(expected.split()) <= set(rows[0])
    assert [row["step"] for row in rows if "accuracy_t701" in row] == [10, 20]
    rates = [row["learning_rate"] for row in rows]
    assert rates[3] == pytest.approx(3e-4 * 3 / 4) and rates[4] > rates[5] > rates[-1] > 0, "up, then down"
    assert list((workdir / "tensorboard").glob("events.*"))
    assert len(list((workdir / "checkpoints").iterdir())) == 2
    assert result.stderr.count("Finished XLA compilation of jit(update)") == 1


def test_damaged_records_are_counted_and_every_good_one_is_used_once_an_epoch(undisturbed, data):
    workdir, _ = undisturbed
    records = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))["records"]
    once = Counter(DAMAGE[how][1] for how in TEN_WAYS) | Counter(used=RECORDS - 10)
    assert {name: n for name, n in records.items() if n} == {name: EPOCHS * n for name, n in once.items()}
    # Damaged records are not among the pairs of any loss.
    assert sum(row["num_pairs"] for row in read_metrics(workdir / "metrics.jsonl")) == records["used"]
    loader = PairLoader(open_pairs(f"{data}@train"), batch_size=BATCH, size=(32, 32), seed=0, num_workers=0)
    batches = [next(loader) for _ in range(EPOCHS * RECORDS // BATCH)]
    assert records == loader.state()["counts"]
    good = sorted(f"caption {i}" for i in range(RECORDS) if i % 16)
    for epoch in np.split(np.array([batch.captions for batch in batches]).ravel(), EPOCHS):
        assert sorted(caption for caption in epoch if caption) == good


def test_disturbed_run_goes_on_and_ends_bit_identical(undisturbed, tmp_path, data):
    """SIGTERM to the run and its workers in the first epoch, SIGKILL in the second, then the command to the end."""
    workdir, _ = undisturbed
    arguments, env = spm_command(tmp_path, data), environment()
    code, output, errors = signal_after(5, tmp_path, arguments, env)
    assert code == 0, errors
    assert re.fullmatch(r"Stopped by SIGTERM after step [5-9]; run the same command again to go on\.\n", output), output
    # The number of workers may change.
    kill_after(13, tmp_path, spm_command(tmp_path, data, **{"data.num_workers": 1}), env)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 20
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr
    for file in ("best/model.safetensors", "last/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (workdir / file).read_bytes()
    assert numbers(tmp_path) == numbers(workdir)
    ours, theirs = (json.loads((w / "summary.json").read_text(encoding="utf-8")) for w in (tmp_path, workdir))
    assert ours["accuracy"] == theirs["accuracy"] and ours["records"] == theirs["records"]


@pytest.mark.slow  # in the suite: tests/spm/test_spm.py, without the command
def test_eight_devices_that_split_the_weights_give_the_numbers_of_one(undisturbed, tmp_path, data):
    """They go on from the last checkpoint but one of the run on one device."""
    workdir, _ = undisturbed
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    changes = {"mesh.fsdp": 8, "chunk": 8, "data.num_workers": 1}
    result = run(spm_command(tmp_path, data, **changes), environment(num_devices=8))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoints" / "20").is_dir(), "computed once more"
    for ours, theirs in zip(numbers(tmp_path), numbers(workdir), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4 if key == "grad_norm" else 1e-5), key


def test_spo_takes_the_model_by_its_path(undisturbed, tmp_path):
    """SPO trains the emoji UNet with it, as the demo does."""
    workdir, _ = undisturbed
    arguments = command(tmp_path, scorer__path=workdir / "best", num_batches=1)
    result = run(arguments, environment())
    assert result.returncode == 0, result.stderr
    keys = read_tensors(workdir / "best" / "model.safetensors")
    assert "model.t_embedder.mlp.0.weight" in keys and "model.vision_model.adaLN_modulation.1.bias" in keys
    clip, params = read_clip(workdir / "last", step_aware=True)
    start = read_clip(local("emoji:model/clip"), step_aware=True)[1]
    moved = params["vision_model"]["encoder"]["layers_0"]["adaLN_modulation_1"]["kernel"]
    assert clip.step_aware and jnp.abs(moved).max() > 0, "the time layers learn"
    assert jnp.abs(params["visual_projection"]["kernel"] - start["visual_projection"]["kernel"]).max() > 1e-5


def test_a_model_without_the_timestep_from_labels_of_a_judge(tmp_path, data):
    """With the options that the other runs leave off; the result is a plain CLIP folder."""
    changes = {"scorer.step_aware": False, "labels.judge": "emoji:model/clip", "train.accumulation_steps": 2}
    changes |= {"remat": True, "train.ema_decay": 0.5, "scorer.dtype": "float32", "num_steps": 2, "log_every": 1}
    changes |= {
        "validation.plain": "emoji:model/clip",
        "validation.every": 2,
        "checkpoint.every": 2,
        "train.warmup_steps": 1,
    }
    result = run(spm_command(tmp_path, data, **changes), environment())
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["records"]
    assert sum(records.values()) == 2 * 2 * BATCH
    assert sum(row["num_pairs"] for row in read_metrics(tmp_path / "metrics.jsonl")) == records["used"]
    assert "visual_projection.weight" in read_tensors(tmp_path / "best" / "model.safetensors")
    assert not read_clip(tmp_path / "best", step_aware=None)[0].step_aware
    accuracy = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["accuracy"]
    assert accuracy["start"]["701"]["gain"]["plain"]["value"] == 0, "it starts as the plain model"
    assert set(accuracy["best"]["701"]["accuracy"]) == {"scorer", "plain"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.train": "nowhere@train"}, ["nowhere", "spo_jax.prepare"]),
        ({"data.validation": "{data}@test"}, ["test", "train, validation"]),
        ({"log_every": 2, "checkpoint.every": 3}, ["config.checkpoint.every", "multiple of log_every"]),
        ({"train.warmup_steps": 20}, ["config.train.warmup_steps"]),
        ({"chunk": 24}, ["config.chunk", "divisor"]),
        ({"validation.timesteps": "(0, 1000)"}, ["config.validation.timesteps", "last timestep is 999"]),
        ({"scorer.init": "nowhere"}, ["nowhere"]),
        ({"validation.plain": "nowhere"}, ["nowhere"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, data, changes, words):
    changes = {key: value.format(data=data) if isinstance(value, str) else value for key, value in changes.items()}
    sentence = mistake(spm_command(tmp_path / "w", data, **changes))
    assert len(sentence.splitlines()) == 1
    for word in words:
        assert word in sentence
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "dpo"}, ["config.method", "dpo", "sampling"]),
        ({"method": "ppo"}, ["config.method", "spo or dpo or spm"]),
        ({"data.validation": "nowhere@validation"}, ["nowhere", "spo_jax.prepare"]),
        ({"data.strict": True}, ["Record", "config.data.strict"]),
    ],
)
def test_a_mistake_ends_with_one_sentence(tmp_path, data, changes, words):
    result = run_forked(spm_command(tmp_path / "w", data, **changes), environment())
    assert result.returncode == 2, result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("spo_jax: error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in message
    assert "data.strict" in changes or not (tmp_path / "w").exists()
