"""``~`` is the home wherever a name of a file is taken, from a config as well as from the command line."""

import json
import os
import shutil

import pytest

from configs import recorded, tiny
from spo_jax.data.preferences import open_pairs
from spo_jax.data.prompts import read_prompts
from spo_jax.data.sources import open_source
from spo_jax.errors import UserError
from spo_jax.files import cache_folder
from spo_jax.formats import hub
from spo_jax.formats.hub import local
from spo_jax.formats.tokenizers import read_tokenizer
from spo_jax.runs import artifacts
from spo_jax.spm import config as spm_config


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_models_tokenizers_and_prompts(home):
    shutil.copytree(local("emoji:model/tokenizer"), home / "tokenizer")
    (home / "p.txt").write_text("a fox", encoding="utf-8")
    for name in ("~/tokenizer", local("~/tokenizer")):
        assert hub.resolve_model(name) == home / "tokenizer" and hub.exists(name)
        assert read_tokenizer(name).model_max_length == 16
    assert read_prompts("~/p.txt") == read_prompts(local("~/p.txt")) == ["a fox"]
    assert hub.fetched("~/a@b") == home / "a@b"
    with pytest.raises(UserError, match=f"{home}/none.txt does not exist"):
        read_prompts("~/none.txt")
    assert [path.name for path in home.glob("~*")] == []


def test_a_config_with_names_in_the_home(home):
    config = tiny.get_config()
    (home / "model").mkdir()
    config.model = config.vae = config.scorer.path = config.lora.init = config.prompts = "~/model"
    assert artifacts.look_up(config, {}) == {} and artifacts.take_stock(config) == []
    config.model = "~/other"
    with pytest.raises(UserError, match=r"config\.model: '~/other' does not exist here"):
        artifacts.look_up(config, {})


def test_pairs_and_what_they_are_made_of(home):
    (home / "pairs").mkdir()
    row = {"caption": "a", "image_a": "a.png", "image_b": "b.png", "label": 1}
    (home / "pairs" / "p.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for source in ("~/pairs", "~/pairs/p.jsonl", "~/pa*/p.jsonl"):
        assert open_source(source).num_records == 1
    with pytest.raises(UserError, match=f"Folder {home}/data holds no prepared data"):
        open_pairs("~/data@train")


def test_a_recorded_run(home):
    config = spm_config.get_config()
    config.num_steps = 7
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(config.to_json(), encoding="utf-8")
    assert recorded.get_config("~/run").num_steps == 7


def test_the_cache_of_a_user_without_a_home(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == home / ".cache" / "spo_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere/spo_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for an unknown user
    assert cache_folder() is None
