"""The step on given pairs: where it starts, what a pair adds to it, which options change what, and many devices."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import dpo_tiny
from spo_jax import rng
from spo_jax.data.builder import write_split
from spo_jax.data.placed_pairs import Tokenizers, rows_of
from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, make_mesh, replicated
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.dpo import config as dpo_config
from spo_jax.dpo.steps import PATIENCE, not_moving, runs_away, undecided
from spo_jax.dpo.update import ERRORS, PairView, dpo_metrics, make_dpo_update, see_pairs
from spo_jax.errors import UserError
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.pipeline import read_pipeline
from spo_jax.formats.tokenizers import tokenize_prompts
from spo_jax.models import UNet2DConditionModel
from spo_jax.models.lora import TARGETS, init_lora
from spo_jax.preference.losses import LossOptions
from spo_jax.preference.offline import OFFLINE
from spo_jax.runs.assembly import SAME_ROUNDING
from spo_jax.runs.metrics import METRICS_FILE, REWARDS, MetricsWriter, read_metrics
from spo_jax.runs.optimizer import warmup_constant
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import make_add_noise
from spo_jax.types import AddedConditions, LabelledPairs, PromptBatch
from tests.lora_files import random_adapters
from tests.preference_data import record
from tests.small_pipeline import small_pipeline

PAIRS = 8
CAPTIONS = [f"a {thing} on {color}" for thing in ("fox", "lemon") for color in ("red", "teal", "pink", "gray")]
KEY = jax.random.key(1)
UNET = dict(
    sample_size=8,
    block_out_channels=[16],
    down_block_types=["CrossAttnDownBlock2D"],
    up_block_types=["UpBlock2D"],
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
)
QUICK = {"xla_backend_optimization_level": 0}  # where no two numbers have to be the same bit for bit
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
GRADIENT = Optimizer(optax.trace(0.0))  # its state is the gradient of the last update


@pytest.fixture(scope="module")
def pipeline():
    """That of the emoji models with a UNet of four attention and four residual layers, of random weights."""
    made = read_pipeline(small_pipeline())
    unet = UNet2DConditionModel.from_config(UNET | {"cross_attention_dim": made.unet.cross_attention_dim})
    generator = np.random.default_rng(0)

    def draw(path, x):
        value = generator.standard_normal(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:-1]))
        return jnp.asarray({"kernel": value, "bias": 0.1 * value, "scale": 1 + 0.1 * value}[path[-1].key])

    params = jax.tree_util.tree_map_with_path(draw, network_shapes(unet))
    return dataclasses.replace(made, unet=unet, params=made.params | {"unet": params})


def some_pairs(pipeline, **changes):
    """Eight pairs of smooth random images, without a tie."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PAIRS, 2, 8, 8, 3), np.uint8)
    better = generator.permutation([0, 1] * 4)
    fields = {
        "images": coarse.repeat(4, axis=2).repeat(4, axis=3),
        "tokens": tokenize_prompts(pipeline, CAPTIONS),
        "crops": generator.integers(1, 90, (PAIRS, 2, 4), np.int32),
        "scorer_tokens": None,
        "labeller_tokens": None,
        "labels": np.stack([1 - better, better], axis=1).astype(np.float32),
        "weights": np.ones(PAIRS, np.float32),
        "positions": np.arange(PAIRS, dtype=np.uint32) + 5,
    }
    return LabelledPairs(**fields | changes)


def only(*rows):
    """Weights of these rows alone."""
    return np.isin(np.arange(PAIRS), rows).astype(np.float32)


def view_of(pipeline):
    process = make_schedule(pipeline.scheduler_config, 10)
    return PairView(
        encode=make_encode_captions(pipeline),
        add_noise=make_add_noise(pipeline, process),
        predict=make_guided_prediction(pipeline.unet.apply, 1.0),
        process=process,
        empty_tokens=tokenize_prompts(pipeline, [""]),
    )


def quick_view(unet, pipeline):
    """A view that is compiled sooner: an autoencoder that only scales, and a table of words for a text encoder."""

    def encode(params, tokens):
        embeddings = params["table"][tokens[0]]
        return PromptBatch(embeddings, embeddings[:1], None)

    def add_noise(_params, images, timesteps, keys):
        clean = images[:, :, ::4, ::4].astype(jnp.float32) / 64.0 - 2.0
        clean = jnp.concatenate([clean, clean[..., :1]], axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "noise"), clean.shape[2:]))(keys)
        return jax.vmap(view.process.add_noise)(clean, noise[:, None], timesteps), noise

    view = view_of(pipeline)
    return view._replace(encode=encode, add_noise=add_noise, predict=make_guided_prediction(unet.apply, 1.0))


def quick_params(pipeline, dtype=jnp.float32):
    """What ``quick_view`` reads, in a dtype."""
    generator = np.random.default_rng(2)
    table = generator.standard_normal((pipeline.text_encoder.config["vocab_size"], pipeline.unet.cross_attention_dim))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {"unet": pipeline.params["unet"], "table": table})


def moved(pipeline):
    """Adapters that do something."""
    lora = random_adapters({"unet": pipeline.params["unet"]}, only=lambda _, path: path[-1] in TARGETS)
    return {"lora": jax.tree.map(jnp.asarray, lora["unet"])}


@pytest.fixture(scope="module")
def update(pipeline):
    """``(trained, pairs, empty_prompts) -> (metrics, gradient)``, of adapters in float32; one program for all."""
    view, objective, options = view_of(pipeline), OFFLINE["dpo"], LossOptions(beta=200.0)

    @functools.partial(jax.jit, compiler_options=SAME_ROUNDING)
    def program(empty_prompts, *arguments):
        return make_dpo_update(view._replace(empty_prompts=empty_prompts), objective, options, GRADIENT)(*arguments)

    def run(trained, pairs, empty_prompts=0.0):
        state = TrainState.create(trained, GRADIENT)
        state, metrics = program(jnp.float32(empty_prompts), state, pipeline.params, pairs, KEY)
        return dpo_metrics([metrics], guard=False), state.opt_state.trace

    return run


def close(found, expected):
    """Rows of metrics within 1e-5, gradients within 1e-5 of their largest entry."""
    (row, gradient), (expected_row, expected_gradient) = found, expected
    assert row.keys() == expected_row.keys()
    for name in row:
        np.testing.assert_allclose(row[name], expected_row[name], rtol=1e-5, atol=1e-5 * 100, err_msg=name)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected_gradient))
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=0, atol=1e-4 * largest)


# --------------------------------------------------------------------------------------------------------- the start
def is_the_start(row):
    # Bit for bit, where XLA compiles policy and reference alike, as it does here; it is not bound to.
    assert row["loss"] == np.log(np.float32(2))
    assert row["rewards/accuracy"] == 0.5 and row["rewards/margin"] == row["rewards/chosen"] == 0.0
    assert row["error/chosen"] == row["error/chosen_reference"] > 0.1
    assert row["num_pairs"] == PAIRS and row["grad_norm"] > 0


def test_fresh_adapters_start_at_log_2(pipeline, update):
    fresh = {"lora": init_lora(jax.random.key(0), pipeline.params["unet"], 3)}
    is_the_start(update(fresh, some_pairs(pipeline))[0])


@pytest.mark.parametrize(
    ("trained", "dtype"),
    [("given adapters", "bfloat16"), ("all weights", "float32"), ("all weights", "bfloat16")],
)
def test_every_run_starts_at_log_2(pipeline, trained, dtype):
    """With the strength of the published recipe, which shows any difference of policy and reference 2,500 times."""
    unet, frozen = pipeline.unet.clone(dtype=DTYPES[dtype]), quick_params(pipeline, DTYPES[dtype])
    if trained == "all weights":
        whole = {"params": jax.tree.map(lambda x: jnp.array(x, jnp.float32), frozen["unet"])}
        state = TrainState.create(whole, GRADIENT)
    else:
        state = TrainState.create(moved(pipeline), GRADIENT, starts_as_reference=True)
    objective = OFFLINE["dpo"]
    update = make_dpo_update(quick_view(unet, pipeline), objective, LossOptions(beta=objective.beta), GRADIENT)
    _, metrics = jax.jit(update, compiler_options=SAME_ROUNDING)(state, frozen, some_pairs(pipeline), KEY)
    is_the_start(dpo_metrics([metrics], guard=False))


# ------------------------------------------------------------------------------------------------- what a pair adds
def test_a_pair_adds_the_same_in_any_batch(pipeline, update):
    """Alone, among others and in another order; the gradient of a batch is the mean of those of its pairs."""
    pairs, trained = some_pairs(pipeline), moved(pipeline)
    order = np.random.default_rng(1).permutation(PAIRS)
    shuffled = jax.tree.map(lambda x: x[order], pairs)
    whole = update(trained, pairs)
    close(update(trained, shuffled), whole)
    alone = [update(trained, pairs.replace(weights=only(i))) for i in range(PAIRS)]
    for place in (0, 3):
        close(update(trained, shuffled.replace(weights=only(place))), alone[order[place]])
    assert np.std([row["loss"] for row, _ in alone]) > 0.01, "pairs should differ"
    assert {row["num_pairs"] for row, _ in alone} == {1}
    for name in ("loss", *ERRORS, *REWARDS):
        np.testing.assert_allclose(whole[0][name], np.mean([row[name] for row, _ in alone]), rtol=1e-4, atol=1e-4)
    mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *(gradient for _, gradient in alone))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(mean))
    chex.assert_trees_all_close(whole[1], mean, rtol=0, atol=1e-4 * largest)


def test_another_place_in_the_stream_is_another_noise(pipeline, update):
    pairs, trained = some_pairs(pipeline), moved(pipeline)
    row, _ = update(trained, pairs)
    other, _ = update(trained, pairs.replace(positions=pairs.positions + 100))
    assert abs(row["error/chosen"] - other["error/chosen"]) > 1e-2


def test_which_of_the_two_images_comes_first_does_not_matter(pipeline, update):
    pairs, trained = some_pairs(pipeline), moved(pipeline)
    swapped = pairs.replace(**{name: getattr(pairs, name)[:, ::-1] for name in ("images", "crops", "labels")})
    (row, gradient), (other, other_gradient) = update(trained, pairs), update(trained, swapped)
    assert row == other, "the same numbers, bit for bit"
    chex.assert_trees_all_equal(gradient, other_gradient)
    against, _ = update(trained, pairs.replace(labels=pairs.labels[:, ::-1]))
    np.testing.assert_allclose(against["rewards/accuracy"], 1 - row["rewards/accuracy"])
    assert against["loss"] != row["loss"]


def test_rows_of_weight_0_have_no_part_in_loss_and_gradient(pipeline, update):
    pairs, trained = some_pairs(pipeline), moved(pipeline)
    some = pairs.replace(weights=only(1, 4, 6))
    filled = jax.tree.map(np.copy, some)
    for rows in (filled.images, filled.labels, filled.crops, filled.positions, *filled.tokens):
        rows[some.weights == 0] = rows.max()
    found, expected = update(trained, filled), update(trained, some)
    assert found[0] == expected[0] and found[0]["num_pairs"] == 3
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-6, atol=0)
    heavier = update(trained, some.replace(weights=some.weights / 7))
    assert heavier[0] == found[0], "no pair counts more than another"
    nothing, gradient = update(trained, pairs.replace(weights=only()))
    assert nothing.pop("num_pairs") == 0 and set(nothing.values()) == {0.0}
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_ties_are_left_out_or_have_the_first_image_as_the_better_one(pipeline, update, tmp_path):
    write_split(tmp_path / "pairs", "train", [record(i) for i in range(PAIRS)])  # every third one is a tie
    trained, rows = moved(pipeline), {}
    for drop in (True, False):
        options = {"batch_size": PAIRS, "size": pipeline.image_size, "seed": 0, "num_workers": 0, "shuffle": False}
        loader = PairLoader(open_pairs(f"{tmp_path / 'pairs'}@train"), drop_ties=drop, **options)
        pairs = rows_of(Tokenizers(pipeline), next(loader))
        rows[drop], _ = update(trained, pairs)
    assert (rows[True]["num_pairs"], rows[False]["num_pairs"]) == (PAIRS - 2, PAIRS)
    tied = pairs.labels[:, 0] == pairs.labels[:, 1]
    as_win = pairs.replace(labels=np.where(tied[:, None], np.float32([1, 0]), pairs.labels))
    assert update(trained, as_win)[0] == rows[False]
    without, _ = update(trained, pairs.replace(weights=np.where(tied, 0, 1).astype(np.float32)))
    np.testing.assert_allclose(without["loss"], rows[True]["loss"], rtol=1e-6)


def test_the_caption_is_replaced_for_both_images_as_often_as_is_asked_for(pipeline, update):
    """Policy and reference read the caption of both images, so no number may move once all captions are replaced."""
    pairs, trained = some_pairs(pipeline), moved(pipeline)
    other = pairs.replace(tokens=tokenize_prompts(pipeline, CAPTIONS[::-1]))
    blank = pairs.replace(tokens=tokenize_prompts(pipeline, [""] * PAIRS))
    assert update(trained, pairs, 1.0)[0] == update(trained, other, 1.0)[0] == update(trained, blank, 0.0)[0]
    said, otherwise = update(trained, pairs, 0.0)[0], update(trained, other, 0.0)[0]
    assert all(abs(said[name] - otherwise[name]) > 1e-4 for name in ERRORS)
    # In between some pairs are as with the one and the others as with the other.
    kinds = []
    for i in range(PAIRS):
        half, zero, one = (
            update(trained, pairs.replace(weights=only(i)), share)[0]["error/chosen"] for share in (0.5, 0.0, 1.0)
        )
        kinds.append("empty" if half == one else "caption")
        assert half in (zero, one) and zero != one
    assert set(kinds) == {"empty", "caption"}


# --------------------------------------------------------------------------------------------------- what SDXL is told
@pytest.mark.parametrize("xl", [True, False])
def test_the_size_that_sdxl_is_told_is_each_images_own_and_nothing_else_changes(pipeline, xl):
    def encode(_params, tokens):
        rows = jnp.ones((len(tokens[0]), 3, 4))
        time_ids = jnp.tile(jnp.array([32.0, 32, 0, 0, 32, 32]), (len(rows), 1))
        return PromptBatch(rows, rows[:1], None, AddedConditions(rows[:, 0], time_ids) if xl else None)

    view = quick_view(pipeline.unet, pipeline)._replace(encode=encode)
    pairs, keys = some_pairs(pipeline), jax.random.split(KEY, PAIRS)
    fixed, true = (see_pairs(view._replace(true_size=own), {}, pairs, jnp.arange(PAIRS), keys) for own in (False, True))
    if xl:
        assert fixed.prompts.added.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 2 * PAIRS
        better = pairs.labels.argmax(axis=1)
        for i, win in enumerate(better):
            expected = [[*pairs.crops[i, j], 32, 32] for j in (win, 1 - win)]
            assert true.prompts.added.time_ids[2 * i : 2 * i + 2].tolist() == np.float32(expected).tolist()
        added = true.prompts.added.replace(time_ids=fixed.prompts.added.time_ids)
        true = true.replace(prompts=true.prompts.replace(added=added))
    chex.assert_trees_all_equal(true, fixed)


# ------------------------------------------------------------------------------------------------- schedule, devices
def test_the_learning_rate_of_the_published_run():
    """2.048e-5 after 500 steps, the first of which does nothing."""
    train = dpo_config.get_config().train
    rate = warmup_constant(train.learning_rate, train.warmup_steps)
    expected = [0, 4.096e-8, 1.024e-5, 2.048e-5, 2.048e-5]
    np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 250, 500, 501)], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", ["adapters", pytest.param("all weights", marks=pytest.mark.slow)])
def test_eight_devices_that_split_what_is_trained_and_what_is_not_give_the_numbers_of_one(pipeline, trained):
    """From where policy and reference differ."""
    view, frozen = quick_view(pipeline.unet, pipeline), quick_params(pipeline)
    start = moved(pipeline) if trained == "adapters" else {"params": jax.tree.map(lambda x: 1.02 * x, frozen["unet"])}
    update = make_dpo_update(view, OFFLINE["dpo"], LossOptions(beta=20.0), GRADIENT)
    found = []
    for mesh in (make_mesh(1, 1, jax.devices()[:1]), make_mesh(1, 8)):
        state = TrainState.create(start, GRADIENT)
        placed = weight_shardings(mesh, state)
        program = jit_on(mesh, update, out_shardings=(placed, replicated(mesh)), compiler_options=QUICK)
        base = jax.device_put(frozen, {"unet": weight_shardings(mesh, frozen["unet"]), "table": replicated(mesh)})
        pairs = jax.device_put(some_pairs(pipeline), batch_sharding(mesh))
        state, metrics = program(jax.device_put(state, placed), base, pairs, jax.device_put(KEY, replicated(mesh)))
        found.append((dpo_metrics([metrics], guard=False), jax.device_get(state.opt_state.trace), state))
    (row, gradient, _), (split_row, split_gradient, state) = found
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
    split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.trained)]
    assert all(split) if trained == "adapters" else sum(split) > len(split) / 4  # biases and norms are too small
    for name, value in row.items():
        np.testing.assert_allclose(split_row[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(split_gradient, gradient, rtol=0, atol=1e-5 * largest)
    assert row["rewards/margin"] != 0


# -------------------------------------------------------------------------------------------------------------- resume
def test_a_row_that_is_there_already_is_not_written_again(tmp_path):
    """SIGTERM saved step 4 before its row; the next run wrote the row and was killed before another checkpoint."""
    for last in (5, 6):
        with MetricsWriter(tmp_path, resume_step=4 if last == 6 else 0) as writer:
            for step in range(1 if last == 5 else 4, last + 1):
                writer.write(step, {"loss": float(step)})
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------------------------ warnings
def rows_of_a_run(count, **changes):
    """Rows of a healthy run, with these values instead."""
    row = {
        "loss": 0.67,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.2,
        "rewards/margin": 0.3,
        "rewards/accuracy": 0.6,
        **{"error/chosen": 0.1, "error/chosen_reference": 0.1002},
        **{"error/rejected": 0.11, "error/rejected_reference": 0.1},
    }
    return [row | changes] * count


def said(rows, config, first=30):
    """All that a run is told whose rows are these, from step ``first`` on, one every ten steps."""
    rows = [row | {"step": first + 10 * i} for i, row in enumerate(rows)]
    found = []
    for count in range(1, len(rows) + 1):
        some = rows[:count]
        found += [runs_away(some), undecided(some, config), not_moving(some, config)]
    return [sentence for sentence in found if sentence]


AWAY = {"error/rejected": 0.2, "error/chosen": 0.12}


@pytest.mark.parametrize(
    "changes, words",
    [
        (AWAY, ["worse images", "config.loss.guard"]),
        ({"rewards/accuracy": 0.5}, ["rewards/accuracy", "one half"]),
        ({"loss": 0.6931}, ["log 2", "config.train.learning_rate"]),
    ],
)
def test_each_failure_is_told_once_and_in_one_sentence(changes, words):
    config = dpo_tiny.get_config()
    healthy, failing = rows_of_a_run(8), rows_of_a_run(40, **changes)
    (sentence,) = said(failing, config)
    assert sentence.startswith("warning: ") and len(sentence.splitlines()) == 1
    assert all(word in sentence for word in words)
    assert said(healthy, config) == said(failing[: PATIENCE - 1], config) == []
    # A run that recovers and fails again is told again.
    assert said(failing[:10] + healthy + failing[:10], config) == [sentence] * 2
    assert said((failing[: PATIENCE - 1] + healthy[:1]) * 5, config) == []


def test_while_the_learning_rate_rises_nothing_has_to_move():
    config = dpo_tiny.get_config()
    still = rows_of_a_run(20, **{"rewards/accuracy": 0.5, "loss": 0.6931})
    config.train.warmup_steps = 200
    assert said(still, config, first=10) == []
    config.train.warmup_steps = 150
    assert len(said(still, config, first=10)) == 2


def test_objectives_that_have_no_reference_or_another_start_are_not_warned_of_what_they_do_not_have():
    config = dpo_tiny.get_config()
    config.loss.kind = "sft"
    assert said([{"loss": 0.6931, "error/chosen": 9.0, "error/rejected": 9.0}] * 20, config) == []


def test_a_loser_that_runs_away_while_the_winner_gains_is_as_it_should_be():
    assert said(rows_of_a_run(20, **AWAY | {"error/chosen": 0.09}), dpo_tiny.get_config()) == []


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("data.train", "", "FOLDER@SPLIT"),
        ("data.resize", "nearest", "bicubic or bilinear"),
        ("data.flip", "both", "shared"),
        ("data.crop", "random", "independent"),
        ("data.size_condition", "real", "fixed or true"),
        ("data.empty_prompts", 1.5, "at most 1.0"),
        ("loss.kind", "simpo", "sft"),
        ("loss.beta", 0.0, "at least"),
        ("loss.guard", 2.0, "at most 1.0"),
        ("evaluation.metrics", ("preference_score",), "no scorer"),
        ("checkpoint.every", 15, "multiple of log_every"),
        ("validation.every", 15, "multiple of log_every"),
        ("evaluation.every", 15, "multiple of log_every"),
        ("validation.timesteps", (), "at least one timestep"),
        ("train.batch_size", 12, "multiple of 8, the number of devices"),
        ("validation.batch_size", 12, "multiple of 8, the number of devices"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_in_one_sentence(key, value, words):
    config = dpo_tiny.get_config()
    dpo_config.check(config, num_devices=8)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as found:
        dpo_config.check(config, num_devices=8)
    sentence = str(found.value)
    assert sentence.startswith(f"config.{key} must be ") and words in sentence, sentence
    assert len(sentence.splitlines()) == 1


def test_adapters_to_start_from_are_refused_where_all_weights_are_trained():
    config = dpo_tiny.get_config()
    config.lora.rank, config.lora.init = 0, "somewhere"
    with pytest.raises(UserError, match=r"^config\.lora\.init must be empty where lora\.rank is 0"):
        dpo_config.check(config)
