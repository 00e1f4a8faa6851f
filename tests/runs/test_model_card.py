"""Model cards: what the hub reads of them, their facts, code that runs, and values that must not break the page."""

import json
import re

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from configs import recorded, sd15, sdxl, spm_sd15, spm_sdxl, spm_tiny, tiny
from spo_jax.formats.hub import local
from spo_jax.formats.lora_write import write_lora
from spo_jax.runs.sources import licence_of, source_of, url_of
from spo_jax.runs.tuning_card import write_model_card
from spo_jax.spm.card import write_preference_card
from spo_jax.spo.words import words_of
from tests import pictures
from tests.metrics import all_metrics

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SHEET = "validation/batch_000060.png"
SECTIONS = ["## Made from", "## Results", "## Use", "## Repeat", "## Limits", "## Citation"]


def make_summary(config):
    return {
        "base": {"preference_score": 10.0, "colorfulness": 80.0, "alignment_top1": 0.98},
        "tuned": {"preference_score": 12.5, "colorfulness": float("nan"), "alignment_top1": 0.965},
        "win_rate": {"colorfulness": 0.785, "preference_score": 0.845},
        "num_prompts": 200,
        "seconds": 359.7,
        "seed": config.seed,
        "config": config.to_dict(),
    }


def make_card(folder, config, **changes):
    config.update_from_flattened_dict(changes)
    (folder / "README.md").unlink(missing_ok=True)
    facts = {"summary": make_summary(config), "metrics": all_metrics(), "sheet": SHEET}
    write_model_card(folder / "README.md", words_of(config, 4000), **facts, xl="xl" in config.model)
    return (folder / "README.md").read_text(encoding="utf-8")


def make_preference_card(folder, config, **changes):
    config.update_from_flattened_dict(changes)
    gains = ("told_0",) if config.scorer.step_aware else ("plain",)
    row = {
        "accuracy": {"scorer": {"value": 0.625, "interval": (0.5, 0.75)}},
        "gain": {name: {"value": 0.03, "interval": (0.01, 0.05)} for name in gains},
    }
    accuracy = {model: {"0": row, "951": row} for model in ("start", "best", "last")}
    summary = {"accuracy": accuracy, "best_step": 6500, "records": {"used": 51200}, "seconds": 61.0, "seed": 3}
    (folder / "README.md").unlink(missing_ok=True)
    write_preference_card(folder / "README.md", summary=summary | {"config": config.to_dict()})
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card):
    empty, top, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(top)


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def headings(card):
    """Of the second level, outside of code."""
    text = re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if line.startswith("## ")]


def contains(card, *facts):
    for fact in facts:
        assert fact in card, fact


def test_adapters(tmp_path):
    card = make_card(tmp_path / "my run", sd15.get_config(), prompts="/home/me/4k.json", seed=7)
    assert front_matter(card) == {
        "base_model": SD15,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "stable-diffusion", "lora", "spo", "preference-optimization"],
    }
    assert headings(card) == SECTIONS
    commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    contains(card, f"(https://huggingface.co/{SD15}/tree/{commit})", "CreativeML OpenRAIL-M", f'revision="{commit}"')
    contains(card, "| Preference score | 10.00 | 12.50 | 84.5% |", "| Text alignment | 98.0% | 96.5% |  |")
    contains(card, "| Colourfulness | 80.0 | not finite | 78.5% |", "no measure of quality", "oversaturated")
    contains(card, "training prompts, 4000 | `4k.json`", "the first 200", "seed `7`")
    contains(card, "--format=kohya \\\n    --out=my-run.safetensors", "`<lora:my-run:1>`", "ComfyUI/models/loras")
    contains(card, "kohya's tools read `kohya_lora_weights.safetensors` of this folder")
    contains(card, "--config=configs/recorded.py:WORKDIR", "2406.04314")
    assert "/home" not in card and str(tmp_path) not in card


def test_adapters_of_sdxl(tmp_path):
    card = make_card(tmp_path, sdxl.get_config(), variant="fp16")
    (block,) = blocks(card, "python")
    contains(block, "StableDiffusionXLPipeline", 'variant="fp16"', "vae=vae", "torch.bfloat16")
    contains(block, 'AutoencoderKL.from_pretrained("madebyollin/sdxl-vae-fp16-fix", revision="207b116d')
    compile(block, "block", "exec")
    contains(
        card, "OpenRAIL++-M" if "OpenRAIL++-M" in card else "Open RAIL++-M", "--variant=fp16", "--vae=madebyollin/"
    )
    assert front_matter(card)["license"] == "openrail++"


def test_a_whole_unet(tmp_path):
    card = make_card(tmp_path, sd15.get_config(), **{"lora.rank": 0, "scorer.fn": "my_judge:score"})
    top = front_matter(card)
    assert top["base_model_relation"] == "finetune" and "lora" not in top["tags"]
    contains(card, 'from_pretrained(\n    "model",', "--model=WORKDIR/model", "--format=checkpoint", "`my_judge:score`")
    contains(card, "--model=WORKDIR/model")
    assert "load_lora_weights" not in card and "--format=kohya" not in card


def test_parts_that_replace_those_of_the_base_model_are_in_its_commands(tmp_path):
    trained = tmp_path / "checkpoint-500"
    (trained / "unet").mkdir(parents=True)
    (trained / "unet" / "config.json").write_text("{}", encoding="utf-8")
    parts = {"unet": str(trained), "vae": "org/vae@" + 40 * "1"}
    card = make_card(tmp_path / "a", sd15.get_config(), **parts)
    (block,) = blocks(card, "python")
    contains(block, 'UNet2DConditionModel.from_pretrained("checkpoint-500", subfolder="unet"', "    unet=unet,")
    contains(block, 'AutoencoderKL.from_pretrained("org/vae"', "    vae=vae,")
    compile(block, "block", "exec")
    contains(card, "UNet, instead of the base model's", "--unet=checkpoint-500", "--vae=org/vae@")
    full = make_card(tmp_path / "b", sd15.get_config(), variant="fp16", **parts, **{"lora.rank": 0})
    (block,) = blocks(full, "python")
    assert "unet" not in block and "vae" not in block and "variant" not in block, "the folder has them"
    assert "--unet" not in full and "--vae" not in full and "--variant" not in full


def test_a_local_base_model_is_named_by_its_folder(tmp_path):
    base = tmp_path / "models" / "mine"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\ntags: [a]\nlicense: 'cc-by-4.0'\n---\nlicense: mit\n", encoding="utf-8")
    card = make_card(tmp_path, tiny.get_config(), model=str(base))
    top = front_matter(card)
    assert "base_model" not in top and top["license"] == "cc-by-4.0"
    contains(card, 'from_pretrained(\n    "mine",', "with the base model in `mine`", "--model=mine")
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "text",
    [
        "no front matter",
        "---\nlicense: mit",
        "---\nlicense: [a, b]\n---\n",
        "---\nlicense_name: x\n---\n",
        "a\n---\nlicense: mit\n---",
    ],
)
def test_a_readme_without_a_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence_of(str(tmp_path)) == ("", "not known")


def test_the_code_for_adapters_runs(tmp_path, monkeypatch):
    write_lora(tmp_path, pictures.strong_adapters())
    (block,) = blocks(make_card(tmp_path, tiny.get_config(), **{"sampling.num_steps": 2}), "python")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "block", "exec"), names)
    assert Image.open("fox.png").size == (32, 32)
    assert names["pipeline"].get_active_adapters() == ["default_0"]
    assert names["pipeline"].dtype == torch.float32


def test_the_code_for_a_whole_model_runs(tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(local("emoji:model"))
    changes = {"lora.rank": 0, "dtype": "bfloat16", "sampling.num_steps": 2}
    (block,) = blocks(make_card(tmp_path, tiny.get_config(), **changes), "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {})
    assert Image.open("fox.png").size == (32, 32)


def test_pictures_are_shown_where_there_are_some(tmp_path):
    sheet = tmp_path / SHEET
    assert "](validation" not in make_card(tmp_path, tiny.get_config())
    sheet.parent.mkdir()
    sheet.touch()
    assert "](validation/batch_000060.png)" in make_card(tmp_path, tiny.get_config())


def test_a_step_aware_preference_model(tmp_path):
    card = make_preference_card(tmp_path, spm_sdxl.get_config())
    top = front_matter(card)
    assert top["base_model"] == "yuvalkirstain/PickScore_v1" and top["library_name"] == "spo_jax"
    assert "license" not in top, "its page names none"
    assert headings(card) == SECTIONS
    contains(
        card, "code is under MIT", "step `6500`", "51200 used", "`pickapic@train`", "0.625 [0.500, 0.750]", "t = 951"
    )
    contains(card, "| best: gain of knowing t | +0.030", "--config.scorer.path=WORKDIR/best", "configs/sdxl.py")
    compile(*blocks(card, "python"), "block", "exec")


def test_a_plain_preference_model(tmp_path):
    card = make_preference_card(tmp_path, spm_sd15.get_config(), **{"scorer.step_aware": False})
    assert front_matter(card)["library_name"] == "transformers"
    contains(card, 'CLIPModel.from_pretrained("best")', "gain over the plain model")


HOSTILE = [
    "---\n## mine",
    "a|b\n| c |",
    "\\| \\\\||",
    "`````",
    '"\n---\nlicense: mit\n---\n',
    "\n```\n# x",
    "é\u2028ü\x85\x00 \ud83d",
    "$(rm)'\"",
    "",
]


@given(value=st.text(max_size=20) | st.sampled_from(HOSTILE))
@example(value="</table><script>")
def test_values_do_not_break_the_page(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("card")
    names = dict.fromkeys(["model", "vae", "variant", "prompts", "scorer.path", "lora.init"], f"x{value}")
    cards = [make_card(folder, sd15.get_config(), **names)]
    names = dict.fromkeys(["model", "scorer.init", "data.train", "labels.judge", "validation.plain"], f"x{value}")
    cards.append(make_preference_card(folder, spm_tiny.get_config(), **names))
    for card in cards:
        assert set(front_matter(card)) <= {"library_name", "license", "pipeline_tag", "tags"}
        assert headings(card) == SECTIONS
        for rows in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
            assert len({re.sub(r"\\.", "", row).count("|") for row in rows.splitlines()}) == 1, rows
        compile(*blocks(card, "python"), "block", "exec")
        assert "<script>" not in re.sub("(`+).*?\\1", "", card, flags=re.DOTALL)


@pytest.mark.parametrize(
    "name, repo, url",
    [
        (f"a/b@{COMMIT}", "a/b", f"https://huggingface.co/a/b/tree/{COMMIT}"),
        (f"a/b@{COMMIT}/tokenizer", "a/b", f"https://huggingface.co/a/b/tree/{COMMIT}/tokenizer"),
        (f"a/b@{COMMIT}/x y.bin", "a/b", f"https://huggingface.co/a/b/blob/{COMMIT}/x%20y.bin"),
        (f"github:a/b@{COMMIT}/c/d.json", "a/b", f"https://github.com/a/b/blob/{COMMIT}/c/d.json"),
        (f"github:a/b@{COMMIT}/d.json#sha256={'ab' * 32}", "a/b", f"https://github.com/a/b/blob/{COMMIT}/d.json"),
    ],
)
def test_names_become_links(name, repo, url):
    source = source_of(name)
    assert (source.repo, source.revision, url_of(source)) == (repo, COMMIT, url)


@pytest.mark.parametrize("name", ["a/b@main", "emoji:model", "/a/b", "tfds:coco@train", f"github:a/b@{COMMIT}"])
def test_other_names_do_not(name):
    assert source_of(name) is None


@pytest.mark.parametrize("config", [tiny.get_config(), spm_tiny.get_config()])
def test_a_recorded_config_comes_back(tmp_path, config):
    config.seed, config.train.ema_decay = 5, 0.5
    values = config.to_dict()
    del values["wandb"]  # as in a run of before the key
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert recorded.get_config(str(tmp_path)).to_dict() == config.to_dict()


def test_a_card_that_its_owner_has_changed_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    config = tiny.get_config()
    facts = {"summary": make_summary(config), "metrics": all_metrics(), "sheet": SHEET}
    write_model_card(tmp_path / "README.md", words_of(config, 1), **facts, xl=False)
    assert (tmp_path / "README.md").read_text() == "mine"
