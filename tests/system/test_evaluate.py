"""``spo_jax.evaluate``: images, scores and report of several models; interruptions; an independent count; mistakes."""

import csv
import json
import shutil
import sys

import numpy as np
import PIL.Image
import pytest

from spo_jax.formats.lora_write import write_lora
from spo_jax.formats.pipeline import read_part
from spo_jax.images import write_png
from tests.lora_files import random_adapters
from tests.small_pipeline import small_pipeline
from tests.system.commands import environment
from tests.system.forks import run_forked

PROMPTS = ["a red apple", "a fox on a teal background", "a blue owl"]
METRICS = "colorfulness,scorer=emoji:model/scorer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, and adapters that change every image."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    _, params = read_part("unet", small_pipeline() / "unet")
    write_lora(folder / "strong", random_adapters({"unet": params}))
    return folder


def command(folder, out, *more, metrics=METRICS):
    return [
        *(sys.executable, "-m", "spo_jax.evaluate", f"--prompts={folder}/prompts.txt", f"--metrics={metrics}"),
        *("--seeds=2", "--num_steps=2", "--batch_size=2", f"--out={out}", *more),
    ]


def models(folder):
    return f"--model={small_pipeline()}", f"--lora={folder}/strong"


def run(arguments):
    return run_forked(arguments, environment())


@pytest.fixture(scope="module")
def evaluated(folder):
    out = folder / "out"
    result = run(command(folder, out, *models(folder)))
    assert result.returncode == 0, result.stderr
    return out, result


def rows_of(out):
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_of_each_model_is_scored(evaluated):
    out, result = evaluated
    rows = rows_of(out)
    assert [(r["model"], r["prompt_id"], r["seed"], r["prompt"]) for r in rows] == [
        (model, str(i), str(seed), prompt)
        for model in ("model", "strong")
        for i, prompt in enumerate(PROMPTS)
        for seed in range(2)
    ]
    assert {"results.json", "results.md", "results.tex", "results.png", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    text = json.dumps(results)
    assert "prompts_sha256" in text and "guidance_scale" in text and "lora_sha256" in text
    assert "Report:" in result.stdout


def test_models_share_the_noise_and_prompts_and_seeds_do_not(folder, evaluated):
    out, _ = evaluated
    again = folder / "again"
    weak = folder / "weak"
    shutil.copytree(folder / "strong", weak)
    result = run(
        command(folder, again, f"--model={small_pipeline()}", f"--lora={folder}/weak:0", metrics="colorfulness")
    )
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (again / "images" / "model").iterdir())
    pictures = [(again / "images" / "model" / name).read_bytes() for name in names]
    assert len(set(pictures)) == len(names) == 6
    # Adapters of strength 0 are the base model: the same noise gives the same image.
    assert pictures == [path.read_bytes() for path in sorted((again / "images" / "weak_0").iterdir())]
    assert pictures == [(out / "images" / "model" / name).read_bytes() for name in names], "and in every run"


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(folder, evaluated, tmp_path):
    out, _ = evaluated
    half = shutil.copytree(out, tmp_path / "half")
    (half / "images" / "strong" / "00001_1.png").unlink()
    shutil.rmtree(half / "images" / "model")
    text = (half / "scores.csv").read_bytes()
    (half / "scores.csv").write_bytes(text[: 2 * len(text) // 3])  # in the middle of a line
    result = run(command(folder, half, *models(folder)))
    assert result.returncode == 0, result.stderr
    for name in ("scores.csv", "results.json", "report.html"):
        assert (half / name).read_bytes() == (out / name).read_bytes(), name
    for path in (out / "images").rglob("*.png"):
        assert (half / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_given_images_have_the_scores_that_an_independent_program_computes(folder, evaluated, tmp_path):
    """Colourfulness again, by NumPy, of the files; and images of any program in a folder have the same numbers."""
    out, _ = evaluated
    theirs = tmp_path / "theirs"
    for i, path in enumerate(sorted((out / "images" / "strong").iterdir())):
        write_png(theirs / f"image {i + 5}.png", np.asarray(PIL.Image.open(path)))
    result = run(command(folder, tmp_path / "given", f"--images=b={theirs}", metrics="colorfulness"))
    assert result.returncode == 0, result.stderr
    found = [float(row["colorfulness"]) for row in rows_of(tmp_path / "given")]
    ours = [float(row["colorfulness"]) for row in rows_of(out) if row["model"] == "strong"]
    assert found == ours
    for score, path in zip(ours, sorted((out / "images" / "strong").iterdir()), strict=True):
        red, green, blue = np.moveaxis(np.asarray(PIL.Image.open(path), np.float64), -1, 0)
        axes = red - green, (red + green) / 2 - blue
        expected = np.hypot(*(x.std() for x in axes)) + 0.3 * np.hypot(*(x.mean() for x in axes))
        np.testing.assert_allclose(score, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--metrics=pickscor"], "'pickscor' is no metric"),
        (["--metrics=scorer=/not/here"], "/not/here"),
        (["--metrics=imagereward=/not/here"], "/not/here"),
        (["--images=x=/not/here"], "--images=/not/here is no folder"),
        (["--prompts=/not/here.txt"], "does not exist"),
        (["--solver=dpmpp_2m", "--eta=1"], "--eta belongs to --solver=ddim"),
        (["--seeds=3"], "seeds was 2"),
    ],
)
def test_mistakes_end_with_one_sentence_before_anything_is_sampled(folder, evaluated, change, message):
    out = evaluated[0] if change == ["--seeds=3"] else folder / "nothing"
    names = {option.split("=")[0] for option in change}
    kept = [option for option in command(folder, out, *models(folder)) if option.split("=")[0] not in names]
    result = run([*kept, *change])
    assert result.returncode == 2 and message in result.stderr
    assert not (folder / "nothing" / "images").exists()


def test_without_a_model_adapters_are_compared_with_the_one_they_were_trained_with(folder, tmp_path):
    workdir = shutil.copytree(folder / "strong", tmp_path / "mine")
    (workdir / "config.json").write_text(json.dumps({"model": str(small_pipeline())}), encoding="utf-8")
    result = run(command(folder, tmp_path / "out", f"--lora={workdir}", metrics="colorfulness"))
    assert result.returncode == 0, result.stderr
    assert [row["model"] for row in rows_of(tmp_path / "out")] == ["model"] * 6 + ["mine"] * 6
    result = run(command(folder, tmp_path / "other", f"--lora={folder}/strong", metrics="colorfulness"))
    assert result.returncode == 2 and "--model is missing" in result.stderr


def test_images_that_are_damaged_or_too_few_are_refused(folder, evaluated, tmp_path):
    pictures = shutil.copytree(evaluated[0] / "images" / "strong", tmp_path / "pictures")
    (pictures / "00000_0.png").write_bytes((pictures / "00000_0.png").read_bytes()[:60])
    result = run(command(folder, tmp_path / "a", f"--images=x={pictures}", metrics="colorfulness"))
    assert result.returncode == 2 and "00000_0.png is damaged" in result.stderr
    (pictures / "00000_0.png").unlink()
    result = run(command(folder, tmp_path / "b", f"--images=x={pictures}", metrics="colorfulness"))
    assert result.returncode == 2 and "has 5 images, and 3 prompts with 2 of each need 6" in result.stderr


def test_scores_of_another_program_get_the_same_statistics(folder, evaluated, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    lines = ["model,prompt_id,seed,their score"]
    lines += [f"{row['model']},{row['prompt_id']},{row['seed']},{row['colorfulness']}" for row in rows_of(out)]
    (tmp_path / "theirs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run(command(folder, out, *models(folder), f"--scores={tmp_path}/theirs.csv", metrics="colorfulness"))
    assert result.returncode == 0, result.stderr
    assert all(row["their score"] == row["colorfulness"] for row in rows_of(out))
    assert "their score" in (out / "results.md").read_text(encoding="utf-8")
    assert "their score" in json.dumps(json.loads((out / "results.json").read_text(encoding="utf-8")))

    changed = [lines[0], *(f"{line.rpartition(',')[0]},0.5" for line in lines[1:])]
    (tmp_path / "theirs.csv").write_text("\n".join(changed) + "\n", encoding="utf-8")
    result = run(command(folder, out, *models(folder), f"--scores={tmp_path}/theirs.csv", metrics="colorfulness"))
    assert result.returncode == 2 and "has 0.5 as their score of prompt 0" in result.stderr


def test_images_are_exported_in_the_layout_of_a_benchmark_or_refused(folder, evaluated, tmp_path):
    out = shutil.copytree(evaluated[0], tmp_path / "out")
    folders = [f"--export={layout}={tmp_path}/{layout}" for layout in ("t2i-compbench", "nothing")]
    refused = [run(command(folder, out, *models(folder), export)) for export in folders]
    assert refused[0].returncode == refused[1].returncode == 2
    assert "10" in refused[0].stderr and "one of hpsv2, geneval, t2i-compbench" in refused[1].stderr
