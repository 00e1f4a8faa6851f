"""Preparation: published and own formats in, ArrayRecord of TensorFlow Datasets out; what is refused, and when."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.data import builder, sources
from spo_jax.data.builder import write_split
from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.data.prompts import read_prompts
from spo_jax.data.sources import open_source
from spo_jax.errors import UserError
from tests.preference_data import DAMAGE, damage, parquet_table, picture, record
from tests.system.commands import ROOT


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value == other[key] or (math.isnan(value) and math.isnan(other[key])), key


def prepare(*flags):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "spo_jax.prepare", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def refused(message, function, *arguments):
    with pytest.raises(UserError, match=message) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- parquet
@pytest.mark.parametrize("as_struct", [False, True])
def test_the_command_prepares_published_files(tmp_path, as_struct):
    good = [record(i) for i in range(40)]
    every = good + [damage(record(40 + i), how) for i, how in enumerate(DAMAGE)] + [record(60, has_label=False)]
    pq.write_table(parquet_table(every[:30], as_struct), tmp_path / "train-00000-of-00002.parquet", row_group_size=7)
    pq.write_table(parquet_table(every[30:], as_struct), tmp_path / "train-00001-of-00002.parquet")
    pq.write_table(parquet_table(good[:5], as_struct), tmp_path / "validation_unique-00000-of-00001.parquet")
    out = tmp_path / "out"
    result = prepare(f"--source={tmp_path}/train-*.parquet", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert f"Wrote {len(every)} records to {out}@train; at first sight, " in result.stdout
    for words in ("1 unlabelled", "2 label_out_of_range", "1 picture_missing", "2 caption_broken"):
        assert words in result.stdout
    write_split(out, "validation", open_source(f"{tmp_path}/validation*.parquet").read())

    # Everything is there, in its order, to the byte; of a picture that is too large, enough to count as such.
    train = open_pairs(f"{out}@train")
    assert len(train) == len(every) and len(open_pairs(f"{out}@validation")) == 5
    for one, other in zip(train, every, strict=True):
        same(one, other | {key: other[key][: 32 * 2**20 + 1] for key in ("image_0", "image_1")})
    counts = PairLoader(train, batch_size=1, size=(16, 16), seed=0, num_epochs=1, num_workers=0)
    assert sum(batch.weights[0] > 0 for batch in counts) == len(good)
    # It is a data set of TensorFlow Datasets like any other.
    assert read_prompts(f"tfds:{out}@validation") == [r["caption"].decode() for r in good[:5]]


def test_types_that_pandas_makes_of_missing_values(tmp_path):
    table = parquet_table([record(0), record(1)])
    for name, values in (
        ("has_label", pa.array([1.0, None])),
        ("num_example_per_prompt", pa.array([2.0, math.nan])),
        ("label_0", pa.array([1, None], pa.int8())),
        ("caption", pa.array(["a fox", None]).dictionary_encode()),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = open_source(str(tmp_path / "a.parquet")).read()
    assert (first["has_label"], first["num_example_per_prompt"], first["label_0"]) == (True, 2, 1)
    assert (second["has_label"], second["num_example_per_prompt"], second["caption"]) == (False, 0, b"")
    assert math.isnan(second["label_0"])


@pytest.mark.parametrize("name", sources.COLUMNS)
def test_a_missing_or_strange_column_is_refused_by_name(tmp_path, name):
    table = parquet_table([record(0)])
    pq.write_table(table, tmp_path / "0.parquet")
    pq.write_table(table.drop([name]), tmp_path / "1.parquet")
    refused(f"1.parquet has no column '{name}'", open_source, f"{tmp_path}/*.parquet")
    strange = table.set_column(table.schema.get_field_index(name), name, pa.array([[1]]))
    pq.write_table(strange, tmp_path / "1.parquet")
    refused(f"1.parquet: column '{name}' is list", open_source, f"{tmp_path}/*.parquet")


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1, or so")
    refused(r"a\.parquet cannot be read as parquet \(.*download it again", open_source, str(path))
    pq.write_table(parquet_table([record(i) for i in range(50)]), path)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    refused(r"a\.parquet cannot be read", lambda: list(open_source(str(path)).read()))
    refused(r"a\.parquet cannot be read", write_split, tmp_path / "out", "train", open_source(str(path)).read())
    assert not list((tmp_path / "out").iterdir())


def test_a_row_group_is_not_read_at_once(tmp_path):
    path, noise = tmp_path / "a.parquet", np.random.default_rng(0)
    table = parquet_table([record(i, image_0=noise.bytes(50_000)) for i in range(400)])
    pq.write_table(table, path, use_dictionary=False, write_batch_size=10)
    del table
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_source(str(path)).read())
    assert most < 0.4 * path.stat().st_size


def test_the_command_leaves_out_ties_and_labels_anew(tmp_path):
    records = [*map(record, range(9)), record(9, image_0=b"", label_0=0.5, label_1=0.5)]
    records[5] = record(5, image_1=record(5)["image_0"])  # any metric sees a tie
    pq.write_table(parquet_table(records), tmp_path / "a.parquet")
    flags = [f"--source={tmp_path}/a.parquet", f"--out={tmp_path}/out", "--ties=drop"]
    result = prepare(*flags, "--split=human")
    assert result.returncode == 0, result.stderr
    said = f"Wrote 7 records to {tmp_path}/out@human; left out 3 tied; at first sight, 1 picture_missing.\n"
    assert result.stdout == said
    human = [pair["caption"].decode() for pair in open_pairs(f"{tmp_path}/out@human")]
    assert human == [f"caption {i}" for i in (0, 1, 3, 4, 6, 7, 9)]

    result = prepare(*flags, "--split=ai", "--relabel=colorfulness")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"Wrote 9 records to {tmp_path}/out@ai; left out 1 tied; labelled 9 by colorfulness (1 with a fault kept their "
        "labels); at first sight, 1 picture_missing.\n"
    )
    pairs = list(open_pairs(f"{tmp_path}/out@ai"))
    assert [pair["caption"].decode() for pair in pairs] == [f"caption {i}" for i in range(10) if i != 5]
    assert {(pair["label_0"], pair["label_1"]) for pair in pairs[:-1]} == {(1, 0), (0, 1)}
    assert pairs[-1]["label_0"] == 0.5


def test_ties_alone_and_metrics_that_there_are_not(tmp_path):
    pq.write_table(parquet_table([record(2), record(5)]), tmp_path / "a.parquet")
    for flags, words in (
        (["--ties=drop"], "All 2 records of --source are ties; leave --ties=drop out."),
        (["--relabel=beauty"], "--relabel: 'beauty' is no metric; there are pickscore"),
    ):
        result = prepare(f"--source={tmp_path}/a.parquet", f"--out={tmp_path}/out", *flags)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("*"))


# ------------------------------------------------------------------------------------------------------- own folders
def write_folder(folder, rows, kind="csv"):
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        (folder / "pictures" / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        text = "caption,image_a,image_b,label\n" + "\n".join(",".join(map(str, row.values())) for row in rows)
    (folder / f"pairs.{kind}").write_text(text, encoding="utf-8")
    return folder


def row(caption="a fox", a="pictures/0.png", b="pictures/1.png", label=1):
    return {"caption": caption, "image_a": a, "image_b": b, "label": label}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_folder_of_ones_own(tmp_path, kind, as_file):
    rows = [row(), row("an owl", label=0.5), row(" a fox", b="pictures/3.png", label=0.25), row("ein Bär", label=0)]
    folder = write_folder(tmp_path / "mine", rows, kind)
    write_split(tmp_path / "out", "train", open_source(str(folder / f"pairs.{kind}" if as_file else folder)).read())
    pairs = list(open_pairs(f"{tmp_path / 'out'}@train"))
    assert [p["caption"].decode() for p in pairs] == ["a fox", "an owl", "a fox", "ein Bär"]
    assert [(p["label_0"], p["label_1"]) for p in pairs] == [(1, 0), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    assert [p["num_example_per_prompt"] for p in pairs] == [2, 1, 2, 1]
    assert all(p["has_label"] for p in pairs)
    assert pairs[2]["image_1"] == picture(3, kind="PNG")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_single_missing_fields_are_left_to_the_loader(tmp_path, kind):
    rows = [row(), row(caption=""), row(a="pictures/9.png"), row(b=""), row(label=""), row(label="good"), row(label=2)]
    pairs = open_source(str(write_folder(tmp_path, rows, kind))).read()
    loader = PairLoader(list(pairs), batch_size=7, size=(8, 8), seed=0, num_epochs=1, num_workers=0)
    (batch,) = loader
    assert (batch.weights > 0).sum() == 1
    counts = {name: count for name, count in loader.state()["counts"].items() if count}
    assert counts == {"used": 1, "caption_missing": 1, "picture_missing": 2, "label_out_of_range": 3}


def test_captions_with_commas_quotes_and_lines(tmp_path):
    folder = write_folder(tmp_path, [row('"a ""big"" fox, and\nan owl"')])
    (pair,) = open_source(str(folder)).read()
    assert pair["caption"] == b'a "big" fox, and\nan owl'
    (folder / "pairs.csv").write_text("\ufefflabel,image_b,extra,image_a,caption\r\n1,b,x,a,fox\r\n", encoding="utf-8")
    (pair,) = open_source(str(folder)).read()
    assert (pair["caption"], pair["label_0"]) == (b"fox", 1)


def test_pictures_outside_of_the_folder_are_refused_at_once(tmp_path):
    folder = write_folder(tmp_path / "mine", [row()])
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    (folder / "pictures" / "link.png").symlink_to(secret)
    for name in (str(secret), "../secret.png", "pictures/../../secret.png", "pictures/link.png"):
        write_folder(folder, [row(), row(b=name)])
        refused(r"pairs.csv, record 2: image_b is .* outside of .*relative to it", open_source, str(folder))
    write_folder(folder, [row(a="pictures/a\0.png")], "jsonl")
    (folder / "pairs.csv").unlink()
    refused("outside of", open_source, str(folder))


def test_a_pipe_or_a_folder_is_no_picture(tmp_path):
    folder = write_folder(tmp_path, [row("a", a="pictures/pipe"), row("b", a="pictures")])
    os.mkfifo(folder / "pictures" / "pipe")
    assert [r["image_0"] for r in open_source(str(folder)).read()] == [b"", b""]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", b"caption,image_a,label\na,b,1\n", "has no 'image_b'; every record has caption, image_a"),
        ("p.csv", b'caption,image_a,image_b,label\n"a"b,c,d,1\n', "p.csv, line 2: not valid CSV"),
        ("p.csv", b"caption,image_a,image_b,label\n" + b"a" * 200_000 + b",c,d,1\n", "p.csv, line 2: not valid CSV"),
        ("p.csv", b"caf\xe9,image_a,image_b,label\n", "is not UTF-8"),
        ("p.csv", b"a" * 2_000_000, "line 1 is longer than"),
        ("p.csv", b"", "has no records"),
        ("p.csv", b"caption,image_a,image_b,label\n", "has no records"),
        ("p.csv", b"image_a;image_b;label\na;b;1\n", "has no 'caption'"),
        ("p.jsonl", b'{"caption": "a"}\n{"caption": }\n', "p.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b"[1]\n", "line 1: not an object with caption"),
        ("p.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("p.jsonl", b'{"caption": "a", "image_a": "b", "image_b": "c"}\n', "has no 'label'"),
        ("p.txt", b"a fox", "must name parquet files, one CSV or JSONL file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(message, lambda: list(open_source(str(tmp_path / name)).read()))


@given(value=st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=3))
@pytest.mark.parametrize("key", sources.KEYS)
def test_whatever_json_holds_is_a_record(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "p.jsonl").write_text(json.dumps(row(a="", b="") | {key: value}), encoding="utf-8")
    try:
        (pair,) = open_source(str(folder)).read()
    except UserError as error:  # a text may name another folder
        assert "outside of" in str(error)
    else:
        assert isinstance(pair["caption"], bytes) and isinstance(pair["label_0"], float)


# ------------------------------------------------------------------------------------------------- folders and splits
def test_sources_that_are_not_there(tmp_path):
    refused("No file .*none.* is there", open_source, str(tmp_path / "none-*.parquet"))
    refused("has 0 CSV or JSONL files", open_source, str(tmp_path))
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("")
    refused("has 2 CSV or JSONL files", open_source, str(tmp_path))


@pytest.mark.parametrize("flags, words", [([], "--source is missing"), (["--source=a"], "--out is missing")])
def test_flags_that_are_missing(flags, words):
    result = prepare(*flags)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_output_folders_that_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    write_split(tmp_path / "done", "train", [record()])

    def check(name, split="train"):
        return builder.check_output(tmp_path / name, split)

    refused("is a file; choose a folder", check, "file")
    refused("has other files in it; choose a new folder", check, "full")
    refused("has a split 'train' already", check, "done")
    for split in ("all", "train-2", "../train", "", "1st"):
        refused("must be a name of letters", check, "new", split)
    check("done", "validation")
    refused("--source has no records", write_split, tmp_path / "empty", "train", [])


def test_names_of_data_that_cannot_be_opened(tmp_path):
    out = tmp_path / "out"
    for name in ("", "out", "out@", "@train"):
        refused("must be written as FOLDER@SPLIT", open_pairs, name)
    refused("holds no prepared data", open_pairs, f"{out}@train")
    write_split(out, "train", [record()])
    write_split(out, "test", [record()])
    refused("has no split 'validation', only test, train", open_pairs, f"{out}@validation")
    next(out.glob("*-train.array_record*")).unlink()
    refused("is missing; copy it there", open_pairs, f"{out}@train")
    assert len(open_pairs(f"{out}@test")) == 1
    (out / "dataset_info.json").write_text("{")
    refused("cannot be read as prepared data", open_pairs, f"{out}@test")


def test_another_data_set_is_refused(tmp_path):
    from tests.data.test_prompts import prepare as prepare_prompts

    folder = prepare_prompts(tmp_path, "caption", ["a fox"])
    refused("holds the data set 'my_prompts'", open_pairs, f"{folder}@train")


def test_interrupted_preparation_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys, os, signal; from pathlib import Path; from spo_jax.data.builder import write_split;"
        "from tests.preference_data import record\n"
        "def records():\n"
        "    yield from map(record, range(50))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_split(Path(sys.argv[1]), sys.argv[2], records())"
    )
    subprocess.run([sys.executable, "-c", script, str(out), "train"], cwd=ROOT, timeout=60)
    assert [path.name for path in out.iterdir()] == [".incomplete-train"]
    refused("interrupted", open_pairs, f"{out}@train")
    write_split(out, "train", map(record, range(3)))  # again
    subprocess.run([sys.executable, "-c", script, str(out), "validation"], cwd=ROOT, timeout=60)
    assert len(open_pairs(f"{out}@train")) == 3
    refused("no split 'validation', only train", open_pairs, f"{out}@validation")
    write_split(out, "validation", map(record, range(2)))
    assert len(open_pairs(f"{out}@train")) == 3 and len(open_pairs(f"{out}@validation")) == 2
    assert not list(out.glob(".incomplete*"))
    (out / "dataset_info.json").unlink()  # the last file that is written
    refused("interrupted", open_pairs, f"{out}@train")
    write_split(out, "train", map(record, range(3)))
    assert len(open_pairs(f"{out}@train")) == 3


def test_a_full_disk(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path; from spo_jax.data.builder import write_split;"
        "from tests.preference_data import record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "write_split(Path(sys.argv[1]), 'train', [record(i, image_0=bytes(100_000)) for i in range(20)])"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "out")]
    result = subprocess.run(arguments, cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert "UserError: --out=" in result.stderr and "File too large); make space or choose another" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_large_splits_have_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_SHARD_BYTES", 10_000)
    write_split(tmp_path, "train", map(record, range(60)))
    assert len(list(tmp_path.glob("*-train.array_record*"))) > 2
    captions = [pair["caption"] for pair in open_pairs(f"{tmp_path}@train")]
    assert captions == [b"caption %d" % i for i in range(60)]


def test_a_prepared_folder_can_be_moved(tmp_path):
    write_split(tmp_path / "a", "train", map(record, range(3)))
    (tmp_path / "a").rename(tmp_path / "b")
    assert np.isclose(open_pairs(f"{tmp_path / 'b'}@train")[1]["label_1"], 1)
