"""Training on given pairs by the command: what it writes, that it goes on bit for bit, and its reference with it."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict

from spo_jax.data.builder import write_split
from spo_jax.formats.lora_write import write_lora
from spo_jax.formats.pipeline import read_unet
from spo_jax.models.lora import TARGETS
from spo_jax.runs.metrics import REWARDS, read_metrics
from tests.lora_files import random_adapters
from tests.preference_data import DAMAGE, damage, record
from tests.small_pipeline import small_pipeline
from tests.system.commands import environment, kill_after, mistake, run, signal_after
from tests.system.forks import run_forked

LORA = "pytorch_lora_weights.safetensors"
UNET = dict(
    sample_size=16,
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=2,
)
BATCH, ACCUMULATED, RECORDS = 8, 2, 56
SMALL = {
    "num_steps": 8,
    "train.batch_size": BATCH,
    "train.accumulation_steps": ACCUMULATED,
    "train.warmup_steps": 2,
    "log_every": 1,
    "checkpoint.every": 2,
    "validation.every": 4,
    "validation.num_pairs": 12,
    "validation.batch_size": 8,
    "validation.timesteps": "(50, 650)",
    "validation.num_prompts": 4,
    "sampling.num_steps": 2,
    "evaluation.num_prompts": 8,
    "evaluation.batch_size": 8,
    "evaluation.metrics": "('colorfulness',)",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The small pipeline with a UNet that is smaller still: these tests would mostly wait for its programs."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(small_pipeline(), folder)
    width = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["cross_attention_dim"]
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel(cross_attention_dim=width, **UNET).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """56 training records, a third of them ties and two damaged; an epoch is three and a half steps."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    records = [record(i) for i in range(RECORDS)]
    for i, how in ((3, "truncated"), (10, "blank")):
        records[i] = damage(records[i], how)
    write_split(folder, "train", records)
    write_split(folder, "validation", [record(i) for i in range(2000, 2030)])
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory, model):
    """Adapters to start from, which do something."""
    params = {"unet": read_unet(model / "unet")[1]}
    lora = random_adapters(params, rank=4, only=lambda part, path: path[-1] in TARGETS)
    return write_lora(tmp_path_factory.mktemp("start"), lora)


def dpo_command(workdir, model, data, **overrides):
    options = SMALL | {"model": model}
    options |= {"data.train": f"{data}@train", "data.validation": f"{data}@validation"} | overrides
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    return [sys.executable, "-m", "spo_jax.main", "--config=configs/dpo_tiny.py", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model, data, start):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(dpo_command(workdir, model, data, **{"lora.init": start}), environment() | {"JAX_LOG_COMPILES": "1"})
    assert result.returncode == 0, result.stderr
    return workdir, result


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def numbers(workdir):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(workdir / "metrics.jsonl")]


def test_evidence_is_written_and_each_program_compiles_once(undisturbed):
    workdir, result = undisturbed
    accuracy = summary_of(workdir)["held_out_accuracy"]
    assert list(accuracy) == ["4", "8"]
    for measured in accuracy.values():
        low, high = measured["interval"]
        assert 0 <= low <= measured["accuracy"] <= high <= 1 and measured["pairs"] == 12 - 12 // 3
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    errors = {f"error/{name}" for name in ("chosen", "rejected", "chosen_reference", "rejected_reference")}
    assert {*REWARDS, *errors, "loss", "grad_norm", "learning_rate", "num_pairs"} <= set(rows[0])
    measured = [row for row in rows if "held_out/accuracy" in row]
    assert [row["step"] for row in measured] == [4, 8]
    assert [row["held_out/accuracy"] for row in measured] == [found["accuracy"] for found in accuracy.values()]
    assert {f"held_out/{name}" for name in errors} <= set(measured[0])
    # The first step has the learning rate 0, so the second starts where policy and reference are the same, too. Errors
    # may be rounded in their last place; a logit is 2,500 times as large.
    for row in rows[:2]:
        assert row["loss"] == pytest.approx(np.log(2), abs=5e-4) and row["rewards/margin"] == pytest.approx(0, abs=2e-3)
        assert row["error/chosen"] == pytest.approx(row["error/chosen_reference"], rel=1e-6)
    assert abs(rows[-1]["rewards/margin"]) > 0.01
    rates = [row["learning_rate"] for row in rows[:4]]
    assert rates == pytest.approx([0, rates[2] / 2, rates[2], rates[2]]) and rates[2] > 0
    report, card = ((workdir / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert "Accuracy of the implicit reward" in report and "The same on validation pairs" in report
    assert "Diffusion-DPO" in card and "On 8 validation pairs its implicit reward prefers" in card
    sheets = sorted(path.name for path in (workdir / "validation").iterdir())
    assert sheets == ["step_000004.png", "step_000008.png"]
    assert list((workdir / "tensorboard").glob("events.*"))
    assert len(list((workdir / "checkpoints").iterdir())) == 2
    for program in ("update", "errors", "measure_batch"):
        assert result.stderr.count(f"Finished XLA compilation of jit({program})") == 1, program


def test_ties_and_damaged_records_are_counted_and_not_learned_from(undisturbed):
    workdir, _ = undisturbed
    records, rows = summary_of(workdir)["records"], read_metrics(workdir / "metrics.jsonl")
    assert sum(records.values()) == 8 * BATCH * ACCUMULATED
    assert records["tied"] > 0 and records["picture_broken"] > 0 and records["caption_missing"] > 0
    assert sum(row["num_pairs"] for row in rows) == records["used"] == rows[-1]["records_used"]
    assert rows[-1]["records_tied"] == records["tied"] and set(DAMAGE[how][1] for how in ("truncated", "blank")) == {
        name.removeprefix("skipped/") for name in rows[-1] if name.startswith("skipped/")
    }


def test_diffusers_loads_the_adapters(undisturbed, start, model):
    """Into its own UNet with peft, each of them; and all have moved from where they started."""
    workdir, _ = undisturbed
    tensors, before = (safetensors.torch.load_file(path) for path in (workdir / LORA, start))
    theirs = UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True)
    theirs.load_lora_adapter(tensors, prefix="unet", adapter_name="tuned")
    loaded = get_peft_model_state_dict(theirs, adapter_name="tuned")
    assert {f"unet.{key}" for key in loaded} == set(tensors) == set(before)
    for key, value in loaded.items():
        assert torch.equal(value, tensors[f"unet.{key}"]), key
        assert not torch.equal(value, before[f"unet.{key}"]), key


def test_a_disturbed_run_goes_on_bit_for_bit_with_the_reference_that_it_began_with(
    undisturbed, model, data, start, tmp_path_factory
):
    """SIGTERM, SIGKILL, then to the end; from the first stop on ``lora.init``'s file holds other adapters."""
    undisturbed_workdir, _ = undisturbed
    folder = tmp_path_factory.mktemp("disturbed")
    workdir, init = folder / "w", folder / "start.safetensors"
    shutil.copy(start, init)
    arguments, env = dpo_command(workdir, model, data, **{"lora.init": init}), environment()
    code, output, errors = signal_after(3, workdir, arguments, env)
    assert code == 0, errors
    assert re.fullmatch(r"Stopped by SIGTERM after step [3-5]; run the same command again to go on\.\n", output), output
    tensors = safetensors.numpy.load_file(init)
    init.unlink()
    sentence = mistake(arguments)
    assert str(init) in sentence and len(sentence.splitlines()) == 1, "only shapes are needed, but they are"
    safetensors.numpy.save_file({key: 3 * value for key, value in tensors.items()}, init)
    kill_after(6, workdir, arguments, env)
    assert len(read_metrics(workdir / "metrics.jsonl")) < 8
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr
    assert (workdir / LORA).read_bytes() == (undisturbed_workdir / LORA).read_bytes()
    assert numbers(workdir) == numbers(undisturbed_workdir)
    ours, theirs = summary_of(workdir), summary_of(undisturbed_workdir)
    for name in ("held_out_accuracy", "records", "tuned", "base"):
        assert ours[name] == theirs[name], name
    assert states_of(workdir) == states_of(undisturbed_workdir)


def states_of(workdir):
    """What the last checkpoint keeps beside the arrays, but seconds."""
    (file,) = (workdir / "checkpoints" / "8").rglob("extra/metadata")
    return {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "seconds"}


@pytest.mark.slow  # in the suite: tests/dpo, and SPO's command in test_training.py, which writes with the same function
def test_all_weights_without_validation_pairs_write_a_model(tmp_path, model, data):
    workdir = tmp_path / "w"
    changes = {"lora.rank": 0, "data.validation": "", "num_steps": 2, "checkpoint.every": 1}
    changes |= {"loss.kind": "kto", "data.drop_ties": False, "data.flip": "shared", "data.empty_prompts": 0.5}
    result = run_forked(dpo_command(workdir, model, data, **changes, **{"train.warmup_steps": 0}), environment())
    assert result.returncode == 0, result.stderr
    assert not (workdir / LORA).exists() and (workdir / "model" / "model_index.json").is_file()
    before, after = (read_unet(folder / "unet")[1] for folder in (model, workdir / "model"))
    assert not np.array_equal(before["conv_in"]["kernel"], after["conv_in"]["kernel"])
    summary = summary_of(workdir)
    assert summary["held_out_accuracy"] == {} and summary["records"]["tied"] == 0
    rows = read_metrics(workdir / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-4) and rows[-1]["loss"] != rows[0]["loss"]
    assert "held_out/accuracy" not in rows[-1]
    assert "Diffusion-KTO" in (workdir / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.train": "nowhere@train"}, ["nowhere", "spo_jax.prepare"]),
        ({"data.validation": "nowhere@train"}, ["nowhere", "spo_jax.prepare"]),
        ({"data.train": "{data}@test"}, ["test", "train, validation"]),
        ({"validation.timesteps": "(0, 1000)"}, ["config.validation.timesteps", "last timestep is 999"]),
        ({"lora.init": "nowhere"}, ["nowhere"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(tmp_path, model, data, changes, words):
    changes = {key: value.format(data=data) for key, value in changes.items()}
    sentence = mistake(dpo_command(tmp_path / "w", model, data, **changes))
    assert len(sentence.splitlines()) == 1
    for word in words:
        assert word in sentence
    assert not (tmp_path / "w").exists()
