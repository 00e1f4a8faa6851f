"""Pairwise accuracy of a scorer: how often it prefers the image that people preferred, at several timesteps.

    python -m spo_jax.pair_accuracy --model=sd15 --pairs=data/pickapic@test_unique --scorer=FOLDER --plain=PickScore_v1
    python -m spo_jax.pair_accuracy --model=emoji:model --guidance_scale=2 --pairs=runs/data@test --scorer=runs/spm/best

Both images of a pair get the same noise, the base model predicts the clean ones in one guided step, and every scorer
sees the same images: ``scorer``, the one that is measured; ``told_0``, the same one, kept from knowing the
timestep; and with --plain ``plain``, another one that is told t = 0 as well. A gain is the accuracy of ``scorer`` less
that of another scorer on the same pairs. In brackets are 95 % intervals.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError, notice
from spo_jax.files import check_place, saying_where, write_text

if TYPE_CHECKING:
    from jax.sharding import Sharding
    from jaxtyping import PyTree

    from spo_jax.data.records import Records
    from spo_jax.evaluation.pair_accuracy import AccuracyMeasure, AskedScorer, PairAccuracy
    from spo_jax.formats.pipeline import Pipeline

SCORER = flags.DEFINE_string(
    "scorer", None, "The scorer: a preference model or a CLIP; a folder, file or org/name@commit."
)
FN = flags.DEFINE_string("fn", None, "The scorer as a function, my_module:score, instead of --scorer.")
PLAIN = flags.DEFINE_string("plain", None, "A model without the time input to compare with, such as PickScore_v1.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of the scorers; the model's first one by default.")
PAIRS = flags.DEFINE_string("pairs", None, "FOLDER@SPLIT, as spo_jax.prepare has written it.")
NUM_PAIRS = flags.DEFINE_integer(
    "num_pairs", None, "The first so many that can be used; all by default.", lower_bound=1
)
MODEL = flags.DEFINE_string(
    "model", None, "Base model: a diffusers pipeline folder, org/name@commit on the hub, or one file."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the base model's weight files, such as fp16.")
UNET = flags.DEFINE_string("unet", None, "UNet to use instead of the model's: a folder, or org/name@commit.")
VAE = flags.DEFINE_string("vae", None, "Autoencoder to use instead of the model's: a folder, or org/name@commit.")
HEIGHT = cli.side_flag("height")
WIDTH = cli.side_flag("width")
TIMESTEPS = flags.DEFINE_list("timesteps", ["0", "251", "501", "701", "951"], "Where to measure.")
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", 5.0, "Of the base model's one-step prediction (emoji: 2).", lower_bound=0.0, upper_bound=1000.0
)
SEED = cli.seed_flag("Seed of the noise.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Pairs at a time, over all devices together.", lower_bound=1, upper_bound=2**16
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the networks.")
NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 2, "Processes that decode pictures; 0: none.", lower_bound=0, upper_bound=1024
)
OUT = flags.DEFINE_string("out", None, "JSON file to write the numbers to.")
cli.process_flags()


def main() -> None:
    """Checks the flags, reads the models, measures and prints."""
    if bool(SCORER.value) == bool(FN.value):
        raise UserError("Give either --scorer (for example --scorer=runs/spm/best) or --fn=my_module:score.")
    for flag, example in ((PAIRS, "data/pickapic@validation_unique"), (MODEL, "emoji:model")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}.")
    timesteps = parse_timesteps(TIMESTEPS.value)
    out = None if OUT.value is None else check_out(Path(OUT.value))
    cli.start_processes()

    import jax.numpy as jnp

    from spo_jax.data.preferences import open_pairs
    from spo_jax.diffusion.schedule import make_schedule
    from spo_jax.distributed.mesh import check_divisible, make_mesh, replicated
    from spo_jax.evaluation.pair_accuracy import AccuracyMeasure, make_accuracy_programs
    from spo_jax.formats.base import Base, read_base
    from spo_jax.formats.hub import resolve_model
    from spo_jax.formats.pipeline import with_image_size
    from spo_jax.formats.scorers import load_function
    from spo_jax.sampling.noisy_pairs import make_predict_clean

    if FN.value:
        load_function(FN.value, "--fn")
    mesh = make_mesh(data=-1, fsdp=1)
    check_divisible("--batch_size", BATCH_SIZE.value, mesh)
    source = open_pairs(PAIRS.value)
    for path in (SCORER.value, PLAIN.value):
        if path:
            resolve_model(path, weights=False)  # a wrong name should not wait for the base model
    base = Base(MODEL.value, VARIANT.value or "", UNET.value or "", VAE.value or "")
    pipeline = read_base(base, jnp.dtype(DTYPE.value), sharding=replicated(mesh))
    pipeline = with_image_size(pipeline, HEIGHT.value, WIDTH.value)
    process = make_schedule(pipeline.scheduler_config, num_steps=1)
    if max(timesteps) >= process.num_train_timesteps:
        last = process.num_train_timesteps - 1
        raise UserError(f"--timesteps={max(timesteps)} is beyond the model's last, {last}.")
    scorers, params = open_scorers(pipeline, replicated(mesh))
    predict_clean = make_predict_clean(pipeline, process, GUIDANCE_SCALE.value)
    programs = make_accuracy_programs(pipeline, predict_clean, scorers, mesh)
    measured, captions, skipped = measure(
        AccuracyMeasure(programs, pipeline, scorers, mesh), {**pipeline.params, "scorers": params}, source, timesteps
    )
    show(measured, scorers, pipeline, captions, skipped, out)


def open_scorers(pipeline: Pipeline, sharding: Sharding) -> tuple[dict[str, AskedScorer], dict[str, PyTree]]:
    """The scorers that the flags name, and their parameters."""
    import jax.numpy as jnp

    from spo_jax.evaluation.pair_accuracy import PLAIN as PLAIN_NAME
    from spo_jax.evaluation.pair_accuracy import SCORER as SCORER_NAME
    from spo_jax.evaluation.pair_accuracy import TOLD_0, AskedScorer
    from spo_jax.formats.pipeline import read_clip
    from spo_jax.formats.scorers import function_scorer
    from spo_jax.formats.tokenizers import fitted, read_tokenizer
    from spo_jax.preference.scorers import make_clip_scorer

    tokenizer = read_tokenizer(TOKENIZER.value) if TOKENIZER.value else pipeline.tokenizer
    options = {"step_aware": None, "dtype": jnp.dtype(DTYPE.value), "sharding": sharding}
    params: dict[str, PyTree] = {}
    if FN.value:
        shapes = {"num_images": 2 * BATCH_SIZE.value, "image_size": pipeline.image_size}
        scorer, params[SCORER_NAME] = function_scorer(FN.value, tokenizer=tokenizer, key="--fn", **shapes), {}
    else:
        clip, params[SCORER_NAME] = read_clip(SCORER.value, **options)
        scorer = make_clip_scorer(clip)
    tokenizer = tokenizer if scorer.tower is None else fitted(tokenizer, scorer.tower)
    scorers = {SCORER_NAME: AskedScorer(scorer, tokenizer)}
    if FN.value or clip.step_aware:  # to a plain CLIP the timestep makes no difference
        scorers[TOLD_0] = AskedScorer(scorer, tokenizer, step_aware=False)
        params[TOLD_0] = params[SCORER_NAME]
    if PLAIN.value is not None:
        clip, params[PLAIN_NAME] = read_clip(PLAIN.value, **options)
        plain = make_clip_scorer(clip)
        scorers[PLAIN_NAME] = AskedScorer(plain, fitted(tokenizer, clip.tower), step_aware=False)
    return scorers, params


def measure(
    made: AccuracyMeasure, params: dict[str, PyTree], source: Records, timesteps: list[int]
) -> tuple[dict[int, PairAccuracy], list[str], dict[str, int]]:
    """Accuracy by timestep, the captions that this process has seen, and records left out by fault."""
    import jax
    from tqdm import tqdm

    from spo_jax import rng
    from spo_jax.data.preferences import PairBatch, PairLoader, total_state
    from spo_jax.distributed.processes import is_main_process
    from spo_jax.evaluation.pair_accuracy import SCORER as SCORER_NAME
    from spo_jax.evaluation.pair_accuracy import first_pairs, measure_accuracy

    num_pairs = min(NUM_PAIRS.value or len(source), len(source))
    loader = PairLoader(
        source,
        batch_size=BATCH_SIZE.value // jax.process_count(),
        size=made.pipeline.image_size,
        seed=0,
        shuffle=False,
        num_epochs=1,
        num_workers=NUM_WORKERS.value,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    captions: dict[str, None] = {}  # in order

    def noted(batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
        for batch in batches:
            captions.update(dict.fromkeys(caption for caption in batch.captions if caption))
            yield batch

    with contextlib.closing(loader):
        bar = {"unit": "batch", "dynamic_ncols": True, "disable": not is_main_process()}
        batches = noted(tqdm(first_pairs(loader, num_pairs), "pairs", -(-num_pairs // BATCH_SIZE.value), **bar))
        key = rng.stream(jax.random.key(SEED.value), "accuracy")
        measured = measure_accuracy(made, params, batches, timesteps, key)
        counts = total_state(loader.state())["counts"]
    if not measured[timesteps[0]].accuracy[SCORER_NAME].count:
        raise UserError(f"--pairs={PAIRS.value} has no pair with a preferred picture among the first {num_pairs}.")
    return measured, list(captions), {name: count for name, count in counts.items() if count and name != "used"}


def show(
    measured: dict[int, PairAccuracy],
    scorers: dict[str, AskedScorer],
    pipeline: Pipeline,
    captions: list[str],
    skipped: dict[str, int],
    out: Path | None,
) -> None:
    """Prints the table, and writes the numbers to ``out``; in the first process."""
    from spo_jax.distributed.processes import is_main_process
    from spo_jax.evaluation.pair_accuracy import SCORER as SCORER_NAME
    from spo_jax.evaluation.pair_accuracy import accuracy_row, accuracy_table
    from spo_jax.formats.tokenizers import cut_warning, tokenizers_of

    if not is_main_process():
        return
    if warning := cut_warning([*tokenizers_of(pipeline), scorers[SCORER_NAME].tokenizer], captions, "captions"):
        notice(warning)
    print(accuracy_table(measured, list(scorers)))
    some = next(iter(measured.values())).accuracy[SCORER_NAME]
    left_out = {"ties": int(some.ties)} if some.ties else {}
    said = "".join(f", {name} left out: {count}" for name, count in (left_out | skipped).items())
    print(f"{some.count:.0f} pairs{said}.")
    if out is not None:
        numbers = {
            **{flag.name: flag.value for flag in (SCORER, FN, PLAIN, PAIRS, MODEL, GUIDANCE_SCALE, SEED)},
            "num_pairs": int(some.count),
            "num_ties": int(some.ties),
            "skipped": skipped,
            "timesteps": [{"timestep": timestep, **accuracy_row(row)} for timestep, row in measured.items()],
        }
        with saying_where(out):
            write_text(out, json.dumps(numbers, indent=2) + "\n")
        print(f"Numbers: {out}")


def parse_timesteps(texts: list[str]) -> list[int]:
    """Timesteps in ascending order, each once; UserError if one is no number from 0."""
    if not texts or not all(text.strip().isdecimal() and len(text) < 10 for text in texts):
        raise UserError(f"--timesteps={','.join(texts)} must be numbers from 0 with commas between, such as 0,251,501.")
    return sorted({int(text) for text in texts})


def check_out(out: Path) -> Path:
    """The file to write; its folder is made. UserError if it is no .json file or cannot be there."""
    if out.suffix != ".json":
        raise UserError(f"--out={out} must name a JSON file, for example --out=accuracy.json.")
    check_place(out)
    return out


if __name__ == "__main__":
    cli.run(main)
