"""Files of prompts as others write them: every format gives the prompts back, and what is none is refused."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.data.prompts import read_prompts
from spo_jax.errors import UserError

TWO = ["a fox, running", 'an "old" owl']


def table(rows, **dialect):
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


def json_lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


WRITERS = {
    "p.json": json.dumps,
    "objects.json": lambda prompts: json.dumps([{"id": 1, "prompt": prompt} for prompt in prompts], ensure_ascii=False),
    "p.jsonl": json_lines,
    "objects.jsonl": lambda prompts: json_lines({"caption": prompt, "id": 1} for prompt in prompts),
    "p.ndjson": lambda prompts: json_lines({"text": prompt} for prompt in prompts),
    "lines.json": lambda prompts: json_lines({"caption": prompt} for prompt in prompts),
    "lines.txt": lambda prompts: json_lines({"caption": prompt} for prompt in prompts),
    "list.txt": json.dumps,
    "p.csv": lambda prompts: table([["id", "Caption"], *([7, prompt] for prompt in prompts)]),
    "one.csv": lambda prompts: table([["prompt"], *([prompt] for prompt in prompts)], quoting=csv.QUOTE_ALL),
    "plural.csv": lambda prompts: table([["Prompts", "Category"], *([prompt, "x"] for prompt in prompts)]),
    "european.csv": lambda prompts: table([["id", "TEXT"], *([7, prompt] for prompt in prompts)], delimiter=";"),
    "p.tsv": lambda prompts: table([["Prompt", "n"], *([prompt, 7] for prompt in prompts)], dialect="excel-tab"),
    "unix.csv": lambda prompts: table([["caption", "n"], *([prompt, 7] for prompt in prompts)], lineterminator="\n"),
}
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
PROMPTS = st.lists(st.text(CHARACTERS, min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6)


@given(
    prompts=PROMPTS, name=st.sampled_from(sorted(WRITERS)), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])
)
def test_prompts_come_back_from_every_format(tmp_path_factory, prompts, name, encoding):
    path = tmp_path_factory.mktemp("prompts") / name
    path.write_bytes(WRITERS[name](prompts).encode(encoding))
    assert read_prompts(path) == prompts


@given(prompts=PROMPTS.map(lambda prompts: [" ".join(prompt.split()) for prompt in prompts]))
def test_prompts_come_back_from_lines(tmp_path_factory, prompts):
    prompts = ["a fox", *(prompt for prompt in prompts if prompt)]
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(prompts), encoding="utf-8", newline="")
    assert read_prompts(path) == prompts


@pytest.mark.parametrize(
    "line", ["{red|blue} fox", "{a fox}", "[a fox], owl", '"a fox"', "[1]", "caption,id", "12", "a\tb"]
)
def test_a_prompt_may_look_like_something_else(tmp_path, line):
    (tmp_path / "p.txt").write_text(f"{line}\nan owl\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [line, "an owl"]


def test_tabs_without_quoting(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tn\n"red" fox\t1\nan "old" owl\t2\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.tsv") == ['"red" fox', 'an "old" owl']


def test_blank_lines_and_cells_are_no_prompts(tmp_path):
    (tmp_path / "p.csv").write_text("\n\ncaption,id\n\na fox,1\n ,2\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('\n{"caption": "a fox"}\n\n{"caption": " "}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv") == read_prompts(tmp_path / "p.jsonl") == ["a fox"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", b"id,title\n1,a fox\n", "no column caption, prompt or text, only 'id', 'title'"),
        ("p.csv", b"a fox\nan owl\n", "only 'a fox'; name the one"),
        ("p.csv", b"caption\na fox, running\n", "line 2: there are more cells than columns"),
        ("p.csv", b"id,caption\n1\n", "line 2: there are fewer cells than columns"),
        ("p.csv", b'caption\n"a fox\n', "not a valid table"),
        ("p.csv", b"caption\n" + b"x" * 200_000, "not a valid table"),
        ("p.csv", b"x" * 200_000, "not a valid table"),
        ("p.csv", b"", "is empty"),
        ("p.csv", b"caption\n", "is empty"),
        ("p.tsv", b"id\ttitle\n1\ta fox\n", "only 'id', 'title'"),
        ("p.jsonl", b'{"caption": "a fox"}\n{"caption"', "line 2: not valid JSON"),
        ("p.jsonl", b'{"caption": "a fox"}\n\n{"title": "b"}', "line 3 is neither a string nor an object"),
        ("p.jsonl", b'{"title": "b"}', "it has 'title'"),
        ("p.jsonl", b"[" * 200_000, "line 1: not valid JSON"),
        ("p.jsonl", b"3", "line 1 is neither"),
        ("p.jsonl", b"", "is empty"),
        ("p.txt", b'{"title": "a fox"}\n', 'line 1 is neither a string nor an object with a "caption" string'),
        ("p.txt", b'{"caption": "a fox"}\nan owl', "line 2: not valid JSON"),
        ("p.json", b'{"prompts": ["a fox"]}', "must hold a JSON list, not a dict"),
        ("p.txt", b"a\0 \0f\0o\0x\0", "character 1 is NUL"),
        ("p.txt", b"\xff\xfea\0 ", "is not UTF-16"),
        ("p.parquet", b"PAR1", "is a .parquet file, which is not read"),
        ("p.yaml", b"- a fox\n", "is a .yaml file"),
        ("p.ipynb", b"{\n}", "is a .ipynb file"),
        ("p.txt", b'{\n "caption": "a fox"\n}', "must hold a JSON list, not a dict"),
        ("p.txt", b'[{"caption": "a fox"},]', "is not valid JSON"),
        ("p.txt", b'["a fox",\n"an owl"', "is not valid JSON"),
        ("p.txt", b"prompt,seed\na fox,1\nan owl,2\n", "looks like a table"),
        ("p.txt", b"id\tCaption\n1\ta fox\n", "name the file p.tsv"),
        ("p.csv", b"prompt,prompt\na fox,an owl\n", "has several columns 'prompt'"),
        ("p.jsonl.gz", b"\x1f\x8b", "is a .gz file"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert words in str(error.value) and str(tmp_path / name) in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500
