"""Prompts, metrics, checkpoints, workdir, mesh, shipped files: what is read, written and refused."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.data.prompts import batch_indices, num_batches, read_prompts
from spo_jax.distributed.mesh import check_divisible, make_mesh
from spo_jax.emoji import world
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.lora import FILE_NAME, read_lora
from spo_jax.formats.lora_write import write_lora
from spo_jax.formats.safetensors_io import read_tensors, write_params, write_tensors
from spo_jax.formats.weights import read_params
from spo_jax.models import AutoencoderKL, CLIPModel, UNet2DConditionModel
from spo_jax.runs import checkpoint
from spo_jax.runs.metrics import MetricsWriter, read_metrics, write_summary
from spo_jax.spo.report import write_report
from spo_jax.types import TrainState


# ---------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a fox\n\n  an owl \n"),
        ("p.json", '[{"caption": "a fox", "id": 1}, {"caption": "an owl"}]'),
        ("p.json", '["a fox", "an owl"]'),
        ("P.JSON", '["a fox", "an owl"]'),
        ("p.txt", "\ufeffa fox\nan owl"),
        ("p.txt", "a fox\r\nan owl\r\n"),
    ],
)
def test_prompt_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a fox", "an owl"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"caf\xe9", "byte 3 is 0xe9"),
        ("p.json", b"[", "not valid JSON"),
        ("p.json", b"{}", "JSON list"),
        ("p.json", b'[{"title": "a"}]', "entry 0"),
        ("p.json", b"", "is empty"),
        ("p.json", b"[" * 200_000, "not valid JSON"),
        ("p.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
        ("p.json", b'["a fox", "a \\ud800 fox"]', "entry 1 is not valid Unicode"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_line_ends_at_a_newline_only(tmp_path):
    (tmp_path / "p.txt").write_text("a fox\u2028on teal\x0b\nan owl", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a fox\u2028on teal", "an owl"]


@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_prompt(count, size, seed, epoch):
    batches = num_batches(count, size)
    rows = [batch_indices(count, size, seed, epoch * batches + i) for i in range(batches)]
    assert all(len(row) == size for row in rows)
    assert set(np.concatenate(rows)) == set(range(count))
    np.testing.assert_array_equal(rows[-1], batch_indices(count, size, seed, epoch * batches + batches - 1))


# ---------------------------------------------------------------------------------------------------------- metrics
def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": float("nan")})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] is None


@pytest.mark.parametrize(
    "damage", ['{"step": 3, "lo', "[3]\n", "3\n", '{"loss": 0.3}\n', '{"step": null}\n', "\0\0\0\n"]
)
def test_metrics_are_read_up_to_the_first_damaged_row(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + damage, encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 0.5})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


# ------------------------------------------------------------------------------------------------------ checkpoints
def state(seed):
    lora = {"to_q": {"A": jax.random.normal(jax.random.key(seed), (5, 2)), "B": jnp.full((2, 3), 1 / 3)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState(jnp.int32(seed), lora, optimizer.init(lora))


def test_checkpoints_are_exact_and_only_the_newest_are_kept(tmp_path):
    manager = checkpoint.make_manager(tmp_path / "c", keep=2)
    assert checkpoint.restore_latest(manager, state(0)) is None
    for step in (1, 2, 3):
        checkpoint.save(manager, step, state(step), {"batch": step, "seconds": 0.1})
    checkpoint.close(manager)
    (tmp_path / "c" / "4.orbax-checkpoint-tmp-0").mkdir()  # what a kill leaves behind
    manager = checkpoint.make_manager(tmp_path / "c", keep=2)
    restored, extra = checkpoint.restore_latest(manager, state(0))
    assert extra == {"batch": 3, "seconds": 0.1}
    chex.assert_trees_all_equal(restored, state(3))
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"2", "3"}
    assert not (tmp_path / "c" / "1").exists()
    checkpoint.close(manager)


def test_workdir_of_another_config_is_refused_by_key(tmp_path):
    config = {"seed": 0, "train": {"learning_rate": 0.1}}
    checkpoint.check_workdir(tmp_path / "w", config)
    checkpoint.check_workdir(tmp_path / "w", config)
    with pytest.raises(UserError, match=r"config\.train\.learning_rate was 0\.1 there and is 0\.2 now"):
        checkpoint.check_workdir(tmp_path / "w", {"seed": 0, "train": {"learning_rate": 0.2}})
    assert json.loads((tmp_path / "w" / "config.json").read_text(encoding="utf-8")) == config


def test_a_run_that_is_older_than_a_key_goes_on_with_what_it_did(tmp_path):
    recorded = {"seed": 0, "train": {"learning_rate": 0.1}}
    checkpoint.check_workdir(tmp_path / "w", recorded)
    checkpoint.check_workdir(tmp_path / "w", {"seed": 0, "train": {"learning_rate": 0.1, "warmup": "linear"}})
    with pytest.raises(UserError, match=r"config\.train\.warmup was 'linear' there and is 'log' now"):
        checkpoint.check_workdir(tmp_path / "w", {"seed": 0, "train": {"learning_rate": 0.1, "warmup": "log"}})
    with pytest.raises(UserError, match=r"config\.train\.other is only in the new one"):
        checkpoint.check_workdir(tmp_path / "w", {"seed": 0, "train": {"learning_rate": 0.1, "other": 1}})


def test_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be made"):
            checkpoint.check_workdir(workdir, {"seed": 0})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# ---------------------------------------------------------------------------------------------------- safetensors
SHAPES = {
    "conv_1": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)},
    "linear_1": {"kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32), "bias": jax.ShapeDtypeStruct((5,), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def random_params(seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(generator.standard_normal(s.shape)), SHAPES)


@given(seed=st.integers(0, 100))
def test_parameters_are_written_and_read_exactly(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("p") / "m.safetensors"
    write_params(path, random_params(seed), prefix="model.")
    assert set(read_tensors(path)) == {
        "model.conv.1.weight",
        "model.linear_1.weight",
        "model.linear_1.bias",
        "model.weight",
    }
    chex.assert_trees_all_equal(read_params(path, SHAPES, prefix="model."), random_params(seed))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("linear_1.bias"), "has no key 'linear_1.bias'"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "extra"),
        (lambda t: t.update({"linear_1.bias": np.zeros(4, np.float32)}), r"'linear_1.bias' has shape \(4,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    write_params(path, random_params(0))
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    with pytest.raises(UserError, match=message):
        read_params(path, SHAPES)


@pytest.mark.parametrize("names, alpha", [(("lora_A", "lora_B"), None), (("lora.down", "lora.up"), 1.0)])
def test_adapters_are_read_under_both_names_and_with_alpha(tmp_path, names, alpha):
    def in_middle(layer):
        return {"unet": {"mid_block": {"attentions_0": layer}}}

    base = in_middle({"to_out_0": {"kernel": np.zeros((4, 3), np.float32)}})
    layer = {"A": np.float32(np.arange(8).reshape(4, 2)), "B": np.ones((2, 3), np.float32)}
    write_lora(tmp_path, in_middle({"to_out_0": layer}))
    tensors = read_tensors(tmp_path / FILE_NAME)
    module = "unet.mid_block.attentions.0.to_out.0"
    assert set(tensors) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    renamed = {k.replace("lora_A", names[0]).replace("lora_B", names[1]): v for k, v in tensors.items()}
    if alpha is not None:
        renamed[f"{module}.alpha"] = np.array(alpha, np.float32)
        layer["B"] = layer["B"] * np.float32(alpha / 2)
    write_tensors(tmp_path / FILE_NAME, renamed)
    chex.assert_trees_all_equal(read_lora(tmp_path, base), jax.tree.map(jnp.asarray, in_middle({"to_out_0": layer})))
    with pytest.raises(UserError, match="made for another model"):
        read_lora(tmp_path, in_middle({"to_out_0": {"kernel": np.zeros((5, 3), np.float32)}}))
    with pytest.raises(UserError, match="fit no layer of this model"):
        read_lora(tmp_path, in_middle({"to_q": {"kernel": np.zeros((4, 3), np.float32)}}))


@pytest.mark.parametrize(
    "build, field",
    [
        (lambda: UNet2DConditionModel.from_config({"wings": 2}), "wings"),
        (lambda: UNet2DConditionModel.from_config({"class_embed_type": "timestep"}), "class_embed_type"),
        (lambda: UNet2DConditionModel.from_config({"down_block_types": ["AttnDownBlock2D"] * 4}), "AttnDownBlock2D"),
        (lambda: UNet2DConditionModel.from_config({"layers_per_block": [1, 2]}), "layers_per_block"),
        (lambda: AutoencoderKL.from_config({"latents_mean": [0.0]}), "latents_mean"),
        (lambda: AutoencoderKL.from_config({"down_block_types": ["X"] * 4}), "down_block_types"),
        (lambda: CLIPModel.from_config({"text_config": {"hidden_act": "relu"}}, step_aware=False), "hidden_act"),
    ],
)
def test_unsupported_config_fields_are_refused_by_name(build, field):
    with pytest.raises(UserError, match=field):
        build()


# ------------------------------------------------------------------------------------------------- mesh and files
def test_mesh():
    assert dict(make_mesh(-1, 1).shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    for sizes in ((3, 1), (-1, -1), (0, 8), (16, 1)):
        with pytest.raises(UserError, match="8 devices"):
            make_mesh(*sizes)
    with pytest.raises(UserError, match="prompts = 12 cannot be split over 8 devices"):
        check_divisible("prompts", 12, make_mesh(-1, 1))


def test_shipped_prompts_are_those_of_the_world_and_disjoint():
    files = world.prompt_files()
    for name, text in files.items():
        assert local(f"emoji:prompts/{name}").read_text(encoding="utf-8") == text
    held_out, training = (set(files[name].splitlines()) for name in ("held_out.txt", "spo.txt"))
    assert len(held_out) == 240 and not held_out & training


def test_report_stands_alone_and_escapes(tmp_path):
    measures = {"preference_score": 1.0, "colorfulness": 50.0, "alignment_top1": 0.9}
    summary = {"base": measures, "tuned": measures, "base_std": {"colorfulness": 20.0}, "win_rate": 0.5}
    summary |= {
        "win_rate_preference_score": 0.5,
        "num_prompts": 2,
        "seconds": 61.0,
        "seed": 0,
        "config": {"a": {"b": 1}},
    }
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    picture = np.zeros((4, 4, 3), np.uint8)
    rows = [{"step": 1, "loss": 0.69, "grad_norm": None}, {"step": 2, "loss": 0.68}]
    write_report(tmp_path / "r.html", summary=summary, metrics=rows, samples=[("<script>", picture, picture)])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "<polyline" in page and "a.b" in page
