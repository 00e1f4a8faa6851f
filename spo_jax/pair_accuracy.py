"""Pairwise accuracy of a judge: how often it prefers the picture that people preferred, at several timesteps.

    python -m spo_jax.pair_accuracy --model=sd15 --pairs=data/pickapic@test_unique --scorer=FOLDER --plain=PickScore_v1
    python -m spo_jax.pair_accuracy --model=emoji:model --guidance_scale=2 --pairs=runs/data@test --scorer=runs/spm/best

Both pictures of a pair get the same noise, the base model predicts the clean ones in one guided step, and every judge
scores the same pictures: ``scorer``, the one that is measured; ``told_0``, the same one, kept from knowing the
timestep; and with --plain ``plain``, another one that is told t = 0 as well. A gain is the accuracy of ``scorer`` less
that of another judge on the same pairs. In brackets are 95 % intervals.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError
from spo_jax.files import check_place, saying_where, write_text

SCORER = flags.DEFINE_string(
    "scorer", None, "The judge: a preference model or a CLIP; a folder, file or org/name@commit."
)
FN = flags.DEFINE_string("fn", None, "The judge as a function, my_module:score, instead of --scorer.")
PLAIN = flags.DEFINE_string("plain", None, "A model without the time input to compare with, such as PickScore_v1.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of the judges; the model's first one by default.")
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
    """Checks the flags, reads the models and measures."""
    if bool(SCORER.value) == bool(FN.value):
        raise UserError("Give either --scorer (for example --scorer=runs/spm/best) or --fn=my_module:score.")
    for flag, example in ((PAIRS, "data/pickapic@validation_unique"), (MODEL, "emoji:model")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; for example --{flag.name}={example}.")
    timesteps = parse_timesteps(TIMESTEPS.value)
    out = None if OUT.value is None else check_out(Path(OUT.value))
    cli.start_processes()

    import jax
    import jax.numpy as jnp
    from tqdm import tqdm

    from spo_jax import rng
    from spo_jax.data.preferences import PairBatch, PairLoader, open_pairs, total_state
    from spo_jax.diffusion.schedule import make_schedule
    from spo_jax.distributed.mesh import check_divisible, make_mesh, replicated
    from spo_jax.distributed.processes import is_main_process
    from spo_jax.evaluation import pair_accuracy
    from spo_jax.evaluation.pair_accuracy import Judge, accuracy_row, accuracy_table, first_pairs, make_measure_accuracy
    from spo_jax.formats.base import Base, read_base
    from spo_jax.formats.hub import resolve_model
    from spo_jax.formats.pipeline import with_image_size
    from spo_jax.formats.scorers import check_function, fitted_to, load_function, make_scorer, tokenizer_of
    from spo_jax.formats.tokenizers import cut_warning, tokenizers_of
    from spo_jax.sampling.noisy_pairs import make_predict_clean

    if FN.value:
        load_function(FN.value, "--fn")
    mesh = make_mesh(data=-1, fsdp=1)
    check_divisible("--batch_size", BATCH_SIZE.value, mesh)
    source = open_pairs(PAIRS.value)
    for path in (SCORER.value, PLAIN.value):
        if path:
            resolve_model(path, weights=False)  # a wrong name should not wait for the base model
    dtype, sharding = jnp.dtype(DTYPE.value), replicated(mesh)
    base = Base(MODEL.value, VARIANT.value or "", UNET.value or "", VAE.value or "")
    pipeline = read_base(base, dtype, sharding=sharding)
    pipeline = with_image_size(pipeline, HEIGHT.value, WIDTH.value)
    schedule = make_schedule(pipeline.scheduler_config, num_steps=1)
    if max(timesteps) >= len(schedule.alphas_cumprod):
        raise UserError(f"--timesteps={max(timesteps)} is beyond the model's last, {len(schedule.alphas_cumprod) - 1}.")
    tokenizer = tokenizer_of(TOKENIZER.value or "", pipeline)
    fn, options = FN.value or "", {"dtype": dtype, "sharding": sharding}
    shape = {"num_images": 2 * BATCH_SIZE.value, "image_size": pipeline.image_size, "tokenizer": tokenizer}
    check_function(fn, key="--fn", **shape)
    scorer, scorer_params = make_scorer(SCORER.value or "", fn, key="--fn", **options)
    tokenizer = fitted_to(scorer, tokenizer)
    judges, params = {pair_accuracy.SCORER: Judge(scorer, tokenizer)}, {pair_accuracy.SCORER: scorer_params}
    if fn or "t_embedder" in scorer_params:  # to a plain CLIP the timestep makes no difference
        judges[pair_accuracy.TOLD_0], params[pair_accuracy.TOLD_0] = (
            Judge(scorer, tokenizer, step_aware=False),
            scorer_params,
        )
    if PLAIN.value is not None:
        plain, params[pair_accuracy.PLAIN] = make_scorer(PLAIN.value, **options)
        judges[pair_accuracy.PLAIN] = Judge(plain, fitted_to(plain, tokenizer), step_aware=False)

    predict_clean = make_predict_clean(pipeline, schedule, GUIDANCE_SCALE.value)
    measure = make_measure_accuracy(pipeline, predict_clean, judges, mesh)
    num_pairs = min(NUM_PAIRS.value or len(source), len(source))
    once = {"seed": 0, "shuffle": False, "num_epochs": 1, "num_workers": NUM_WORKERS.value}
    once |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    local_size = BATCH_SIZE.value // jax.process_count()
    with contextlib.closing(PairLoader(source, batch_size=local_size, size=pipeline.image_size, **once)) as loader:
        bar = {"unit": "batch", "dynamic_ncols": True, "disable": not is_main_process()}
        num_batches = -(-num_pairs // BATCH_SIZE.value)
        captions: dict[str, None] = {}  # of this process, in order

        def noted(batches: Iterable[PairBatch]) -> Iterator[PairBatch]:
            for batch in batches:
                captions.update(dict.fromkeys(caption for caption in batch.captions if caption))
                yield batch

        batches = noted(tqdm(first_pairs(loader, num_pairs), "pairs", num_batches, **bar))
        key = rng.stream(jax.random.key(SEED.value), "accuracy")
        measured = measure({**pipeline.params, "judges": params}, batches, timesteps, key)
        counts = total_state(loader.state())["counts"]
        skipped = {name: count for name, count in counts.items() if count and name != "used"}

    some = measured[timesteps[0]].accuracy[pair_accuracy.SCORER]
    if not some.count:
        raise UserError(f"--pairs={PAIRS.value} has no pair with a preferred picture among the first {num_pairs}.")
    if not is_main_process():
        return
    if warning := cut_warning([*tokenizers_of(pipeline), tokenizer], list(captions), "captions"):
        print(f"spo_jax: {warning}", file=sys.stderr)
    print(accuracy_table(measured, list(judges)))
    left_out = {"ties": int(some.ties)} if some.ties else {}
    said = "".join(f", {name} left out: {count}" for name, count in (left_out | skipped).items())
    print(f"{some.count:.0f} pairs{said}.")
    if out is not None:
        numbers = {
            **{flag.name: flag.value for flag in (SCORER, FN, PLAIN, PAIRS, MODEL, GUIDANCE_SCALE, SEED)},
            "num_pairs": int(some.count),
            "num_ties": int(some.ties),
            "skipped": skipped,
            "timesteps": [{"timestep": timestep, **accuracy_row(measured[timestep])} for timestep in timesteps],
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
