"""Measures models: images of the same prompts and noise, scored by the metrics that papers report.

python -m spo_jax.evaluate --model=emoji:model --lora=runs/demo --prompts=emoji:prompts/held_out.txt \\
    --metrics=colorfulness,clip=emoji:model/clip --seeds=4 --out=runs/eval
python -m spo_jax.evaluate --images=a=pictures/a --images=b=pictures/b --prompts=parti --metrics=pickscore --out=...

Each --model is measured, and on the first one each --unet and each --lora; without --model it is the one that a --lora
was trained with. The first one is what the others are compared with. Run the same command again to go on after an
interruption, or with more metrics. docs/metrics.md says what is measured how.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from spo_jax import cli
from spo_jax.errors import UserError

if TYPE_CHECKING:  # these import networks, and a wrong flag should not wait for that
    from spo_jax.evaluation.image_metric import ImageMetric
    from spo_jax.evaluation.image_metrics import MetricOptions
    from spo_jax.evaluation.pictures import Rows, SampleRows
    from spo_jax.formats.base import Base

MODEL = flags.DEFINE_multi_string("model", [], "Pipeline, as of spo_jax.generate; may be given several times.")
VARIANT = flags.DEFINE_string("variant", None, "Of the weight files, such as fp16.")
UNET = flags.DEFINE_multi_string("unet", [], "A UNet as trainers save it; each is a model of its own.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the models'.")
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "LoRA file or --workdir, also with a strength, FILE:0.7; each is a model of its own, on the first --model.",
)
IMAGES = flags.DEFINE_multi_string("images", [], "NAME=FOLDER of images that exist, in the order of their names.")
PROMPTS = flags.DEFINE_string("prompts", None, "A prompt set (parti, hpd, pickapic-test, geneval, spo-4k) or a file.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "Only the first so many.", lower_bound=1)
METRICS = flags.DEFINE_list("metrics", [], "Names with commas between, also with a place of the files, NAME=PLACE.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Images of a prompt.", lower_bound=1, upper_bound=10_000)
SEED = cli.seed_flag("Root of the noise.")
SOLVER = flags.DEFINE_enum("solver", "ddim", ["ddim", "dpmpp_2m"], "dpmpp_2m needs fewer steps.")
STEPS = flags.DEFINE_integer("num_steps", 20, "Steps of the solver.", lower_bound=1, upper_bound=1000)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "Of classifier-free guidance.", 0.0, 1000.0)
ETA = flags.DEFINE_float("eta", 0.0, "DDIM's eta.", lower_bound=0.0, upper_bound=1.0)
HEIGHT = cli.side_flag("height")
WIDTH = cli.side_flag("width")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which the pipeline computes.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at a time.", lower_bound=1, upper_bound=2**16)
METRIC_BATCH_SIZE = flags.DEFINE_integer("metric_batch_size", 16, "Images that a metric's network sees.", 1, 2**16)
METRIC_TOKENIZER = flags.DEFINE_string(
    "metric_tokenizer", None, "Of metrics with a CLIP: a folder; by default that beside the weights, or OpenAI's."
)
HPSV2_RESIZE = flags.DEFINE_enum(
    "hpsv2_resize", "tensor", ["tensor", "tensor_antialias", "pil_crop"], "See docs/metrics.md."
)
SCORES = flags.DEFINE_multi_string(
    "scores", [], "CSV of another program's scores: model, prompt_id or prompt, seed, a column for each metric."
)
EXPORT = flags.DEFINE_multi_string(
    "export", [], "LAYOUT=FOLDER: the images as hpsv2, geneval or t2i-compbench read them, in a folder for each model."
)
LAYOUTS = ("hpsv2", "geneval", "t2i-compbench")
SCORED_AT_ONCE = 64
OUT = flags.DEFINE_string("out", None, "Folder for images, scores, results and report.")


class Entry(NamedTuple):
    """A model: its name in tables, its pipeline, adapters, or the folder of images that exist."""

    name: str
    base: Base | None = None
    lora: str = ""
    folder: str = ""


def entries() -> list[Entry]:
    """What the flags name, the first one first; UserError if two have one name."""
    from spo_jax.formats.base import Base, base_of

    variant, vae = VARIANT.value, VAE.value
    bases = [Base(model, variant or "", vae=vae or "") for model in MODEL.value]
    if not bases and (LORA.value or UNET.value):
        bases = [base_of(LORA.value, model=None, variant=variant, unet=None, vae=vae)]
    found = [Entry(_name(base.model), base) for base in bases]
    found += [Entry(_name(unet), bases[0]._replace(unet=unet)) for unet in UNET.value]
    found += [Entry(_name(lora), bases[0], lora) for lora in LORA.value]
    for text in IMAGES.value:
        name, sign, folder = text.partition("=")
        if not sign or not name or not folder:
            raise UserError(f"--images={text} must be NAME=FOLDER, for example --images=theirs=pictures/theirs.")
        found.append(Entry(_name(name), folder=folder))
    names = [entry.name for entry in found]
    if not found:
        raise UserError("Nothing to measure: give --model, --lora or --images.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two models are called {twice[0]!r}; rename a file or a folder.")
    return found


def _name(text: str) -> str:
    """The last part of a path or of a name on the hub, as a folder may be called."""
    last = Path(text.rstrip("/")).name.partition("@")[0]
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in last.removesuffix(".safetensors")) or "model"


def main() -> None:
    """Checks everything, makes what is missing, measures, and writes results and report."""
    for flag, example in ((PROMPTS, "parti"), (OUT, "runs/eval"), (METRICS, "pickscore,clip")):
        if not flag.value and not (flag is METRICS and (SCORES.value or EXPORT.value)):
            raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}.")
    for text in EXPORT.value:
        if text.partition("=")[0] not in LAYOUTS or not text.partition("=")[2]:
            raise UserError(f"--export={text} must be LAYOUT=FOLDER, with one of {', '.join(LAYOUTS)}.")
    if SOLVER.value != "ddim" and ETA.value > 0:
        raise UserError(f"--eta belongs to --solver=ddim; leave it out with --solver={SOLVER.value}.")
    models, out = entries(), Path(OUT.value)

    from spo_jax.data.prompts import read_prompts
    from spo_jax.evaluation.image_metrics import named_metrics, open_metric
    from spo_jax.evaluation.layouts import image_path
    from spo_jax.evaluation.pictures import Rows, given_pictures, read_picture
    from spo_jax.files import write_text

    metrics = named_metrics(METRICS.value)
    rows = Rows(read_prompts(PROMPTS.value)[: NUM_PROMPTS.value], SEEDS.value)
    given = {entry.name: given_pictures(Path(entry.folder), rows) for entry in models if entry.folder}
    settings = settings_of(models, rows, given)
    record(out, settings)
    missing = [e for e in models if not all(image_path(out, e.name, *place).is_file() for place in rows.places)]
    if missing:
        for name, place in metrics.items():
            open_metric(name, place, options())  # what is not there or does not fit should not wait for the images
        for path in (path for paths in given.values() for path in paths):
            read_picture(path)
    write_text(out / "prompts.json", json.dumps(rows.prompts, indent=0, ensure_ascii=False) + "\n")
    for entry in missing:
        make_pictures(entry, rows, given, out)
    opened = {name: score_pictures(name, place, models, rows, out) for name, place in metrics.items()}
    theirs = {name for path in SCORES.value for name in take_scores(Path(path), models, rows, out)}
    if opened or theirs:
        finish(out, models, rows, settings, opened, sorted(theirs))
    for text in EXPORT.value:
        layout, _, folder = text.partition("=")
        for entry in models:
            export(layout, entry.name, Path(folder) / entry.name, out)
            print(f"Wrote {Path(folder) / entry.name}.")


def options() -> MetricOptions:
    """How metrics are computed."""
    from spo_jax.evaluation.image_metrics import MetricOptions

    size, tokenizer = METRIC_BATCH_SIZE.value, METRIC_TOKENIZER.value
    return MetricOptions(batch_size=size, hpsv2_resize=HPSV2_RESIZE.value, tokenizer=tokenizer)


def settings_of(models: list[Entry], rows: Rows, given: dict[str, list[Path]]) -> dict[str, Any]:
    """What decides the images, as it is stored with the numbers."""
    from spo_jax.evaluation.identity import sha256_of_weights
    from spo_jax.files import sha256_of

    def of(entry: Entry) -> dict[str, str]:
        if entry.folder:
            digest = hashlib.sha256("".join(map(sha256_of, given[entry.name])).encode())
            return {"images": entry.folder, "sha256": digest.hexdigest()}
        assert entry.base is not None
        named = {**entry.base._asdict(), "lora": entry.lora}
        told = {key: name for key, name in named.items() if name}
        return told | {f"{key}_sha256": sha256_of_weights(name) for key, name in told.items() if key != "variant"}

    text = json.dumps(rows.prompts, ensure_ascii=False)
    sampling = {
        flag.name: flag.value for flag in (SOLVER, STEPS, GUIDANCE_SCALE, ETA, HEIGHT, WIDTH, DTYPE, BATCH_SIZE)
    }
    return {
        "models": {entry.name: of(entry) for entry in models},
        "prompts": PROMPTS.value,
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_prompts": len(rows.prompts),
        "seeds": rows.num_seeds,
        "seed": SEED.value,
        **sampling,
        "negative_prompt": "",
        "images": "PNG, 8 bits, rounded half to even",
    }


def record(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings, or makes sure that those of before are the same; models may be added.

    Raises:
      UserError: the folder has images of other settings, or cannot be written.
    """
    from spo_jax.files import check_place, write_text

    path = out / "settings.json"
    check_place(path)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        known, now = before.pop("models"), dict(settings["models"])
        differs = [key for key in before if before[key] != settings.get(key)]
        differs += [f"models.{name}" for name in known if name in now and known[name] != now[name]]
        if differs:
            key = differs[0]
            was = before.get(key, known.get(key.removeprefix("models.")))
            raise UserError(f"--out={out} has images of other settings ({key} was {was!r}); choose another folder.")
        settings = settings | {"models": known | now}
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def make_pictures(entry: Entry, rows: Rows, given: dict[str, list[Path]], out: Path) -> None:
    """Makes the images of a model that are missing."""
    from spo_jax.evaluation.pictures import sample_pictures, take_pictures

    if entry.folder:
        take_pictures(given[entry.name], entry.name, rows, out)
        return
    sample, mesh_size = sampler_of(entry, rows)
    with tqdm(total=len(rows.places), desc=entry.name, unit="image", dynamic_ncols=True) as progress:
        for count in sample_pictures(sample, entry.name, rows, out, BATCH_SIZE.value, mesh_size):
            progress.update(count)


def sampler_of(entry: Entry, rows: Rows) -> tuple[SampleRows, int]:
    """Reads a model; its sampler, and how many devices split a batch."""
    from spo_jax.evaluation.pictures import Sampling, open_sampler

    size = (HEIGHT.value, WIDTH.value)
    sampling = Sampling(SOLVER.value, STEPS.value, GUIDANCE_SCALE.value, ETA.value, size, DTYPE.value, SEED.value)
    assert entry.base is not None
    return open_sampler(entry.base, [entry.lora] if entry.lora else [], rows, sampling)


def score_pictures(name: str, place: str | None, models: list[Entry], rows: Rows, out: Path) -> ImageMetric:
    """Scores all images by one metric, some at a time, and adds them to ``scores.csv``; what is there is kept."""
    from spo_jax.evaluation.image_metrics import open_metric
    from spo_jax.evaluation.layouts import image_path
    from spo_jax.evaluation.pictures import read_picture
    from spo_jax.evaluation.score_table import Row, append_rows, open_rows, scored
    from spo_jax.files import write_text

    metric = open_metric(name, place, options())
    kept = out / "metrics" / f"{name}.json"
    told = json.dumps(metric.settings, indent=2, ensure_ascii=False) + "\n"
    if kept.is_file() and kept.read_text(encoding="utf-8") != told:
        raise UserError(
            f"--out={out} has scores of {name} with other settings ({kept}); choose another folder, or delete the "
            f"column in scores.csv and {kept}."
        )
    write_text(kept, told)
    columns, before = open_rows(out / "scores.csv", [name])
    done = {key[:3] for key in scored(before) if key[3] == name}
    # Pieces are always the same ones, so that a score does not depend on where an interruption was.
    everything = [(entry.name, *at) for entry in models for at in rows.places]
    with tqdm(total=len(everything), desc=name, unit="image", dynamic_ncols=True) as progress:
        for start in range(0, len(everything), SCORED_AT_ONCE):
            some = everything[start : start + SCORED_AT_ONCE]
            progress.update(len(some))
            if done.issuperset(some):
                continue
            prompts = [rows.prompts[prompt] for _, prompt, _ in some]
            scores = metric.score([read_picture(image_path(out, *at)) for at in some], prompts)
            every = zip(some, prompts, scores, strict=True)
            new = [Row(*at, prompt, {name: float(score)}) for at, prompt, score in every if at not in done]
            append_rows(out / "scores.csv", columns, new)
    return metric


def take_scores(path: Path, models: list[Entry], rows: Rows, out: Path) -> list[str]:
    """Adds another program's scores of these images to ``scores.csv``; the names of its metrics.

    Raises:
      UserError: the file is no such table, or ``scores.csv`` has another score of an image under the same name.
    """
    from spo_jax.evaluation.score_table import append_rows, import_scores, open_rows, table_rows

    names = [entry.name for entry in models]
    table = import_scores(path, models=names, prompts=rows.prompts, seeds=range(rows.num_seeds))
    columns, before = open_rows(out / "scores.csv", table.metrics)
    known = {(*row[:3], name): np.float32(score) for row in before for name, score in row.scores.items()}
    new = []
    for row in table_rows(table):
        for name, score in row.scores.items():
            if (had := known.get((*row[:3], name), np.float32(score))) != np.float32(score):
                where = f"prompt {row.prompt_id}, seed {row.seed}, model {row.model}"
                raise UserError(
                    f"--scores={path} has {score} as {name} of {where}, and {out / 'scores.csv'} has {had}; give the "
                    "column another name, or choose another --out."
                )
        left = {name: score for name, score in row.scores.items() if (*row[:3], name) not in known}
        new += [row._replace(scores=left)] if left else []
    append_rows(out / "scores.csv", columns, new)
    return list(table.metrics)


def export(layout: str, model: str, folder: Path, out: Path) -> None:
    """Writes a model's images in the layout of a benchmark, see ``layouts.py``."""
    from spo_jax.data.prompt_sets import PROMPT_SETS
    from spo_jax.evaluation import layouts
    from spo_jax.formats.hub import fetched

    if layout == "hpsv2":
        layouts.export_hpsv2(out, model, folder)
    elif layout == "geneval":
        metadata = layouts.read_geneval_metadata(fetched(PROMPT_SETS["geneval"]))
        layouts.export_geneval(out, model, folder, metadata=metadata)
    else:
        layouts.export_t2i_compbench(out, model, folder)


def finish(
    out: Path,
    models: list[Entry],
    rows: Rows,
    settings: dict[str, Any],
    metrics: dict[str, ImageMetric],
    theirs: list[str],
) -> None:
    """Writes the whole table, the results and the report; ``theirs`` are metrics of other programs."""
    from spo_jax.evaluation.evaluation_report import write_reports
    from spo_jax.evaluation.results import summarise
    from spo_jax.evaluation.score_table import make_table, read_rows, write_table

    names, columns = [entry.name for entry in models], [*metrics, *theirs]
    known, made = read_rows(out / "scores.csv")
    prompts, seeds = rows.prompts, range(rows.num_seeds)
    with contextlib.suppress(UserError):  # not all models may have all metrics of earlier commands
        write_table(out / "scores.csv", make_table(made, known, prompts=prompts, seeds=seeds))
    table = make_table([row for row in made if row.model in names], columns, models=names, prompts=prompts, seeds=seeds)
    stored = settings | {"metrics": {name: metric.settings for name, metric in metrics.items()}}
    results = summarise(table, stored, metrics=metrics, roles=roles(models, metrics))
    write_reports(out, results, table)
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"Report: {out / 'report.html'}\nNumbers: {out / 'results.json'}\nScores: {out / 'scores.csv'}")


def roles(models: list[Entry], metrics: dict[str, ImageMetric]) -> dict[tuple[str, str], str]:
    """What is said beside the number of a metric that trained a model: of a --workdir, which names its scorer."""
    from spo_jax.formats.hub import local, with_strength
    from spo_jax.formats.json_files import read_json

    found = {}
    for entry in models:
        file = local(with_strength(entry.lora)[0]) / "config.json" if entry.lora else None
        if file is None or not file.is_file():
            continue
        scorer = read_json(file).get("scorer", {}).get("path", "")
        for name, metric in metrics.items():
            if scorer and str(metric.settings.get("weights", "")).partition("@")[0] == scorer.partition("@")[0]:
                found[entry.name, name] = "The model learned from this metric."
            elif name == "pickscore" and "Step-Aware_Preference_Models" in scorer:
                found[entry.name, name] = "The scorer that the model learned from began as PickScore."
    return found


if __name__ == "__main__":
    cli.run(main)
