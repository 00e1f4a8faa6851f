"""New labels by a metric: each image at its own size, each with its caption; faults keep what they had."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from spo_jax.data.records import decode_whole
from spo_jax.errors import UserError
from spo_jax.evaluation import relabel
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.relabel import open_labeller, relabelled
from tests.preference_data import picture, record


def metric(score):
    return ImageMetric("A metric", "For a test.", score, {})


def run(records, labeller):
    counts = collections.Counter()
    return list(relabelled(records, labeller, counts)), dict(counts)


def test_the_higher_score_wins(monkeypatch):
    monkeypatch.setattr(relabel, "_CHUNK_RECORDS", 3)
    records = [record(i, image_0=picture(i, 20 + i, 30), image_1=picture(i + 90, 24, 50)) for i in range(8)]
    seen = []

    def score(images, prompts):
        seen.append((len(images), [image.shape for image in images]))
        return np.array([image.mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)], np.float32)

    found, counts = run(records, metric(score))
    assert counts == {"relabelled": 8}
    assert [count for count, _ in seen] == [6, 6, 4]
    assert seen[1][1][:2] == [(23, 30, 3), (24, 50, 3)]
    for before, after in zip(records, found, strict=True):
        wins = decode_whole(before["image_0"]).mean() > decode_whole(before["image_1"]).mean()
        assert after == before | {"label_0": float(wins), "label_1": float(not wins)}


def test_each_image_is_scored_for_its_caption():
    found = []

    def score(images, prompts):
        found.extend(prompts)
        return np.zeros(len(images), np.float32)

    (first, second), _ = run([record(caption=" ein Bär ".encode()), record(1)], metric(score))
    assert found == ["ein Bär", "ein Bär", "caption 1", "caption 1"]
    assert (first["label_0"], first["label_1"]) == (second["label_0"], second["label_1"]) == (0.5, 0.5)


def test_faults_keep_their_labels_and_missing_labels_are_made():
    records = [
        record(0, image_0=b"no picture"),
        record(1, image_1=b""),
        record(2, caption=b"caf\xe9"),
        record(3, label_0=math.nan, has_label=False),
        record(4, label_0=1.0, label_1=1.0),
    ]
    found, counts = run(records, metric(lambda images, prompts: np.arange(len(images), 0, -1)))
    assert counts == {"relabelled": 2, "kept": 3}
    assert found[:3] == records[:3]
    assert all((r["label_0"], r["label_1"], r["has_label"]) == (1, 0, True) for r in found[3:])


def test_only_so_many_decoded_images_are_in_memory(monkeypatch):
    monkeypatch.setattr(relabel, "_CHUNK_BYTES", 5 * 24 * 24 * 3)
    sizes = []

    def score(images, prompts):
        sizes.append(len(images))
        return np.zeros(len(images))

    run(map(record, range(7)), metric(score))
    assert sizes == [6, 6, 2]


def test_a_score_that_is_no_number():
    labeller = metric(lambda images, prompts: np.array([0, 1, 2, np.nan]))
    with pytest.raises(UserError, match=r"scores 2\.0 and nan to record 2 of the source"):
        run(map(record, range(2)), labeller)


def test_names_of_metrics(monkeypatch):
    found, counts = run(map(record, range(2)), open_labeller("colorfulness"))
    assert counts == {"relabelled": 2} and {r["label_0"] for r in found} <= {0, 1}
    for text, words in (
        ("beauty", "--relabel: 'beauty' is no metric; there are pickscore"),
        ("pickscore=", "--relabel=pickscore= lacks a place; write --relabel=pickscore=FOLDER"),
        ("scorer", "lacks a place; write --relabel=scorer=runs/spm/best"),
        ("colorfulness=a", "has no files"),
        ("pickscore=none", "none"),
    ):
        with pytest.raises(UserError, match=words):
            open_labeller(text)
    blind = dataclasses.replace(metric(None), compares=False)
    monkeypatch.setitem(relabel.IMAGE_METRICS, "blind", lambda place, options: blind)
    with pytest.raises(UserError, match="cannot say which of two images"):
        open_labeller("blind")
