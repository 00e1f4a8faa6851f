"""``scores.csv`` is read back bit for bit, an interruption costs one row, and mistakes are one sentence."""

import csv
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.errors import UserError
from spo_jax.evaluation.score_table import (
    Row,
    ScoreTable,
    append_rows,
    import_scores,
    make_table,
    number_text,
    open_rows,
    read_rows,
    read_table,
    scored,
    table_rows,
    write_table,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def make(models=("base", "tuned"), metrics=("a", "b"), prompts=("cat", 'a "dog", red'), seeds=(0, 1)):
    shape = (len(models), len(metrics), len(prompts), len(seeds))
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return ScoreTable(tuple(models), tuple(metrics), tuple(prompts), tuple(seeds), scores)


def assert_same(actual, expected):
    assert actual[:4] == expected[:4]
    np.testing.assert_array_equal(actual.scores, expected.scores)
    assert actual.scores.dtype == np.float32


def refused(words, function, *args, **options):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@given(FLOATS)
def test_a_number_reads_back(value):
    assert np.float32(float(number_text(value))) == np.float32(value)


def test_numbers_are_short():
    assert number_text(np.float32(0.1)) == "0.1"


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=3, unique=True), st.data())
def test_round_trip(tmp_path_factory, prompts, models, data):
    shape = (len(models), 2, len(prompts), 2)
    values = data.draw(st.lists(FLOATS, min_size=math.prod(shape), max_size=math.prod(shape)))
    scores = np.array(values, np.float32).reshape(shape)
    table = ScoreTable(tuple(models), ("a", "b"), tuple(prompts), (3, 7), scores)
    path = tmp_path_factory.mktemp("table") / "scores.csv"
    write_table(path, table)
    assert_same(read_table(path), table)
    assert_same(import_scores(path), table)


def test_other_programs_read_it(tmp_path):
    write_table(tmp_path / "scores.csv", make())
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "prompt_id", "seed", "prompt", "a", "b"]
    assert len(rows) == 8 and rows[2]["prompt"] == 'a "dog", red'


def test_metric_by_metric_and_after_an_interruption(tmp_path):
    """Rows of one metric, half a row, then a second run with both metrics, which knows what is done."""
    table, path = make(), tmp_path / "scores.csv"
    rows = list(table_rows(table))

    def only(row, *names):
        return row._replace(scores={name: row.scores[name] for name in names})

    names, done = open_rows(path, ["a"])
    assert (names, done) == (("a",), [])
    append_rows(path, names, [only(row, "a") for row in rows[:3]])
    append_rows(path, names, [only(row, "a") for row in rows[3:5]])
    whole = path.read_bytes()
    path.write_bytes(whole + b'tuned,0,1,"caf\xc3')
    names, done = open_rows(path, ["b", "a"])
    assert names == ("a", "b") and len(done) == 5
    missing = {(row.model, row.prompt_id, row.seed, name) for row in rows for name in names} - scored(done)
    assert len(missing) == 16 - 5
    append_rows(path, names, [only(row, "a") for row in rows[5:]])
    append_rows(path, names, [only(row, "b") for row in rows])
    assert_same(read_table(path), table)
    write_table(path, read_table(path))
    assert len(read_rows(path)[1]) == 8


@pytest.mark.parametrize("prompt", ["two\nlines", 'a "word", more'])
def test_any_cut_of_the_file_loses_at_most_one_row(tmp_path, prompt):
    path = tmp_path / "scores.csv"
    names, _ = open_rows(path, ["a"])
    start = path.stat().st_size
    append_rows(path, names, [Row("base", i, 0, prompt, {"a": 0.5}) for i in range(3)])
    data = path.read_bytes()
    for length in range(start, len(data) + 1):
        path.write_bytes(data[:length])
        _, rows = open_rows(path, ["a"])
        assert len(rows) in (3 * (length - start) // (len(data) - start), 3 * length // len(data))
        append_rows(path, names, [Row("base", 9, 0, "next", {"a": 1.0})])
        assert [row.prompt_id for row in read_rows(path)[1]] == [*range(len(rows)), 9]


def test_order_of_models_and_seeds_can_be_asked_for():
    table = make()
    turned = make_table(table_rows(table), ("b",), models=("tuned", "base"), seeds=(1, 0))
    np.testing.assert_array_equal(turned.scores[:, 0], table.scores[::-1, 1, :, ::-1])


def test_what_is_refused(tmp_path):
    rows, metrics = list(table_rows(make())), ("a", "b")

    def changed(**changes):
        return [*rows[:3], rows[3]._replace(**changes), *rows[4:]]

    refused("has a of model tuned, prompt 1, seed 1 twice", make_table, [*rows, rows[-1]], metrics)
    refused("lacks 2 of 16 scores", make_table, rows[:-1], metrics)
    refused("the first a of model tuned, prompt 1, seed 1", make_table, rows[:-1], metrics)
    refused(
        "'other', which is none of base, tuned", make_table, changed(model="other"), metrics, models=["base", "tuned"]
    )
    refused("has nan as b of model base, prompt 1, seed 1", make_table, changed(scores={"a": 1, "b": np.nan}), metrics)
    refused("has 1e+39 as a of", make_table, changed(scores={"a": 1e39, "b": 0}), metrics)
    refused("says 'bird' in a row of", make_table, changed(prompt="bird"), metrics)
    refused(
        "scores of prompt 2, but there are 2", make_table, changed(prompt_id=2), metrics, prompts=rows_prompts(rows)
    )
    refused("no rows of prompt 2, but some of 9", make_table, changed(prompt_id=9), metrics)
    refused("but the seeds are 0, 1", make_table, changed(seed=5), metrics, seeds=(0, 1))
    refused("lacks", make_table, rows, metrics, models=["base", "tuned", "more"])
    refused("holds no rows", make_table, [], metrics)
    refused("holds no scores of a metric", make_table, rows, ())


def rows_prompts(rows):
    return list(dict.fromkeys(row.prompt for row in rows))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no header"),
        ("model,seed\n", "begins with the columns"),
        ("model,prompt_id,seed,prompt,a,a\n", "a column twice"),
        ("model,prompt_id,seed,prompt,a\nbase,0,0,cat\n", "line 2: 4 cells under 5 columns"),
        ("model,prompt_id,seed,prompt,a\nbase,0,0,cat,much\n", "line 2: 'much' under a is not a number"),
        ("model,prompt_id,seed,prompt,a\nbase,0.5,0,cat,1\n", "'0.5' under prompt_id is not a whole number"),
        ('model,prompt_id,seed,prompt,a\nbase,0,0,"cat"x,1\n', "line 2: not CSV"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, words):
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    refused(words, read_rows, path)
    refused(words, open_rows, path, ["a"])


def test_a_file_that_is_not_there(tmp_path):
    refused("cannot be read", read_table, tmp_path / "scores.csv")


def write(tmp_path, *lines):
    path = tmp_path / "other.csv"
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")  # as a spreadsheet writes it; no end of line
    return path


def test_scores_from_elsewhere(tmp_path):
    """By text, without seeds, with a column that is no score, in another order, without a last end of line."""
    path = write(
        tmp_path, "file,hps,prompt,model", "x.png,0.25,dog,tuned", "y,0.5,dog,base", "z,1,cat,tuned", "w,2,cat,base"
    )
    table = import_scores(path, metrics=["hps"], models=["base", "tuned"])
    assert table[:4] == (("base", "tuned"), ("hps",), ("dog", "cat"), (0,))
    np.testing.assert_array_equal(table.scores[:, 0, :, 0], [[0.5, 2], [0.25, 1]])
    ordered = import_scores(path, metrics=["hps"], prompts=["cat", "dog"])
    np.testing.assert_array_equal(ordered.scores[:, 0, :, 0], [[1, 0.25], [2, 0.5]])
    refused("'x.png' under file is not a number", import_scores, path)
    refused("'dog' is none of the 1 prompts", import_scores, path, metrics=["hps"], prompts=["cat"])
    refused("no column aes", import_scores, path, metrics=["aes"])
    refused("two of them are 'cat'", import_scores, path, metrics=["hps"], prompts=["cat", "cat"])


def test_scores_from_elsewhere_by_number(tmp_path):
    path = write(tmp_path, "prompt_id,seed,model,hps", "0,5,base,1", "0,6,base,2", "1,5,base,3", "1,6,base,4")
    assert import_scores(path)[2:4] == (("prompt 0", "prompt 1"), (5, 6))
    assert import_scores(path, prompts=["cat", "dog"]).prompts == ("cat", "dog")
    refused("scores need model", import_scores, write(tmp_path, "prompt,hps", "cat,1"))
    refused("no column with scores", import_scores, write(tmp_path, "model,prompt", "base,cat"))
