"""The training command: what it writes, that it compiles once, survives SIGKILL, and does not depend on devices."""

import json
import re

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from spo_jax.formats.lora import read_adapters, read_lora
from spo_jax.formats.lora_write import KOHYA_FILE_NAME, write_kohya
from spo_jax.formats.pipeline import read_unet
from spo_jax.runs.metrics import read_metrics
from tests.lora_files import products, random_adapters
from tests.small_pipeline import small_pipeline
from tests.system.commands import ROOT, command, environment, kill_after, run, signal_after

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two and a half batches: six batches are more than two epochs, and each epoch's last batch wraps around."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lines = (ROOT / "spo_jax/emoji/prompts/spo.txt").read_text(encoding="utf-8").splitlines()[:20]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def train_command(workdir, prompts, **changes):
    """Six batches, with the small UNet."""
    return command(workdir, model=small_pipeline(), prompts=prompts, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, prompts):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(train_command(workdir, prompts), environment() | {"JAX_LOG_COMPILES": "1"})
    assert result.returncode == 0, result.stderr
    return workdir, result


def numbers(workdir):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(workdir / "metrics.jsonl")]


def test_evidence_is_written(undisturbed):
    workdir, _ = undisturbed
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    for model in ("base", "tuned"):
        assert set(summary[model]) == {"preference_score", "colorfulness", "alignment_top1"}
    assert {"win_rate", "base_std", "seconds", "seed", "config"} <= set(summary)
    assert set(summary["win_rate"]) == {"colorfulness", "preference_score"}
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    expected = "loss preference_score_mean preference_score_std valid_fraction win_ratio lose_ratio win_clipped"
    expected += " lose_clipped grad_norm seconds_pool seconds_score seconds_update"
    assert set(expected.split()) <= set(rows[0])
    assert any(row["num_pairs"] > 8 for row in rows), "the test should need several updates a batch"
    report = (workdir / "report.html").read_text(encoding="utf-8")
    assert "http" not in report and "data:image/png" in report
    assert list((workdir / "tensorboard").glob("events.*"))
    assert len(list((workdir / "checkpoints").iterdir())) == 2
    card = (workdir / "README.md").read_text(encoding="utf-8")
    assert "training prompts, 20 |" in card
    compile(*re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE), "card", "exec")


def test_every_program_compiles_once(undisturbed):
    """Also the one that measures base and tuned model."""
    _, result = undisturbed
    for program in ("pool", "score", "arrange", "exchange", "update", "measure_batch"):
        count = result.stderr.count(f"Finished XLA compilation of jit({program})")
        assert count == 1, f"{program} was compiled {count} times"


def test_disturbed_run_goes_on_and_ends_bit_identical(undisturbed, tmp_path, prompts):
    """SIGTERM, then the newest checkpoint is cut off, then SIGKILL; then the same command to the end."""
    workdir, _ = undisturbed
    arguments, env = train_command(tmp_path, prompts), environment()
    code, output, errors = signal_after(2, tmp_path, arguments, env)
    assert code == 0, errors
    found = re.fullmatch(r"Stopped by SIGTERM after batch (\d); run the same command again to go on\.\n", output)
    assert found, output
    stopped = int(found[1])
    assert 2 <= stopped <= 4, "soon after the signal"
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == stopped
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert int(newest.name) == stopped
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")

    errors = kill_after(5, tmp_path, arguments, env)
    warning = f"warning: checkpoint {newest} is damaged (state/manifest.ocdbt is not what was written); going on from"
    assert f"{warning} checkpoint {stopped - 1} instead" in errors
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 6
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / LORA).read_bytes() == (workdir / LORA).read_bytes()
    assert numbers(tmp_path) == numbers(workdir)


def test_eight_devices_and_then_one_give_the_result_of_one(undisturbed, tmp_path, prompts):
    workdir, _ = undisturbed
    arguments = train_command(tmp_path, prompts)
    code, _, errors = signal_after(3, tmp_path, arguments, environment(num_devices=8))
    assert code == 0, errors
    result = run([*arguments, "--config.checkpoint.every=4"], environment())  # such keys may change as well
    assert result.returncode == 0, result.stderr
    ours, theirs = (safetensors.numpy.load_file(folder / LORA) for folder in (tmp_path, workdir))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5, err_msg=key)


def test_a_run_that_starts_from_adapters_and_finds_no_pair_writes_the_same(undisturbed, tmp_path, prompts):
    workdir, _ = undisturbed
    start = {"lora__init": workdir, "num_batches": 1, "pairs__threshold": 0.999999}
    result = run(train_command(tmp_path, prompts, **start), environment())
    assert result.returncode == 0, result.stderr
    assert [row["num_pairs"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert (tmp_path / LORA).read_bytes() == (workdir / LORA).read_bytes()


def test_a_run_from_adapters_of_all_layers_trains_all_of_them_and_goes_on(tmp_path, prompts):
    """Each layer keeps its rank in the file. On two devices; both files that the run writes hold the same adapters."""
    params = {"unet": read_unet(small_pipeline() / "unet")[1]}
    start = write_kohya(tmp_path / "start.safetensors", random_adapters(params), params["unet"])
    workdir = tmp_path / "w"
    changes = {"lora__init": f"{start}:0.5", "num_batches": 2, "mesh__data": 1, "mesh__fsdp": 2}
    arguments, env = train_command(workdir, prompts, **changes), environment(num_devices=2)
    code, output, errors = signal_after(1, workdir, arguments, env)
    assert code == 0 and "after batch 1;" in output, errors
    assert "its layers keep rank 2 and 3, where config.lora.rank is 4; " in errors
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr
    before, after = read_adapters([f"{start}:0.5"], params), read_lora(workdir / KOHYA_FILE_NAME, params)
    chex.assert_trees_all_equal_shapes(before, after)
    same = jax.tree_util.tree_map_with_path(lambda path, x, y: np.array_equal(x, y) and str(path), before, after)
    assert not [path for path in jax.tree.leaves(same) if path], "all of them are trained"
    chex.assert_trees_all_equal(products(after), products(read_lora(workdir, params)))


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_diffusers_and_peft_make_the_same_picture_with_the_adapters(undisturbed, tmp_path, strength):
    """From the same latents, at most 2/255 apart; also with adapters a hundred times as strong."""
    from tests import pictures

    workdir, _ = undisturbed
    folder = small_pipeline()
    tensors = safetensors.numpy.load_file(workdir / LORA)
    tensors = {k: v * (strength if "lora_B" in k else 1.0) for k, v in tensors.items()}
    safetensors.numpy.save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / LORA)
    with_lora = pictures.ours(read_lora(tmp_path, {"unet": read_unet(folder / "unet")[1]}), folder=folder)
    assert np.abs(with_lora - pictures.theirs(folder, tmp_path / LORA)).max() <= 2
    if strength > 1:
        assert np.abs(with_lora - pictures.ours(folder=folder)).max() > 10, "the adapters should show"


def test_full_fine_tuning_writes_a_pipeline_that_diffusers_reads(tmp_path):
    """With everything on that saves memory; and the finished run can be started again."""
    from tests import pictures

    changes = {
        "model": small_pipeline(),
        "lora__rank": 0,
        "num_batches": 2,
        "train__optimizer": "adafactor",
        "train__accumulation_steps": 2,
    }
    changes |= {
        "train__ema_decay": 0.5,
        "train__learning_rate": 1e-3,
        "remat": True,
        "offload": True,
        "scorer__chunk": 1,
    }
    workdir = tmp_path / "w"
    for _ in range(2):
        result = run(command(workdir, **changes), environment())
        assert result.returncode == 0, result.stderr
    assert not (workdir / LORA).exists()
    theirs = pictures.theirs(workdir / "model")
    assert np.abs(theirs - pictures.ours(folder=workdir / "model")).max() <= 2
    assert np.abs(theirs - pictures.ours(folder=small_pipeline())).max() > 2, "training should show"
