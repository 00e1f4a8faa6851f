"""``spo_jax.label``: its images, ten pairs by real keys in a browser, commands that are killed, mistakes."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest

from spo_jax.data.records import decode_picture
from spo_jax.data.sources import open_source
from spo_jax.images import write_png
from tests.browser import Browser
from tests.small_pipeline import small_pipeline
from tests.system.commands import ROOT, environment
from tests.system.forks import run_forked


def pictures(folder, count):
    """Flat images, two of each of so many prompts: the first is red, the second blue, and green says of which."""
    for i in range(count):
        for side, colour in enumerate(((200, 20 * i, 0), (0, 20 * i, 200))):
            write_png(folder / "given" / f"{i}_{side}.png", np.full((16, 16, 3), colour, np.uint8))
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(count)), encoding="utf-8")
    return f"--images={folder}/given", f"--prompts={folder}/prompts.txt", f"--out={folder}/pairs"


@contextlib.contextmanager
def labelling(*options):
    """A command that is running, and its address; it is killed at the end, if it is still there."""
    command = [sys.executable, "-m", "spo_jax.label", *options]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield process, next((line.strip() for line in lines if line.startswith("http://127.0.0.1:")), None)
        finally:
            process.kill()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepared(folder):
    """Labels of the pairs as the loader gets them, with the colours of their images."""
    out = run_forked(
        [sys.executable, "-m", "spo_jax.prepare", f"--source={folder}/pairs", f"--out={folder}/set"], environment()
    )
    assert out.returncode == 0 and "at first sight" not in out.stderr + out.stdout, out.stderr
    for record in open_source(str(folder / "pairs")).read():
        first, second = (decode_picture(record[f"image_{i}"], (16, 16))[0, 0].tolist() for i in range(2))
        assert first[0] == second[2] == 200 and first[1] == second[1]
        assert record["caption"] == b"prompt %d" % (first[1] // 20)
        yield record["label_0"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_ten_pairs_by_keys_in_a_browser_with_a_command_that_is_killed(tmp_path):
    options = pictures(tmp_path, 10)
    browser, expected = Browser(tmp_path / "profile"), []

    def press(key):
        """Presses a key, and notes what it means by the colour that the page shows left."""
        left_is_red = browser.value(
            "(() => { const c = document.createElement('canvas').getContext('2d');"
            "c.drawImage(document.querySelector('#left img'), 0, 0); return c.getImageData(0, 0, 1, 1).data[0]; })()"
        )
        if key == "Backspace":
            expected.pop()
        else:
            expected.append(0.5 if key == "ArrowDown" else float((key == "ArrowLeft") == (left_is_red == 200)))
        browser.press(key)
        browser.wait(f"document.body.dataset.number == '{len(expected)}' && document.body.dataset.ready")

    def label(address, keys):
        browser.open(address)
        browser.wait(f"document.body?.dataset.number == '{len(expected)}' && document.body.dataset.ready == 'yes'")
        assert browser.value("document.getElementById('caption').textContent") == f"prompt {len(expected)}"
        for key in keys:
            press(key)

    try:
        with labelling(*options) as (process, address):
            label(address, ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft", "Backspace", "ArrowRight"])
            for more in ({"autoRepeat": True}, {"modifiers": 1}):  # a key that is held, and the browser's own "back"
                browser.press("ArrowLeft", **more)
            process.send_signal(signal.SIGKILL)
            process.wait()
            browser.press("ArrowLeft")
            browser.wait("document.getElementById('said').textContent.startsWith('The command has ended')")
        with labelling(*options) as (process, again):
            assert again.split("/")[3] != address.split("/")[3], "a new token"
            label(again, ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowLeft"])
            assert browser.value("document.getElementById('done').hidden") is False
            assert f"{tmp_path}/pairs/pairs.jsonl" in browser.value("document.body.innerText")
            browser.press("Backspace")
            browser.wait("document.body.dataset.number == '9' && document.body.dataset.ready == 'yes'")
            browser.value("document.querySelectorAll('.keys button')[1].click()")
            browser.wait("document.body.dataset.number == '10'")
            expected[-1] = 0.5
            process.send_signal(signal.SIGINT)
            assert "Wrote 10 of 10 pairs" in process.communicate()[0] and process.returncode == 0
    finally:
        browser.close()
    assert len(expected) == 10 and list(prepared(tmp_path)) == expected


def test_no_label_is_lost_when_commands_are_killed(tmp_path):
    """Kills come while presses are sent as fast as they can be; what was answered counts, in the order of the log."""
    options, said, opener = pictures(tmp_path, 200), [], urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(address, press=None):
        body = None if press is None else json.dumps(press).encode()
        with opener.open(
            urllib.request.Request(address, body, {"Content-Type": "application/json"}), timeout=10
        ) as answer:
            return json.load(answer)

    log, turns, state = tmp_path / "pairs" / "session" / "labels.jsonl", np.random.default_rng(0), {"at": 0}
    for wait in (0.01, 0.05, 0.09):
        with labelling(*options) as (process, address):
            there = lines_of(log)
            assert there[: len(said)] == said and len(there) - state["at"] in (0, 1), "one may have had no answer yet"
            said, state = there, ask(address + "state")
            assert state["at"] == len(said)
            assert len(lines_of(tmp_path / "pairs" / "pairs.jsonl")) == state["number"]
            threading.Timer(wait, process.kill).start()
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while True:
                    choice = ("left", "right", "tie", "undo")[turns.choice(4, p=[0.3, 0.3, 0.3, 0.1])]
                    state = ask(address + "press", {"choice": choice, "at": state["at"]})
                    said = lines_of(log)[: state["at"]]
            process.wait()
        with log.open("ab") as file:
            file.write(b'{"pair": 1')
    assert len(said) > 3
    with labelling(*options):
        numbers = []
        for record in lines_of(log):
            assert (record["pair"] if "pair" in record else record["undo"] + 1) == len(numbers)
            numbers = numbers[:-1] if "undo" in record else [*numbers, record["label"]]
        assert [row["label"] for row in lines_of(tmp_path / "pairs" / "pairs.jsonl")] == numbers and numbers
        second = run_forked([sys.executable, "-m", "spo_jax.label", *options], environment())
        assert second.returncode == 2 and "Another command has" in second.stderr


def test_images_are_made_once_and_what_is_missing_again(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na blue owl\n", encoding="utf-8")
    options = (f"--model={small_pipeline()}", f"--prompts={tmp_path}/prompts.txt", f"--out={tmp_path}/pairs")
    small = ("--num_steps=2", "--batch_size=2")
    folder, made = tmp_path / "pairs" / "images" / "pairs", {}
    for missing in (None, "00001_0.png"):
        if missing:
            (folder / missing).unlink()
        with labelling(*options, *small) as (process, address):
            assert address
            process.send_signal(signal.SIGINT)
            assert "Wrote 0 of 2 pairs" in process.communicate()[0] and process.returncode == 0
        now = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert sorted(now) == ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png"]
        assert len(set(now.values())) == 4 and (not made or now == made)
        made = now
    other = run_forked([sys.executable, "-m", "spo_jax.label", *options, *small, "--seed=1"], environment())
    assert other.returncode == 2 and "has pairs of other settings (seed was 0)" in other.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        (["--prompts="], "--prompts is missing"),
        (["--out="], "--out is missing"),
        (["--images="], "--images is empty"),
        (["--model=emoji:model"], "Give either --model or --lora"),
        (["--images=/not/here"], "--images=/not/here is no folder"),
        (["--num_prompts=1"], "has 4 images, and 1 prompts with 2 of each need 2"),
        (["--port=70000"], "port"),
    ],
)
def test_mistakes_end_with_one_sentence(tmp_path, change, words):
    names = {option.split("=")[0] for option in change}
    kept = [option for option in pictures(tmp_path, 2) if option.split("=")[0] not in names]
    result = run_forked([sys.executable, "-m", "spo_jax.label", *kept, *change], environment())
    assert result.returncode == 2 and words in result.stderr
    assert re.fullmatch(r"spo_jax: error: .*\n", result.stderr)
    assert not (tmp_path / "pairs").exists()
