"""Hub ids: only pinned ones, from the cache without network, and one sentence with the command for what is missing."""

import os
import re
import shutil
import subprocess
import sys

import chex
import huggingface_hub.constants
import pytest

from spo_jax.errors import UserError
from spo_jax.formats.hub import local, missing, resolve_model, with_strength
from spo_jax.formats.pipeline import read_clip, read_pipeline
from spo_jax.formats.tokenizers import read_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def lay_out(cache, repo, source):
    """``source`` as the hub's cache keeps it: content by hash, and a snapshot of links with the names."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        shutil.copy(file, folder / "blobs" / str(number))
        link = folder / "snapshots" / COMMIT / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / "blobs" / str(number), link.parent))
    return folder / "snapshots" / COMMIT


def test_a_local_path_is_itself(tmp_path):
    (tmp_path / "org" / f"name@{COMMIT}").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "org" / f"name@{COMMIT}"):
        assert resolve_model(path) == path and resolve_model(str(path)) == path


def test_pipeline_is_read_from_the_cache(cache):
    snapshot = lay_out(cache, "org/emoji-1.5", local("emoji:model"))
    expected = read_pipeline(local("emoji:model"))
    pipeline = read_pipeline(f"org/emoji-1.5@{COMMIT}")
    assert pipeline.folder == snapshot
    chex.assert_trees_all_equal(pipeline.params, expected.params)
    assert pipeline.tokenizer("a red fox").input_ids == expected.tokenizer("a red fox").input_ids


def test_parts_of_a_repository_are_read_from_the_cache(cache):
    snapshot = lay_out(cache, "org/emoji", local("emoji:model"))
    assert read_tokenizer(f"org/emoji@{COMMIT}/tokenizer").model_max_length > 1
    _, params = read_clip(f"org/emoji@{COMMIT}/clip", step_aware=False)
    _, from_file = read_clip(f"org/emoji@{COMMIT}/clip/model.safetensors", step_aware=False)
    chex.assert_trees_all_equal(params, from_file, read_clip(local("emoji:model/clip"), step_aware=False)[1])
    assert resolve_model(f"org/emoji@{COMMIT}/clip/model.safetensors") == snapshot / "clip" / "model.safetensors"


@pytest.mark.parametrize("read", [read_pipeline, read_tokenizer, lambda name: read_clip(name, step_aware=True)])
def test_model_that_is_not_cached_is_named_with_the_command(cache, read):
    weights = "" if read is read_tokenizer else " --include .*model.safetensors.*"
    command = f"`hf download org/name --revision {COMMIT} --include '..json' --include '..txt'{weights}`"
    with pytest.raises(UserError, match=f"org/name@{COMMIT} is neither here .*{command}") as caught:
        read(f"org/name@{COMMIT}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (f"org/name@{COMMIT}/a/b.bin", f"`hf download org/name a/b.bin --revision {COMMIT}`"),
        ("org/name@v1", "`hf download org/name --revision v1 --include '*.json' --include '*.txt' --include '*model.s"),
        ("org/name", "`hf download org/name --include '*.json' "),
        (
            f"datasets/org/name@{COMMIT}/p.json",
            f"`hf download org/name p.json --repo-type dataset --revision {COMMIT}`",
        ),
        (f"github:a/b@{COMMIT}/p.json", f"https://raw.githubusercontent.com/a/b/{COMMIT}/p.json`"),
    ],
)
def test_each_kind_of_name_has_its_command(cache, name, command):
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set") as caught:
        resolve_model(name)
    assert str(caught.value).startswith(f"{name} is neither here ") and command in str(caught.value)


def test_branch_is_what_the_cache_has_for_it_without_network(cache, capsys):
    snapshot = lay_out(cache, "org/emoji", local("emoji:model/tokenizer"))
    assert resolve_model("org/emoji", weights=False) == resolve_model("org/emoji@main", weights=False) == snapshot
    assert f"org/emoji@main is at commit {COMMIT}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lost", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json", "tokenizer/merges.txt"]
)
def test_file_that_is_not_cached_is_named_with_the_command(cache, tmp_path, lost):
    shutil.copytree(local("emoji:model"), tmp_path / "source")
    (tmp_path / "source" / lost).unlink()
    lay_out(cache, "org/emoji", tmp_path / "source")
    command = f"`hf download org/emoji {lost} --revision {COMMIT}`"
    with pytest.raises(UserError, match=re.escape(command)):
        read_pipeline(f"org/emoji@{COMMIT}")


@pytest.mark.parametrize(
    "name", ["name", "/nowhere/model", f"name@{COMMIT}", f"a/b/c@{COMMIT}", "./a", "a/prompts.txt"]
)
def test_name_that_is_neither_is_refused(name):
    with pytest.raises(UserError, match="does not exist here; give a local path, a repository"):
        resolve_model(name)


def test_environment_of_the_hub_is_respected(tmp_path):
    """``HF_HOME`` says where the cache is, and ``HF_HUB_OFFLINE`` that nothing else may be asked."""
    snapshot = lay_out(tmp_path / "home" / "hub", "org/emoji", local("emoji:model/tokenizer"))
    program = "import sys; from spo_jax.formats.hub import resolve_model as r; print(r(sys.argv[1], weights=False))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, f"org/emoji@{COMMIT}"], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(snapshot), run.stderr


def test_missing_file_outside_the_cache_has_no_command(tmp_path):
    assert missing(tmp_path / "a") == f"File {tmp_path / 'a'} does not exist; is {tmp_path} a complete model folder?"


def test_a_link_to_nothing_is_told(tmp_path):
    (tmp_path / "vocab.json").symlink_to("elsewhere/vocab.json")
    assert "is a link to elsewhere/vocab.json, which does not exist" in missing(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.safetensors:0.7", ("a.safetensors", 0.7)),
        ("a.safetensors:-1e1", ("a.safetensors", -10.0)),
        ("a.safetensors:0", ("a.safetensors", 0.0)),
        ("not here:2", ("not here", 2.0)),
        ("b:0.5", ("b:0.5", 1.0)),
        ("b:0.5:0.25", ("b:0.5", 0.25)),
        ("emoji:model", ("emoji:model", 1.0)),
        ("emoji:model:3", ("emoji:model", 3.0)),
        (f"github:a/b@{'0' * 40}/c.safetensors", (f"github:a/b@{'0' * 40}/c.safetensors", 1.0)),
        (f"org/name@{'0' * 40}:0.5", (f"org/name@{'0' * 40}", 0.5)),
    ],
)
def test_a_strength_stands_behind_the_last_colon(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    for file in ("a.safetensors", "b:0.5"):
        (tmp_path / file).touch()
    assert with_strength(name) == expected


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "1e39", "strong", ""])
def test_a_strength_that_is_no_number_is_refused(tmp_path, strength):
    with pytest.raises(UserError, match=r"the strength, a number such as .*:0\.7"):
        with_strength(f"{tmp_path}:{strength}")
