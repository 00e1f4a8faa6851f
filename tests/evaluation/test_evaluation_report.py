"""Report, tables and plot: complete, readable without a network, and safe to open whatever prompts say."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from spo_jax.evaluation.evaluation_report import report_page, write_reports
from spo_jax.evaluation.report_script import SCRIPT
from spo_jax.evaluation.results import MetricText, read_results, summarise
from spo_jax.evaluation.results_plot import draw_differences, svg
from spo_jax.evaluation.results_tables import difference, explanation, latex, lines, markdown
from spo_jax.evaluation.score_table import ScoreTable
from spo_jax.evaluation.statistics import disagreement

ROLE = "It was trained on 100 % of this_metric."
EVIL = '</script><img src=x onerror="alert(1)"> & <!-- '


def make(models=3, metrics=2, prompts=6, seeds=2, prompt="a red cat", model="tuned_1"):
    scores = np.random.default_rng(0).normal(size=(models, metrics, prompts, seeds)).astype(np.float32)
    scores += np.arange(models, dtype=np.float32)[:, None, None, None]
    names = ("base", model, "longer")[:models]
    table = ScoreTable(names, ("pick", "hps")[:metrics], (prompt,) * prompts, tuple(range(seeds)), scores)
    metrics = {"pick": MetricText("PickScore", "What people chose.", ".2f")}
    roles = {(model, "pick"): ROLE} if models > 1 else {}
    settings = {"images": {"guidance": 7.5}, "prompts_sha256": "ab12"}
    return table, summarise(table, settings, metrics=metrics, roles=roles, resamples=50)


class Page(HTMLParser):
    """Tags and texts; checks that each element is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("metrics", [1, 2])
@pytest.mark.parametrize(("prompts", "seeds"), [(1, 1), (6, 2)])
def test_all_files_are_written_and_hold_what_was_measured(tmp_path, models, metrics, prompts, seeds):
    table, results = make(models, metrics, prompts, seeds)
    write_reports(tmp_path, results, table)
    names = {"report.html", "results.json", "results.md", "results.tex"}
    assert {path.name for path in tmp_path.iterdir()} == names | (
        {"results.png", "results.svg"} if models > 1 else set()
    )
    assert read_results(tmp_path / "results.json") == results
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    for line in lines(results):
        assert line.mean.split(" [")[0] in text and line.metric in text and line.model in text
        assert not line.role or line.role in text
    assert "images.guidance" in text and "ab12" in text


def test_the_page_needs_no_other_file_but_images_and_no_network():
    table, results = make()
    page = report_page(results, table, images=True)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not [attrs for _, attrs in Page(page).tags if "src" in attrs or "href" in attrs]
    assert '"images/" + encodeURIComponent' in page


def test_every_control_that_the_script_asks_for_is_there():
    table, results = make()
    page = report_page(results, table, images=True)
    ids = {attrs.get("id") for _, attrs in Page(page).tags}
    asked = set(re.findall(r'at\("(\w+)"\)', SCRIPT))
    assert asked <= ids and {"filter0", "filter1", "data"} <= ids
    options = [attrs["value"] for tag, attrs in Page(page).tags if tag == "option"]
    assert options[:2] == ["1", "2"] and options[2] == "disagreement"


def test_data_of_the_page():
    table, results = make()
    data = data_of(report_page(results, table, images=False))
    np.testing.assert_array_equal(np.array(data["scores"], np.float32), table.scores)
    expected = disagreement(table.scores[2].astype(float) - table.scores[0])
    np.testing.assert_allclose(data["disagreement"][1], expected, atol=1e-3)
    assert data["images"] is False and [metric["title"] for metric in data["metrics"]] == ["PickScore", "hps"]


def test_prompts_and_names_cannot_do_anything():
    table, results = make(prompt=EVIL, model=EVIL)
    page = report_page(results, table, images=True)
    assert page.count("</script>") == 2
    assert data_of(page)["prompts"][0] == EVIL
    assert not [tag for tag, _ in Page(page).tags if tag == "img"]
    assert "<img" not in markdown(results).replace("\\<img", "")
    ElementTree.fromstring(svg(draw_differences(results)))


def test_markdown():
    _, results = make()
    rows = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * 3 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "It was trained on 100 % of this\\_metric." in rows[3] and "tuned\\_1" in rows[3]
    assert explanation(results) in markdown(results)


def test_latex():
    """A tabular with as many cells in each row as columns; nothing special is left bare."""
    _, results = make()
    text = latex(results)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 2 * 3 and all(line.count(" & ") == 5 for line in rows)
    assert text.count(r"\midrule") == 2 and r"tuned\_1" in text
    assert r"$^{a}$It was trained on 100 \% of this\_metric." in text
    assert not re.search(r"(?<!\\)[%_#&](?!\s)", text.split("\n", 1)[1].replace(" & ", ""))
    assert text.count("$") % 2 == 0


def test_differences_have_digits_enough():
    against = {"mean_difference": 0.0123, "interval": [0.0023, 0.0223]}
    assert difference(against, ".2f") == "+0.012 [+0.002, +0.022]"
    assert difference(against | {"interval": None}, ".2f") == "+0.01"
    assert difference(against | {"interval": [0.0, 0.0], "mean_difference": 0.0}, ".2f") == "+0.00 [+0.00, +0.00]"


@pytest.mark.parametrize("size", [1e-6, 0.03, 0.99, 1.0, 9.99, 12345.0])
def test_plot_holds_all_it_draws(tmp_path, size):
    """Whatever the scale, whiskers and zero lie within the figure."""
    table, _ = make()
    results = summarise(table._replace(scores=table.scores * np.float32(size)), {}, resamples=20)
    figure = draw_differences(results)
    for shape in figure.shapes:
        for x, y in shape.points:
            assert 0 <= x <= figure.width and 0 <= y <= figure.height
    assert sum(shape.kind == "dot" for shape in figure.shapes) == 2 * 2


def test_plot_of_no_difference(tmp_path):
    table, _ = make(models=2)
    table.scores[1] = table.scores[0]
    results = summarise(table, {}, resamples=20)
    write_reports(tmp_path, results, table)
    dots = [shape for shape in draw_differences(results).shapes if shape.kind == "dot"]
    assert all(dot.fill == "paper" for dot in dots)


def test_picture_for_a_paper(tmp_path):
    table, results = make()
    write_reports(tmp_path, results, table)
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 10
    texts = [shape.text for shape in draw_differences(results).shapes]
    assert texts.count("*") == 1 and any("trained or chose" in text for text in texts)
