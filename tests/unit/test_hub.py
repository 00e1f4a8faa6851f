"""Hub ids: only pinned ones, from the cache without network, and one sentence with the command for what is missing."""

import os
import re
import shutil
import subprocess
import sys

import chex
import huggingface_hub.constants
import pytest

from spo_jax.checkpoints.hub import missing, resolve_model
from spo_jax.checkpoints.pipeline import read_clip, read_pipeline, read_tokenizer
from spo_jax.emoji import resolve
from spo_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
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
    snapshot = lay_out(cache, "org/emoji-1.5", resolve("emoji:model"))
    expected = read_pipeline(resolve("emoji:model"))
    pipeline = read_pipeline(f"org/emoji-1.5@{COMMIT}")
    assert pipeline.folder == snapshot
    chex.assert_trees_all_equal(pipeline.params, expected.params)
    assert pipeline.tokenizer("a red fox").input_ids == expected.tokenizer("a red fox").input_ids


def test_parts_of_a_repository_are_read_from_the_cache(cache):
    snapshot = lay_out(cache, "org/emoji", resolve("emoji:model"))
    assert read_tokenizer(f"org/emoji@{COMMIT}/tokenizer").model_max_length > 1
    _, params = read_clip(f"org/emoji@{COMMIT}/clip", step_aware=False)
    _, from_file = read_clip(f"org/emoji@{COMMIT}/clip/model.safetensors", step_aware=False)
    chex.assert_trees_all_equal(params, from_file, read_clip(resolve("emoji:model/clip"), step_aware=False)[1])
    assert resolve_model(f"org/emoji@{COMMIT}/clip/model.safetensors") == snapshot / "clip" / "model.safetensors"


@pytest.mark.parametrize("read", [read_pipeline, read_tokenizer, lambda name: read_clip(name, step_aware=True)])
def test_model_that_is_not_cached_is_named_with_the_command(cache, read):
    command = f"`hf download org/name --revision {COMMIT} "
    with pytest.raises(UserError, match=f"org/name at {COMMIT}.*{command}.*`") as caught:
        read(f"org/name@{COMMIT}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lost", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json", "tokenizer/merges.txt"]
)
def test_file_that_is_not_cached_is_named_with_the_command(cache, tmp_path, lost):
    shutil.copytree(resolve("emoji:model"), tmp_path / "source")
    (tmp_path / "source" / lost).unlink()
    lay_out(cache, "org/emoji", tmp_path / "source")
    command = f"`hf download org/emoji {lost} --revision {COMMIT}`"
    with pytest.raises(UserError, match=re.escape(command)):
        read_pipeline(f"org/emoji@{COMMIT}")


@pytest.mark.parametrize("name", ["org/name@main", "org/name@", f"org/name@{COMMIT[:39]}", f"org/name@{COMMIT[:39]}G"])
def test_commit_must_be_whole(cache, name):
    with pytest.raises(UserError, match="not pinned to a commit; write org/name@"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["org/name", "name", "/nowhere/model", f"name@{COMMIT}", f"a/b/c@{COMMIT}"])
def test_name_that_is_neither_is_refused(name):
    with pytest.raises(UserError, match="does not exist here; give a local folder, or a repository"):
        resolve_model(name)


@pytest.mark.parametrize("inside", ["../../x", "a/../../b", "/etc"])
def test_path_may_not_leave_the_repository(cache, inside):
    with pytest.raises(UserError, match="outside its repository"):
        resolve_model(f"org/name@{COMMIT}/{inside}")


class Hub:
    """Stands in for the hub: what was asked for, and the files that a repository has."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def download(self, repo, *, revision, allow_patterns, ignore_patterns):
        self.asked.append(allow_patterns)
        for file in huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text("{}")
        return str(self.folder)

    def fetched(self):
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


SD15 = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
}
WEIGHTS = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}
BINS = {"unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"}
NEVER = {
    "README.md",
    "modeling_evil.py",
    "unet/custom.py",
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "vae_decoder/model.onnx",
}


def test_cached_part_that_is_not_read_asks_for_no_other_weights(tmp_path, monkeypatch):
    """diffusers caches a safety checker's config; that it has no weights there is no reason to fetch more."""
    hub = Hub(tmp_path, SD15 | BINS | {f"{w}.safetensors" for w in WEIGHTS})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    for part in ("safety_checker", "onnx"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    resolve_model(f"org/sd@{COMMIT}")
    assert len(hub.asked) == 1


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("has_safetensors", [True, False])
def test_only_what_is_read_is_fetched(tmp_path, monkeypatch, variant, has_safetensors):
    plain = {f"{w}.safetensors" for w in WEIGHTS} if has_safetensors else set()
    half = {f.replace(".safetensors", ".fp16.safetensors") for f in plain}
    half_bins = {f.replace(".bin", ".fp16.bin") for f in BINS}
    hub = Hub(tmp_path, SD15 | BINS | half_bins | plain | half | NEVER)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    assert resolve_model(f"org/sd@{COMMIT}", variant=variant) == tmp_path
    expected = {None: [BINS, plain], "fp16": [half_bins, half]}[variant][has_safetensors]
    assert hub.fetched() == SD15 | expected


def test_shards_and_single_files_are_fetched(tmp_path, monkeypatch):
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json", "config.json"}
    hub = Hub(tmp_path / "a", shards | {"model.fp16-00001-of-00001.safetensors", "pytorch_model.bin"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    resolve_model(f"org/clip@{COMMIT}")
    assert hub.fetched() == shards
    bins = {"sd-v1-5_step-aware_preference_model.bin", "sdxl_step-aware_preference_model.bin"}
    hub = Hub(tmp_path / "b", bins | {"README.md"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    file = resolve_model(f"org/spm@{COMMIT}/sdxl_step-aware_preference_model.bin")
    assert file.is_file() and hub.fetched() == {file.name}
    hub = Hub(tmp_path / "c", {"vocab.json", "merges.txt", "tokenizer_config.json", "config.json", "model.safetensors"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    resolve_model(f"org/clip@{COMMIT}", weights=False)
    assert "model.safetensors" not in hub.fetched() and "merges.txt" in hub.fetched()


def test_environment_of_the_hub_is_respected(tmp_path):
    """``HF_HOME`` says where the cache is, and ``HF_HUB_OFFLINE`` that nothing else may be asked."""
    snapshot = lay_out(tmp_path / "home" / "hub", "org/emoji", resolve("emoji:model/tokenizer"))
    program = "import sys; from spo_jax.checkpoints.hub import resolve_model as r; print(r(sys.argv[1], weights=False))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, f"org/emoji@{COMMIT}"], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(snapshot), run.stderr


def test_missing_file_outside_the_cache_has_no_command(tmp_path):
    assert missing(tmp_path / "a") == f"File {tmp_path / 'a'} does not exist; is {tmp_path} a complete model folder?"
