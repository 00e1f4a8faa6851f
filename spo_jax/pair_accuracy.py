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

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Sharding
from jaxtyping import PyTree
from tqdm import tqdm

from spo_jax import cli, rng
from spo_jax.data.preferences import PairBatch, PairLoader, open_pairs, total_state
from spo_jax.data.records import Records
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import check_divisible, make_mesh, replicated
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError, notice
from spo_jax.evaluation import pair_accuracy as accuracy
from spo_jax.evaluation.pair_accuracy import AskedScorer
from spo_jax.files import check_place, saying_where, write_text
from spo_jax.formats.base import Base, read_base
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.pipeline import Pipeline, read_clip, with_image_size
from spo_jax.formats.scorers import function_scorer, load_function
from spo_jax.formats.tokenizers import cut_warning, fitted, read_tokenizer, tokenizers_of
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.sampling.noisy_pairs import make_predict_clean

SCORER = flags.DEFINE_string("scorer", None, "A preference model or a CLIP: a folder, file or org/name@commit.")
FN = flags.DEFINE_string("fn", None, "The scorer as a function, my_module:score, instead of --scorer.")
PLAIN = flags.DEFINE_string("plain", None, "A model without the time input to compare with, such as PickScore_v1.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of the scorers; the model's first one by default.")
PAIRS = flags.DEFINE_string("pairs", None, "FOLDER@SPLIT, as spo_jax.prepare has written it.")
NUM_PAIRS = flags.DEFINE_integer("num_pairs", None, "The first so many usable ones; all by default.", lower_bound=1)
MODEL = flags.DEFINE_string("model", None, "Base model: a diffusers folder, org/name@commit, or one file.")
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
NUM_WORKERS = flags.DEFINE_integer("num_workers", 2, "Processes that decode; 0: none.", lower_bound=0, upper_bound=1024)
OUT = flags.DEFINE_string("out", None, "JSON file to write the numbers to.")
cli.process_flags()


def main() -> None:
    """Checks the flags, reads the models, measures and prints."""
    if bool(SCORER.value) == bool(FN.value):
        raise UserError("Give either --scorer (for example --scorer=runs/spm/best) or --fn=my_module:score.")
    for flag, example in ((PAIRS, "data/pickapic@validation_unique"), (MODEL, "emoji:model")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}.")
    texts = TIMESTEPS.value
    if not texts or not all(text.strip().isdecimal() and len(text) < 10 for text in texts):
        raise UserError(f"--timesteps={','.join(texts)} must be numbers from 0 with commas between, such as 0,251,501.")
    timesteps = sorted({int(text) for text in texts})
    if OUT.value is not None:
        if Path(OUT.value).suffix != ".json":
            raise UserError(f"--out={OUT.value} must name a JSON file, for example --out=accuracy.json.")
        check_place(OUT.value)
    cli.start_processes()

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
    programs = accuracy.make_accuracy_programs(pipeline, predict_clean, scorers, mesh)
    made = accuracy.AccuracyMeasure(programs, pipeline, scorers, mesh)
    measured, captions, skipped = measure(made, {**pipeline.params, "scorers": params}, source, timesteps)
    if is_main_process():
        if warning := cut_warning([*tokenizers_of(pipeline), scorers[accuracy.SCORER].tokenizer], captions, "captions"):
            notice(warning)
        show(measured, skipped)


def open_scorers(pipeline: Pipeline, sharding: Sharding) -> tuple[dict[str, AskedScorer], dict[str, PyTree]]:
    """The scorers that the flags name, and their parameters."""
    tokenizer = read_tokenizer(TOKENIZER.value) if TOKENIZER.value else pipeline.tokenizer
    options = {"step_aware": None, "dtype": jnp.dtype(DTYPE.value), "sharding": sharding}
    params: dict[str, PyTree] = {}
    if FN.value:
        shapes = {"num_images": 2 * BATCH_SIZE.value, "image_size": pipeline.image_size}
        scorer, params[accuracy.SCORER] = function_scorer(FN.value, tokenizer=tokenizer, key="--fn", **shapes), {}
    else:
        clip, params[accuracy.SCORER] = read_clip(SCORER.value, **options)
        scorer = make_clip_scorer(clip)
    tokenizer = tokenizer if scorer.tower is None else fitted(tokenizer, scorer.tower)
    scorers = {accuracy.SCORER: AskedScorer(scorer, tokenizer)}
    if FN.value or clip.step_aware:  # to a plain CLIP the timestep makes no difference
        scorers[accuracy.TOLD_0] = AskedScorer(scorer, tokenizer, step_aware=False)
        params[accuracy.TOLD_0] = params[accuracy.SCORER]
    if PLAIN.value is not None:
        clip, params[accuracy.PLAIN] = read_clip(PLAIN.value, **options)
        plain = make_clip_scorer(clip)
        scorers[accuracy.PLAIN] = AskedScorer(plain, fitted(tokenizer, clip.tower), step_aware=False)
    return scorers, params


def measure(
    made: accuracy.AccuracyMeasure, params: dict[str, PyTree], source: Records, timesteps: list[int]
) -> tuple[dict[int, accuracy.PairAccuracy], list[str], dict[str, int]]:
    """Accuracy by timestep, the captions that this process has seen, and records left out by fault."""
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
        pairs = accuracy.first_pairs(loader, num_pairs)
        batches = noted(tqdm(pairs, "pairs", -(-num_pairs // BATCH_SIZE.value), **bar))
        key = rng.stream(jax.random.key(SEED.value), "accuracy")
        measured = accuracy.measure_accuracy(made, params, batches, timesteps, key)
        counts = total_state(loader.state())["counts"]
    if not measured[timesteps[0]].accuracy[accuracy.SCORER].count:
        raise UserError(f"--pairs={PAIRS.value} has no pair with a preferred picture among the first {num_pairs}.")
    return measured, list(captions), {name: count for name, count in counts.items() if count and name != "used"}


def show(measured: dict[int, accuracy.PairAccuracy], skipped: dict[str, int]) -> None:
    """Prints the table, and writes the numbers to ``--out``."""
    some = next(iter(measured.values())).accuracy
    names = [name for name in (accuracy.SCORER, accuracy.TOLD_0, accuracy.PLAIN) if name in some]
    print(accuracy.accuracy_table(measured, names))
    count, ties = int(some[accuracy.SCORER].count), int(some[accuracy.SCORER].ties)
    left_out = ({"ties": ties} if ties else {}) | skipped
    print(f"{count} pairs" + "".join(f", {name} left out: {number}" for name, number in left_out.items()) + ".")
    if OUT.value is not None:
        numbers = {
            **{flag.name: flag.value for flag in (SCORER, FN, PLAIN, PAIRS, MODEL, GUIDANCE_SCALE, SEED)},
            "num_pairs": count,
            "num_ties": ties,
            "skipped": skipped,
            "timesteps": [{"timestep": timestep, **accuracy.accuracy_row(row)} for timestep, row in measured.items()],
        }
        with saying_where(OUT.value):
            write_text(OUT.value, json.dumps(numbers, indent=2) + "\n")
        print(f"Numbers: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
