"""The emoji world's pairs: what is written, and ``emoji:pairs``, which is made once and then is there."""

import json
import threading
import time

import numpy as np
import pytest

from configs import spm_tiny
from spo_jax.data.places import pairs_folder
from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.data.records import decode_whole
from spo_jax.data.sources import open_source
from spo_jax.emoji import make_pairs, world
from spo_jax.emoji.make_pairs import make_for, make_prepared, splits, write_pairs
from spo_jax.errors import UserError


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "spo_jax"


@pytest.fixture
def painted(monkeypatch):
    """Pictures of one colour each instead of the base model's; the list has the captions of each call."""
    calls = []

    def sample(captions, count, key):
        calls.append(list(captions))
        shades = np.arange(len(captions) * count, dtype=np.float32).reshape(len(captions), count)
        return np.broadcast_to(shades[..., None, None, None], (*shades.shape, 8, 8, 3)).astype(np.uint8), 20 * shades

    monkeypatch.setattr(make_pairs, "make_sampler", lambda: sample)
    return calls


def test_splits():
    every = splits(0)
    sizes = {name: (len(split.captions), split.pictures, split.votes) for name, split in every.items()}
    assert sizes == {"train": (1460, 4, 8), "validation": (160, 4, 1), "test": (240, 12, 1)}
    train, validation = (set(every[name].captions) for name in ("train", "validation"))
    assert not train & validation and train | validation == set(world.captions(world.TRAIN_PROMPTS))
    for name, split in splits(0, 3).items():
        assert split == every[name]._replace(captions=every[name].captions[:3])


def test_what_is_written(tmp_path, painted, capfd):
    every = splits(0, 25)
    ceilings = write_pairs(tmp_path, 0, every, show=False)
    assert sorted(len(captions) for captions in painted) == [5] * 3 + [20] * 3
    assert json.loads((tmp_path / "ceiling.json").read_text()) == ceilings
    assert {name: entry["pairs"] for name, entry in ceilings.items()} == {"train": 150, "validation": 50, "test": 150}
    for name, split in every.items():
        source = open_source(str(tmp_path / f"{name}.jsonl"))
        records = list(source.read())
        assert source.num_records == ceilings[name]["pairs"]
        assert [record["caption"].decode() for record in records[:: len(records) // 25]] == split.captions
        assert all(record["image_0"] != record["image_1"] for record in records)
        assert {record["label_0"] for record in records} <= {i / split.votes for i in range(split.votes + 1)}
        # The second image of every pair is the more colourful one.
        assert 0.8 < np.mean([record["label_1"] for record in records]) < 1
    assert capfd.readouterr() == ("", "")


def test_pairs_by_name_are_made_once(home, painted, capfd):
    with pytest.raises(UserError, match=r"emoji:pairs@train is not here yet; python -m spo_jax\.emoji\.pairs --p"):
        open_pairs("emoji:pairs@train")
    folder = make_prepared(2)
    assert folder == pairs_folder("emoji:pairs") == home / "emoji_pairs_v1"
    assert f"kept in {folder}" in capfd.readouterr().err
    assert [len(open_pairs(f"emoji:pairs@{name}")) for name in ("train", "validation")] == [12, 4]
    batch = next(PairLoader(open_pairs("emoji:pairs@train"), batch_size=12, size=(8, 8), seed=0, num_workers=0))
    assert (batch.weights > 0).all()
    with pytest.raises(UserError, match="has no split 'all', only train, validation"):
        open_pairs("emoji:pairs@all")
    assert len(painted) == 2
    assert make_prepared(2) == folder and len(painted) == 2
    assert sorted(path.name for path in home.iterdir()) == ["emoji_pairs_v1", "emoji_pairs_v1.lock"]
    assert json.loads((folder / "ceiling.json").read_text())["train"]["pairs"] == 12


def test_an_interruption_leaves_nothing_that_looks_complete(home, painted, monkeypatch):
    def interrupted(out, *_, **__):
        (out / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_pairs, "write_pairs", interrupted)
        make_prepared(1)
    assert [path.name for path in home.iterdir()] == ["emoji_pairs_v1.lock"]
    # One that was killed, at another time.
    (home / f".emoji_pairs_v1.{make_pairs.platform.node()}" / "made" / "old").mkdir(parents=True)
    assert len(open_pairs(f"{make_prepared(1)}@train")) == 6


def test_two_at_once(home, painted, monkeypatch):
    slow = make_pairs.write_pairs

    def write(*arguments, **options):
        time.sleep(0.3)
        return slow(*arguments, **options)

    monkeypatch.setattr(make_pairs, "write_pairs", write)
    threads = [threading.Thread(target=make_prepared, args=(1,), kwargs={"show": False}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(painted) == 2 and len(open_pairs("emoji:pairs@train")) == 6


def test_another_machine_that_was_faster(home, painted, monkeypatch):
    def write(out, seed, every, *, show):
        (home / "emoji_pairs_v1").mkdir()
        (home / "emoji_pairs_v1" / "dataset_info.json").write_text("theirs")
        return write_pairs(out, seed, every, show=show)

    monkeypatch.setattr(make_pairs, "write_pairs", write)
    assert (make_prepared(1) / "dataset_info.json").read_text() == "theirs"


def test_a_place_that_cannot_be_written(tmp_path, painted, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^HF_HOME=.*cannot be written \(Not a directory\)"):
        make_prepared(1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "~/cache")
    with pytest.raises(UserError, match="set HF_HOME to a folder of yours"):
        make_prepared(1)


def test_training_makes_what_its_config_names(home, monkeypatch):
    made = []
    monkeypatch.setattr(make_pairs, "make_prepared", lambda *, show: made.append(show))
    config = spm_tiny.get_config()
    config.data.train, config.data.validation = "data/mine@train", "data/emoji:pairs@validation"
    make_for(config)
    assert not made
    config.data.validation = "emoji:pairs@validation"
    make_for(config)
    assert made == [True]
    config.num_steps = -1  # is found before anything is made
    with pytest.raises(UserError, match="num_steps"):
        make_for(config)
    assert made == [True]


def test_the_base_model_draws_them(tmp_path, monkeypatch):
    sample = make_pairs.make_sampler()
    monkeypatch.setattr(make_pairs, "make_sampler", lambda: sample)
    some = {"validation": splits(0, 1)["validation"]}
    for name in ("a", "b"):
        write_pairs(tmp_path / name, 0, some, show=False)
    first, again = (list(open_source(str(tmp_path / name / "validation.jsonl")).read()) for name in ("a", "b"))
    assert first == again  # the same pictures and labels come again
    images = [decode_whole(record[key]) for record in first for key in ("image_0", "image_1")]
    assert len(images) == 4 and all(image.shape == (32, 32, 3) for image in images)
    assert len({image.tobytes() for image in images}) == 4
