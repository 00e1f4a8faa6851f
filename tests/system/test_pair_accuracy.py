"""``spo_jax.pair_accuracy``: its table, its numbers, and a user's mistakes."""

import json
import re
import sys

import numpy as np
import pytest

from spo_jax.images import write_png
from tests.system.commands import ROOT, environment, run
from tests.system.forks import run_forked

NUM_PAIRS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Grey and colourful flat images, of which people prefer the colourful ones; the last pair is a tie."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    lines = []
    for i in range(NUM_PAIRS):
        colour = np.roll([250, 30, generator.integers(30, 250)], i)
        pictures = [colour, np.full(3, generator.integers(60, 200))]
        label = 1.0 if i % 2 else 0.0
        for name, picture in zip("ab", pictures if label else pictures[::-1], strict=True):
            write_png(folder / f"{i}{name}.png", np.broadcast_to(picture, (40, 40, 3)).astype(np.uint8))
        label = 0.5 if i == NUM_PAIRS - 1 else label
        caption = (
            "a red apple" if i else "a red apple and many more words than the text encoder has room for in its table"
        )
        line = {"caption": caption, "image_a": f"{i}a.png", "image_b": f"{i}b.png", "label": label}
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = folder / "prepared"
    prepare = [sys.executable, "-m", "spo_jax.prepare", f"--source={folder}", "--split=test", f"--out={out}"]
    result = run(prepare, environment())
    assert result.returncode == 0, result.stderr
    return out


def evaluate(data, *arguments, split="test", num_devices=1, run=run_forked):
    given = {argument.partition("=")[0] for argument in arguments}
    common = [f"--pairs={data}@{split}", "--model=emoji:model", "--guidance_scale=2", "--num_workers=0"]
    common = [argument for argument in common if argument.partition("=")[0] not in given]
    env = environment(num_devices) | {"PYTHONPATH": f"{ROOT}:{data.parent}"}
    return run([sys.executable, "-m", "spo_jax.pair_accuracy", *common, *arguments], env)


def test_a_judge_of_ones_own(data, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8"), re.DOTALL)
    (data.parent / "my_judge.py").write_text(code, encoding="utf-8")
    out = tmp_path / "new" / "accuracy.json"
    arguments = ["--fn=my_judge:score", "--timesteps=951,0", "--num_pairs=7", "--batch_size=4", f"--out={out}"]
    result = evaluate(data, *arguments, "--plain=emoji:model/clip", run=run)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(out.read_text(encoding="utf-8"))
    assert [row["timestep"] for row in numbers["timesteps"]] == [0, 951]
    assert (numbers["num_pairs"], numbers["num_ties"], numbers["fn"]) == (7, 0, "my_judge:score")
    first, last = numbers["timesteps"]
    assert first["accuracy"]["scorer"]["value"] == 1, "nearly nothing is hidden at t = 0"
    assert first["accuracy"]["scorer"] == first["accuracy"]["told_0"], "it does not look at the timestep"
    assert set(first["gain"]) == {"told_0", "plain"} and last["gain"]["told_0"]["value"] == 0
    assert "| scorer " in result.stdout and "| gain over plain" in result.stdout and "7 pairs" in result.stdout


def test_a_step_aware_model_beside_itself_kept_from_knowing_the_timestep(data):
    result = evaluate(data, "--scorer=emoji:model/scorer", "--timesteps=501", num_devices=2)
    assert result.returncode == 0, result.stderr
    labels = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")]
    assert [labels[0], *labels[2:]] == ["pairwise accuracy", "scorer", "told_0", "gain over told_0"]
    assert "8 pairs, ties left out: 1." in result.stdout
    assert "warning: 1 of 2 captions are longer than the 16 tokens" in result.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Give either --scorer (for example --scorer=runs/spm/best) or --fn=my_module:score"),
        (["--scorer=a", "--fn=b:c"], "Give either --scorer"),
        (["--scorer=a", "--pairs="], "--pairs is missing; for example --pairs="),
        (["--scorer=a", "--model="], "--model is missing; for example --model=emoji:model"),
        (["--scorer=a", "--timesteps=0,x"], "--timesteps=0,x must be numbers from 0"),
        (["--scorer=a", "--out=accuracy.csv"], "--out=accuracy.csv must name a JSON file"),
        (["--fn=absent:score"], "--fn=absent:score: there is no module absent"),
        (["--scorer=a", "--pairs=b"], "Data 'b' must be written as FOLDER@SPLIT"),
        (["--scorer=no/such/scorer"], "'no/such/scorer' does not exist here"),
        (["--fn=builtins:print", "--timesteps=0,1000"], "--timesteps=1000 is beyond the model's last, 999"),
        (["--fn=builtins:print"], "--fn=builtins:print gives no array"),
    ],
)
def test_a_mistake_ends_with_one_sentence(data, arguments, words):
    result = evaluate(data, *arguments)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("spo_jax: error: ") and words in last, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout.strip().startswith("|")


def test_a_split_that_is_not_there(data):
    result = evaluate(data, "--scorer=emoji:model/scorer", split="train", run=run)
    assert result.returncode == 2 and "has no split 'train', only test." in result.stderr, result.stderr
