"""What a config can switch on: the shipped recipes, memory savers, accumulation, averages, warnings."""

import re
import types
from importlib import import_module

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from spo_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from spo_jax.distributed.offload import to_device, weight_placement
from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_pipeline
from spo_jax.models import UNet2DConditionModel
from spo_jax.models.lora import init_lora
from spo_jax.planning.shapes import Shapes
from spo_jax.preference.losses import PairLoss
from spo_jax.preference.scorers import ImageScorer, ScorerSetup, image_candidates_scorer
from spo_jax.runs.held_out import encode_texts, untrained
from spo_jax.runs.load import Weights
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import shard_prompts
from spo_jax.sampling.generate import make_decode
from spo_jax.spo import config as spo_config
from spo_jax.spo.assemble import assemble
from spo_jax.spo.config import check as check_config
from spo_jax.spo.rollout import make_score_pool
from spo_jax.spo.steps import collect, draw, run_updates
from spo_jax.spo.update import CLIPPED_BATCHES, clipped_warning, make_update
from spo_jax.types import Candidates, Pool, PreferencePairs
from tests.small_pipeline import small_pipeline


# ---------------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("name", ["tiny", "sd15", "sd15:16gb", "sd21", "sd21:16gb", "sdxl", "sdxl:16gb"])
def test_recipes_can_be_used_and_have_the_keys_of_common(name):
    module, _, device = name.partition(":")
    get_config = import_module(f"configs.{module}").get_config
    config = get_config(device) if device else get_config()
    check_config(config)
    ours, common = (
        jax.tree.structure(c.to_dict(), is_leaf=lambda x: not isinstance(x, dict))
        for c in (config, spo_config.get_config())
    )
    assert ours == common


def test_recipes_are_the_papers():
    """The table of the released code's constants; batches are those of its four devices together."""
    sd15, sdxl = (import_module(f"configs.{name}").get_config() for name in ("sd15", "sdxl"))
    for config in (sd15, sdxl):
        sampling, train = config.sampling, config.train
        assert (sampling.num_steps, sampling.num_plain_steps, sampling.guidance_scale, sampling.eta) == (
            20,
            4,
            5.0,
            1.0,
        )
        assert (config.loss.beta, config.loss.clip_range) == (10.0, 0.1)
        assert (train.adam_b1, train.adam_b2, train.adam_eps, train.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
        assert train.max_grad_norm is None and config.num_batches * config.prompts_per_batch == 10 * 4000
    assert (sd15.sampling.num_candidates, sd15.sampling.num_inner_steps, sd15.pairs.threshold) == (4, 0, 0.3)
    assert (sdxl.sampling.num_candidates, sdxl.sampling.num_inner_steps, sdxl.pairs.threshold) == (2, 3, 0.4)
    assert (sd15.prompts_per_batch, sd15.train.minibatch_size, sd15.train.accumulation_steps) == (4 * 10, 4 * 10, 1)
    assert (sdxl.prompts_per_batch, sdxl.train.minibatch_size, sdxl.train.accumulation_steps) == (4 * 2, 4 * 2, 2)
    assert (sd15.train.learning_rate, sd15.lora.rank) == (6e-5, 4)
    assert (sdxl.train.learning_rate, sdxl.lora.rank) == (1e-5, 64)


def test_devices_of_less_memory_learn_from_as_many_pairs_a_step():
    for module in ("sd15", "sdxl"):
        paper, small = (import_module(f"configs.{module}").get_config(device) for device in ("", "16gb"))
        assert len({c.train.minibatch_size * c.train.accumulation_steps for c in (paper, small)}) == 1
        assert len({c.prompts_per_batch * c.num_batches for c in (paper, small)}) == 1


# ----------------------------------------------------------------------------------------------------------- memory
def test_gradient_checkpointing_changes_no_gradient():
    config = dict(block_out_channels=[8, 16], down_block_types=["CrossAttnDownBlock2D"] * 2, norm_num_groups=4)
    config |= dict(up_block_types=["CrossAttnUpBlock2D"] * 2, attention_head_dim=2, cross_attention_dim=6)
    config |= dict(layers_per_block=1, transformer_layers_per_block=[1, 2])  # one block as in SD1.5, more as in SDXL
    unet = UNet2DConditionModel.from_config(config)
    inputs = jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), jnp.array([3.0, 700.0]), jnp.ones((2, 5, 6))
    # By numpy: to compile the initialisation would take longer than the rest of the test.
    shapes = jax.eval_shape(unet.init, jax.random.key(1), *inputs)["params"]
    generator = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(0.3 * generator.standard_normal(x.shape)), shapes)
    lora = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(2), params, 2))

    def gradient(unet):
        def loss(lora):
            return jnp.square(unet.apply({"params": params, "lora": lora}, *inputs)).mean()

        traced = jax.jit(jax.grad(loss)).trace(lora)
        return traced.lower().compile()(lora), str(traced.jaxpr)

    (plain, program), (saving, saving_program) = gradient(unet), gradient(unet.clone(remat=True))
    chex.assert_trees_all_close(plain, saving, rtol=1e-4, atol=1e-6)
    assert "remat" in saving_program and "remat" not in program


def test_pieces_are_of_one_size_and_not_above_the_limit():
    assert piece_size(40, num_devices=1, limit=8) == 8
    assert piece_size(4 * 14, num_devices=4, limit=8) == 4 * 7
    assert piece_size(8, num_devices=2, limit=0) == piece_size(8, num_devices=2, limit=100) == 8
    assert piece_size(7, num_devices=1, limit=6) == 1


@hypothesis.given(
    st.integers(1, 4).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, 9).map(lambda n: n * d))),
    st.integers(0, 5),
)
def test_pieces_give_what_the_whole_gives(sizes, limit):
    num_devices, count = sizes
    size = piece_size(count, num_devices, limit)
    rows = {"a": jnp.arange(count), "b": jnp.arange(2 * count).reshape(count, 2)}
    largest = []

    def function(rows):
        largest.append(len(rows["a"]))
        return rows["a"] + 10 * rows["b"][:, 1], rows["b"]

    pieces = map_in_pieces(function, rows, size)
    assert max(largest) == size and (limit == 0 or size <= limit * num_devices)
    chex.assert_trees_all_equal(pieces, function(rows))


def image_scorer(pipeline, look, **changes):
    """SPO's scorer around ``look``, a score of images, texts and timesteps."""
    settings = spo_config.get_config().scorer
    settings.update(changes)
    asked = ImageScorer(lambda params, tokens: tokens, lambda params, *rows: look(*rows))
    return lambda num_devices: (
        image_candidates_scorer(ScorerSetup(settings, asked, make_decode(pipeline), num_devices)).score
    )


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_scores_do_not_depend_on_how_many_are_made_at_a_time(chunk):
    pipeline = read_pipeline(local("emoji:model"))
    texts, x0 = jnp.array([1.0, -3.0]), jax.random.normal(jax.random.key(0), (2, 4, *pipeline.latent_shape))
    candidates = Candidates(jnp.zeros_like(x0), x0, jnp.int32(50), jnp.int32(7))
    whole, parts = (
        image_scorer(pipeline, lambda images, text, t: images.mean((1, 2, 3)) * text + t, chunk=size)(devices)(
            pipeline.params | {"scorer": {}}, candidates, texts
        )
        for size, devices in ((0, 1), (chunk, 2))
    )
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert len(np.unique(np.asarray(whole))) == 8


@pytest.mark.parametrize("step_aware", [True, False])
def test_the_scorer_is_told_the_timestep_that_candidates_have_arrived_at(step_aware):
    pipeline = read_pipeline(small_pipeline())
    x0 = jnp.zeros((1, 2, *pipeline.latent_shape))
    score = image_scorer(pipeline, lambda images, text, t: t.astype(jnp.float32), step_aware=step_aware)(1)
    told = score(pipeline.params | {"scorer": {}}, Candidates(x0, x0, jnp.int32(50), jnp.int32(7)), jnp.zeros(1))
    np.testing.assert_array_equal(told, 7.0 if step_aware else 0.0)


def test_a_device_decodes_its_own_images_one_at_a_time():
    """On eight devices with two prompts each and two candidates: four rounds of one image, and nothing is sent."""
    mesh = make_mesh(-1, 1)
    pipeline = read_pipeline(local("emoji:model"))
    num_images = []

    def look(images, text, timesteps):
        num_images.append(len(images))
        return images.mean((1, 2, 3))

    spread = batch_sharding(mesh)
    texts = jax.device_put(jnp.ones(16), spread)
    latents = jax.device_put(jnp.zeros((16, 2, *pipeline.latent_shape)), spread)
    score = image_scorer(pipeline, look, chunk=1)(8)
    params = jax.device_put(pipeline.params | {"scorer": {}}, replicated(mesh))
    candidates = Candidates(latents, latents, jnp.int32(50), jnp.int32(7))
    compiled = jax.jit(score, out_shardings=spread).lower(params, candidates, texts).compile().as_text()
    assert num_images == [8]
    height, width = pipeline.image_size
    assert re.search(rf"f32\[1,{height},{width},3\]", compiled), "the image of a device"
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", compiled)


def test_weights_that_are_seldom_used_wait_in_the_hosts_memory():
    mesh = make_mesh(1, 8)
    kinds = {}
    for offload in (False, True):
        pipeline = read_pipeline(local("emoji:model"), sharding=weight_placement(mesh, offload=offload))
        kinds[offload] = {
            name: {x.sharding.memory_kind for x in jax.tree.leaves(part)} for name, part in pipeline.params.items()
        }
        visiting = to_device(pipeline.params["text_encoder"])
        assert {x.sharding.memory_kind for x in jax.tree.leaves(visiting)} == {"device"}
    assert kinds[False] == {name: {"device"} for name in ("unet", "vae", "text_encoder")}
    assert kinds[True] == kinds[False] | {"text_encoder": {"pinned_host"}}


# ------------------------------------------------------------------------------------------------------------- pairs
def test_only_random_pairs_depend_on_the_key():
    generator = np.random.default_rng(0)
    candidates = jnp.asarray(generator.standard_normal((3, 4, 5, 2, 2, 1)), jnp.float32)
    times = jnp.array([30, 20, 10])
    pool = Pool(candidates[:, :, 0], candidates, None, times, times - 10, x0=candidates)
    made = {}
    for kind in ("best_worst", "random"):
        config = spo_config.get_config()
        config.pairs.kind = kind
        scorer = types.SimpleNamespace(score=lambda params, candidates, text: candidates.x0.sum((-1, -2, -3)))
        score = make_score_pool(config, scorer)
        made[kind] = [score({}, pool, jnp.zeros(4), jax.random.key(seed)) for seed in (0, 0, 1)]
    for kind, (pairs, again, other) in made.items():
        chex.assert_trees_all_equal(pairs, again)
        assert (pairs[0].win != other[0].win).any() == (kind == "random")
        np.testing.assert_array_equal(pairs[1], made["best_worst"][0][1])


def test_a_plan_counts_the_steps_whose_pairs_are_used():
    config = tiny.get_config()
    config.num_batches, config.prompts_per_batch, config.train.minibatch_size = 5, 8, 16
    updates = {}
    for timesteps in ((0, 1000), (0, 750), (250, 750), (0, 500)):  # the pool's are 701, 601, ..., 1
        config.pairs.timesteps = timesteps
        updates[timesteps] = assemble(config, make_mesh(-1, 1), Shapes).executions["update"] // 5
    assert list(updates.values()) == [4, 4, 3, 3]  # of 8, 8, 5 and 5 pairs a prompt, two prompts' in a minibatch


# --------------------------------------------------------------------------------------------------------- optimizer
def options(**changes):
    config = spo_config.get_config().train
    config.update(changes)
    return config


def test_accumulated_gradients_are_averaged_before_a_step():
    params, gradients = {"w": jnp.ones(3)}, [{"w": jnp.array([1.0, 2.0, -4.0])}, {"w": jnp.array([3.0, -2.0, 0.0])}]
    twice, once = (make_optimizer(options(accumulation_steps=n)).transformation for n in (2, 1))
    state = twice.init(params)
    first, state = twice.update(gradients[0], state, params)
    second, state = twice.update(gradients[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    expected, _ = once.update(mean, once.init(params), params)
    np.testing.assert_array_equal(first["w"], 0)
    chex.assert_trees_all_close(second, expected, rtol=1e-6)


def test_the_factored_optimizer_has_a_small_state():
    params = {"w": jnp.zeros((512, 256))}
    sizes = [
        sum(x.size for x in jax.tree.leaves(make_optimizer(options(optimizer=name)).transformation.init(params)))
        for name in ("adamw", "adafactor")
    ]
    assert sizes[1] < 0.01 * sizes[0]


def steps_of(optimizer, params, gradients):
    """The weights after each of the updates."""
    optimizer = getattr(optimizer, "transformation", optimizer)
    state, all_params = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        all_params.append(params)
    return all_params


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("schedule", [None, lambda step: 0.01 / (step + 1)])
def test_weights_decay_by_the_learning_rate_times_the_decay(optimizer, schedule):
    params = {"w": jnp.full((3, 2), 2.0)}
    none = jax.tree.map(jnp.zeros_like, params)
    train = options(optimizer=optimizer, weight_decay=0.3, learning_rate=0.01)
    after = steps_of(make_optimizer(train, schedule), params, [none, none])
    rates = [0.01, 0.01 if schedule is None else 0.005]
    np.testing.assert_allclose(after[0]["w"], 2.0 * (1 - 0.3 * rates[0]), rtol=1e-6)
    np.testing.assert_allclose(after[1]["w"], 2.0 * (1 - 0.3 * rates[0]) * (1 - 0.3 * rates[1]), rtol=1e-6)


@pytest.mark.parametrize("schedule", [None, lambda step: 0.01 / (step + 1)])
def test_the_factored_optimizer_without_decay_is_optax_adafactor(schedule):
    generator = np.random.default_rng(0)
    params, *gradients = (
        {"large": generator.standard_normal((130, 140), np.float32), "b": generator.standard_normal(5, np.float32)}
        for _ in range(4)
    )
    ours = make_optimizer(options(optimizer="adafactor", weight_decay=0.0, learning_rate=0.01), schedule)
    theirs = optax.adafactor(0.01 if schedule is None else schedule, multiply_by_parameter_scale=False)
    chex.assert_trees_all_equal(steps_of(ours, params, gradients), steps_of(theirs, params, gradients))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_average_follows_what_is_trained(decay):
    def loss(trained, average, params, prompts, pairs, mask):
        zero = jnp.zeros(())
        return jnp.square(trained["lora"] - 1.0), PairLoss(*[zero] * 8)

    optimizer = Optimizer(optax.sgd(0.1), decay or 0.0)
    update = jax.jit(make_update(loss, optimizer))
    state = TrainState.create({"lora": jnp.zeros(())}, optimizer)
    empty = PreferencePairs(*(jnp.zeros(1) for _ in range(6)))
    trained, average = 0.0, 0.0
    for _ in range(3):
        state, _ = update(state, None, None, empty, jnp.ones(1, bool))
        trained += 0.2 * (1 - trained)
        average = average + (1 - (decay or 0.0)) * (trained - average)
    np.testing.assert_allclose(state.trained["lora"], trained, rtol=1e-6)
    np.testing.assert_allclose(state.result["lora"], average, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- warnings
def test_a_run_that_is_clipped_everywhere_is_warned_about():
    good = {"win_clipped": 0.5, "lose_clipped": 0.99, "num_updates": 3}
    bad = {"win_clipped": 0.97, "lose_clipped": 0.99, "num_updates": 3}
    skipped = {"win_clipped": 0.0, "lose_clipped": 0.0, "num_updates": 0}
    assert clipped_warning([bad] * (CLIPPED_BATCHES - 1)) is None
    assert "learning_rate" in clipped_warning([good] * 9 + [bad] * CLIPPED_BATCHES)
    assert clipped_warning([bad] * CLIPPED_BATCHES + [good]) is None
    assert clipped_warning([bad] * CLIPPED_BATCHES + [skipped]) is None


def test_the_base_model_is_measured_by_the_program_of_the_tuned_one():
    adapters = {"lora": {"A": jnp.ones((8, 3), jnp.float32), "B": jnp.ones((3, 8), jnp.float32)}}
    adapters = jax.device_put(adapters, replicated(make_mesh(-1, 1)))
    traced = []
    program = jax.jit(lambda trained: traced.append(1) or jax.tree.map(jnp.sum, trained))
    assert program(adapters) == {"lora": {"A": 24, "B": 24}}
    assert program(untrained(adapters)) == {"lora": {"A": 0, "B": 0}} and len(traced) == 1
    assert untrained({"params": adapters}) == {}


# -------------------------------------------------------------------------------------------------- split over devices
def test_split_weights_and_state_give_the_update_of_whole_ones():
    """Full fine-tuning on eight devices: each holds an eighth of what is large, and the numbers are the same."""
    config = tiny.get_config()
    config.model, config.scorer.fn = str(small_pipeline()), "tests.scorers:brightness"
    config.evaluation.metrics = ("colorfulness",)
    config.lora.rank, config.prompts_per_batch, config.train.minibatch_size, config.pairs.threshold = 0, 8, 8, 0.0
    config.sampling.num_steps, config.sampling.num_plain_steps, config.sampling.num_candidates = 4, 2, 2
    results = []
    for fsdp in (1, 8):
        spo = assemble(config, make_mesh(data=-1, fsdp=fsdp), Weights)
        prompts = shard_prompts(encode_texts(spo, ["a fox on a teal background"] * 8), spo.mesh)
        rollout, num_valid = collect(spo, draw(spo, spo.state, prompts, jax.random.key(2)), prompts, jax.random.key(2))
        shardings = jax.tree.map(lambda x: x.sharding, spo.state)
        state, updates = run_updates(spo, spo.state, prompts, rollout, num_valid)
        jax.tree.map(lambda x, sharding: chex.assert_equal(x.sharding, sharding), state, shardings)
        for x in jax.tree.leaves(state):
            assert x.size < 2**14 or x.addressable_shards[0].data.size == x.size / fsdp, "all that is large is split"
        results.append(updates)
    whole, split = results
    assert len(whole) == len(split) > 1
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a.sums.loss, b.sums.loss, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-3)
