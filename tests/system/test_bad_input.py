"""A user's mistake: one clear sentence, exit code 2, no traceback, nothing overwritten."""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from spo_jax.formats.lora_write import write_lora
from tests import pictures
from tests.lora_files import random_adapters
from tests.system.commands import ROOT, command, environment, mistake, run
from tests.system.forks import run_forked

MODEL = ROOT / "spo_jax" / "emoji" / "model"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped pipeline, to be damaged."""
    return shutil.copytree(MODEL, tmp_path / "model")


def refused(arguments, *words):
    check(mistake(arguments), words)


def refused_by_the_command(arguments, *words, run=run_forked):
    """The same, of a command in a process of its own: exit code and output too."""
    result = run(arguments, environment())
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("spo_jax: error: "), result.stderr
    assert "Traceback" not in result.stderr
    check(last, words)


def check(sentence, words):
    assert len(sentence.splitlines()) == 1
    for word in words:
        assert str(word) in sentence, sentence


def edit(path, change):
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_unknown_config_key(tmp_path):
    refused_by_the_command(command(tmp_path / "w", train__learning_rat=1.0), "learning_rat")
    assert not (tmp_path / "w").exists()


def test_value_of_the_wrong_type(tmp_path):
    refused_by_the_command(command(tmp_path / "w", train__learning_rate="fast"), "fast")


def test_impossible_value(tmp_path):
    refused_by_the_command(command(tmp_path / "w", sampling__num_candidates=1), "sampling.num_candidates", "at least 2")
    assert not (tmp_path / "w").exists()


def test_missing_weight_file(tmp_path, model):
    (model / WEIGHTS).unlink()
    refused(command(tmp_path / "w", model=model), WEIGHTS, "does not exist")
    assert not (tmp_path / "w").exists()


def test_truncated_weight_file(tmp_path, model):
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(command(tmp_path / "w", model=model), WEIGHTS, "truncated")
    assert not (tmp_path / "w").exists()


def test_missing_key(tmp_path, model):
    edit(model / WEIGHTS, lambda tensors: tensors.pop("conv_in.weight"))
    refused(command(tmp_path / "w", model=model), WEIGHTS, "conv_in.weight")


def test_left_over_key(tmp_path, model):
    edit(model / WEIGHTS, lambda tensors: tensors.update({"conv_between.weight": np.zeros(3, np.float32)}))
    refused(command(tmp_path / "w", model=model), WEIGHTS, "conv_between.weight")


def test_start_from_adapters_of_a_text_encoder(tmp_path):
    start = tmp_path / "start"
    write_lora(start, random_adapters(pictures.emoji_pipeline().params))
    refused(command(tmp_path / "w", lora__init=start), start, "the text encoder too", "--format=pipeline")
    assert not (tmp_path / "w").exists()


def test_start_with_a_strength_that_is_no_number(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    refused(command(tmp_path / "w", lora__init=f"{start}:strong"), f"{start}:strong", "strength, a number")
    assert not (tmp_path / "w").exists()


def test_empty_prompt_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n", encoding="utf-8")
    refused(command(tmp_path / "w", prompts=tmp_path / "prompts.txt"), "prompts.txt", "empty")
    assert not (tmp_path / "w").exists()


def test_prompt_file_that_is_not_utf8(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a café".encode("latin-1"))
    refused(command(tmp_path / "w", prompts=tmp_path / "prompts.txt"), "prompts.txt", "not UTF-8")


def test_workdir_of_another_config(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text('{"seed": 3}', encoding="utf-8")
    refused(command(tmp_path / "w"), tmp_path / "w", "another config")
    assert (tmp_path / "w" / "config.json").read_text(encoding="utf-8") == '{"seed": 3}'
    assert len(list((tmp_path / "w").iterdir())) == 1


def test_parts_that_do_not_belong_together(tmp_path, model):
    config = model / "unet" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"in_channels": 4', '"in_channels": 9'), "utf-8")
    refused(command(tmp_path / "w", model=model), model / "unet", "9 channels", "inpainting")
    assert not (tmp_path / "w").exists()


def test_weights_that_are_not_finite(tmp_path, model):
    edit(model / WEIGHTS, lambda tensors: tensors["conv_out.bias"].fill(np.nan))
    refused(command(tmp_path / "w", model=model), WEIGHTS, "'conv_out.bias'", "not finite")
    assert not (tmp_path / "w").exists()


def test_loss_that_is_not_finite(tmp_path, model):
    edit(model / WEIGHTS, lambda tensors: tensors.update({"conv_out.bias": np.full(4, 3e38, np.float32)}))
    refused_by_the_command(command(tmp_path / "w", model=model), "not finite", "batch 1", run=run)
    assert not (tmp_path / "w" / "pytorch_lora_weights.safetensors").exists()
