"""Names of what lies elsewhere: what they mean, which are refused, and which files of a repository are chosen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import sd15, sdxl, spm_sd15, spm_sdxl
from spo_jax.errors import UserError
from spo_jax.formats.remote import RemoteName, choose_files, parse_remote
from spo_jax.runs.artifacts import artifacts_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUM = "ab" * 32
PART = st.from_regex(r"[A-Za-z0-9_][\w.-]{0,8}", fullmatch=True)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("org/name", RemoteName("hub", "org/name", "")),
        ("org/name@main", RemoteName("hub", "org/name", "main")),
        (f"org/name@{COMMIT}/a/b.bin", RemoteName("hub", "org/name", COMMIT, "a/b.bin")),
        (f"org/name@{COMMIT}/a/", RemoteName("hub", "org/name", COMMIT, "a")),
        (f"datasets/org/name@v1/p.json#sha256={SUM}", RemoteName("hub", "org/name", "v1", "p.json", SUM, "dataset")),
        (f"github:org/name@{COMMIT}/p q.json", RemoteName("github", "org/name", COMMIT, "p q.json")),
        ("org/name@refs/pr/12/a", RemoteName("hub", "org/name", "refs/pr/12", "a")),
        (f"org/name@{COMMIT.upper()}/", RemoteName("hub", "org/name", COMMIT)),
    ],
)
def test_names(name, meant):
    assert parse_remote(name) == meant
    assert parse_remote(str(meant)) == meant


@given(PART, PART, st.sampled_from(["", "main", "v1.2", COMMIT]), st.lists(PART, max_size=3), st.booleans())
def test_a_name_is_read_back_as_it_is_written(org, name, revision, inside, summed):
    inside = "/".join([*inside, "weights.bin"]) if revision and (inside or summed) else ""
    remote = RemoteName("hub", f"{org}/{name}x", revision, inside, SUM if summed and inside else "")
    assert parse_remote(str(remote)) == remote


@pytest.mark.parametrize(
    "name", ["model", "/a/b", "./a", "../b", "a/b/c", "runs/prompts.txt", "a/b.safetensors", "~/a"]
)
def test_local_paths_are_no_remote_names(name):
    assert parse_remote(name) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"org/name@{COMMIT}/../../x", "outside its repository"),
        (f"org/name@{COMMIT}//etc", "outside its repository"),
        ("org/name@..", "outside its repository"),
        ("github:org", "write github:owner/repo@<40 digits>/path"),
        ("github:org/name/p.json", "one file at a commit.*https://github.com/org/name/commits"),
        ("github:org/name@main/p.json", "one file at a commit"),
        (f"github:org/name@{COMMIT}", "one file at a commit"),
        (f"github:org/name@{COMMIT}/p.json#sha256=12", "64 hexadecimal digits"),
        (f"org/name@{COMMIT}#sha256={SUM}", "a checksum is of one file"),
    ],
)
def test_what_is_not_understood_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        parse_remote(name)


@pytest.mark.parametrize("config", [sd15, sdxl, spm_sd15, spm_sdxl])
def test_the_recipes_name_commits(config):
    named = [parse_remote(artifact.name) for artifact in artifacts_of(config.get_config())]
    assert all(remote is not None and remote.pinned for remote in named)
    assert all(remote.sha256 for remote in named if remote.site == "github")


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


def chosen(name, paths, **options):
    return set(choose_files(parse_remote(name), paths, **options))


@pytest.mark.parametrize("variant", ["", "fp16"])
@pytest.mark.parametrize("has_safetensors", [True, False])
def test_only_what_is_read_is_chosen(variant, has_safetensors):
    plain = {f"{w}.safetensors" for w in WEIGHTS} if has_safetensors else set()
    half = {f.replace(".safetensors", ".fp16.safetensors") for f in plain}
    half_bins = {f.replace(".bin", ".fp16.bin") for f in BINS}
    weights = {"": [BINS, plain], "fp16": [half_bins, half]}[variant][has_safetensors]
    paths = SD15 | BINS | half_bins | plain | half | NEVER
    assert chosen("org/sd@main", paths, variant=variant) == SD15 | weights
    assert chosen("org/sd@main", paths, variant=variant, weights=False) == SD15


def test_a_part_without_safetensors_is_chosen_as_bin_and_the_others_are_not():
    paths = SD15 | BINS | {"unet/diffusion_pytorch_model.safetensors"}
    weights = (BINS | {"unet/diffusion_pytorch_model.safetensors"}) - {"unet/diffusion_pytorch_model.bin"}
    assert chosen("org/sd@main", paths) == SD15 | weights


def test_shards_single_files_and_adapters():
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json", "config.json"}
    assert chosen("org/clip", shards | {"model.fp16-00001-of-00001.safetensors", "pytorch_model.bin"}) == shards
    models = {"sd_preference_model.bin", "sdxl_preference_model.bin", "README.md", "sub/config.json"}
    assert chosen("org/spm", models - {"sub/config.json"}) == set()
    assert chosen("org/spm@main/sdxl_preference_model.bin", models) == {"sdxl_preference_model.bin"}
    assert chosen("org/spm@main/sub/a.bin", {*models, "sub/a.bin"}) == {"sub/a.bin", "sub/config.json"}
    assert chosen("org/lora", {"pytorch_lora_weights.safetensors", "x.py"}) == {"pytorch_lora_weights.safetensors"}
    assert chosen("org/sd@main/tokenizer", SD15, weights=False) == {p for p in SD15 if p.startswith("tokenizer/")}
