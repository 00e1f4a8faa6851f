"""Every number of a config has its range; values outside are refused by name, before anything is written."""

import math

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import dpo_tiny, spm_tiny, tiny
from spo_jax.dpo import config as dpo_config
from spo_jax.errors import UserError
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.runs.result import still_zero
from spo_jax.spm import config as spm_config
from spo_jax.spo import config as spo_config
from spo_jax.spo.update import nothing_learned

CONFIGS = {
    "spo": (spo_config.get_config, tiny.get_config, spo_config.RANGES, spo_config.check),
    "dpo": (dpo_config.get_config, dpo_tiny.get_config, dpo_config.RANGES, dpo_config.check),
    "spm": (spm_config.get_config, spm_tiny.get_config, spm_config.RANGES, spm_config.check),
}


@pytest.fixture(scope="module", autouse=True)
def pairs_are_there():
    """A check opens the pairs that a config names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spo_jax.data.preferences.open_pairs", lambda name: None)
        yield


def leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def is_number(value):
    """A tuple of numbers counts, and None, which stands for a number that is off."""
    if isinstance(value, tuple):
        return all(map(is_number, value))
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def with_value(method, name, value):
    config = CONFIGS[method][1]()
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    return config


@pytest.mark.parametrize("method", CONFIGS)
def test_every_number_has_a_range_and_every_range_a_key(method):
    every, _, ranges, _ = CONFIGS[method]
    assert {name for name, value in leaves(every()) if is_number(value)} == set(ranges)


KEYS = [(method, name) for method, (_, _, ranges, _) in CONFIGS.items() for name in ranges]


@pytest.mark.parametrize(("method", "name"), KEYS)
def test_numbers_that_no_run_can_use_are_refused_by_name(method, name):
    every, _, ranges, check = CONFIGS[method]
    whole = isinstance(dict(leaves(every()))[name], int) and not isinstance(ranges[name].low, float)
    bad = [-2, -(2**40), 2**40, 10**30, "many"] + ([] if whole else [math.nan, math.inf, -math.inf, 1e300, -1e-3])
    for value in bad:
        for given_value in [value] if "timesteps" not in name else [(value, 3), (3, value)]:
            with pytest.raises(UserError, match=rf"^config\.{name} must be .*not .*config file") as error:
                check(with_value(method, name, given_value))
            assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "name", "value", "words"),
    [
        ("spo", "seed", -1, "at least 0, not -1"),
        ("spo", "seed", 2**32, "at most 4294967295, not 4294967296"),
        ("spo", "train.max_grad_norm", -1.0, "at least 1e-06, or 0 for off, not -1.0"),
        ("spo", "train.max_grad_norm", math.inf, "a finite number, or 0 for off, not inf"),
        ("spo", "train.learning_rate", 0.0, "at least 1e-12, not 0.0"),
        ("spo", "train.learning_rate", 1e-300, "at least 1e-12, not 1e-300"),
        ("spo", "train.learning_rate", None, "a number, not None"),
        ("spo", "train.adam_b1", 1.0, "below 1.0, not 1.0"),
        ("spo", "train.adam_b2", 0.9999999999, "below 1.0, not 0.9999999999"),
        ("spo", "train.adam_eps", 0.0, "at least 1e-30, not 0.0"),
        ("spo", "sampling.eta", 0.0, "positive, because candidates differ only by their noise"),
        ("spo", "sampling.num_inner_steps", 10, "below num_steps"),
        ("spo", "sampling.num_plain_steps", 10, "from 0 to num_steps - 1"),
        ("spo", "sampling.continuation", "best", "random or win or lose, not 'best'"),
        ("spo", "pairs.kind", "all", "best_worst or random, not 'all'"),
        ("spo", "pairs.timesteps", (3, 3), "two numbers, the second one larger"),
        ("spo", "pairs.timesteps", (0.5, 3), "whole numbers"),
        ("spo", "mesh.data", 0, "at least 1, or -1 for all devices that are left, not 0"),
        ("spo", "loss.kind", "ppo", "spo or gradspo or dpo or ipo or hinge or dmpo, not 'ppo'"),
        ("spo", "loss.kind", "gradspo", "train.ema_decay must be on for this loss.kind"),
        ("spo", "scorer.kind", "latents", "image, not 'latents'"),
        ("spo", "evaluation.metrics", ("beauty",), "some of preference_score, alignment_top1, colorfulness"),
        ("spo", "evaluation.metrics", (), "some of preference_score"),
        ("spo", "validation.every", -1, "at least 1, or 0 for none"),
        ("spm", "timesteps", (0.5, 3), "whole numbers"),
        ("spm", "timesteps", (3, 3), "two numbers, the second one larger"),
        ("spm", "validation.timesteps", (), "at least one timestep"),
        ("spm", "train.warmup", "cosine", "linear or log, not 'cosine'"),
        ("spm", "train.warmup_steps", 1200, "from 0 to num_steps - 1"),
    ],
)
def test_the_sentence_says_what_a_value_must_be(method, name, value, words):
    with pytest.raises(UserError) as error:
        CONFIGS[method][3](with_value(method, name, value))
    assert "config." in str(error.value) and " must be " in str(error.value) and words in str(error.value)
    assert value == "gradspo" or str(error.value).startswith(f"config.{name} must be")


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("spo", "seed", 2**32 - 1),
        ("spo", "train.max_grad_norm", 0.0),
        ("spo", "train.ema_decay", 0.0),
        ("spo", "train.ema_decay", None),
        ("spo", "train.adam_b1", 0.0),
        ("spo", "train.weight_decay", 0.0),
        ("spo", "lora.rank", 0),
        ("spo", "scorer.chunk", 0),
        ("spo", "mesh.fsdp", -1),
        ("spo", "train.learning_rate", 1.0),
        ("spo", "sampling.num_inner_steps", 9),
        ("spm", "chunk", 0),
        ("spm", "train.max_grad_norm", 0.0),
        ("spm", "data.num_workers", 0),
    ],
)
def test_the_ends_of_a_range_belong_to_it(method, name, value):
    CONFIGS[method][3](with_value(method, name, value))


def inside(name):
    """Numbers of the range: its ends, and numbers between them of every order of magnitude."""
    low, high, *_ = spo_config.RANGES[name]
    small, large = max(low, 1e-6), min(high, 0.9999999 if "high" in spo_config.RANGES[name].open else high)
    between = st.floats(math.log(small), math.log(large)).map(lambda x: min(max(math.exp(x), small), large))
    return st.one_of(st.just(low), st.just(large), between)


NUMBERS = [f"train.{name}" for name in ("learning_rate", "adam_b1", "adam_b2", "adam_eps", "weight_decay")]


@settings(max_examples=60)
@given(st.fixed_dictionaries({name: inside(name) for name in [*NUMBERS, "train.max_grad_norm"]}), st.booleans())
def test_whatever_is_in_range_adapters_stay_finite_and_learn(numbers, factored):
    config = tiny.get_config()
    config.update_from_flattened_dict(numbers | {"train.optimizer": "adafactor" if factored else "adamw"})
    spo_config.check(config)
    generator = np.random.default_rng(0)
    trained = {"A": generator.standard_normal((3, 2), np.float32), "B": np.zeros((2, 3), np.float32)}
    gradient = {"A": np.zeros((3, 2), np.float32), "B": 1e-3 * generator.standard_normal((2, 3), np.float32)}
    optimizer = make_optimizer(config.train).transformation
    state = optimizer.init(trained)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
    assert np.isfinite(trained["A"]).all() and np.isfinite(trained["B"]).all() and np.all(trained["B"])


def test_the_end_of_a_run_that_learned_nothing_names_the_reason():
    config, zeros = tiny.get_config(), {"down": {"to_q": {"A": np.ones((3, 2)), "B": np.zeros((2, 3))}}}
    config.train.accumulation_steps = 4
    learned = {"down": {"to_q": {"A": np.ones((3, 2)), "B": np.full((2, 3), 1e-30)}}}
    assert still_zero(learned, 4) is None and still_zero(None, 4) is None and nothing_learned(config, 4) is None
    for num_updates, words in ((0, "no two candidates"), (0, "config.pairs.threshold = 0.3"), (3, "fewer than")):
        assert words in nothing_learned(config, num_updates)
    assert "after 4 minibatches every adapter is still zero" in still_zero(zeros, 4)


@given(key=st.sampled_from(KEYS), value=st.one_of(st.floats(), st.integers()))
def test_any_number_passes_or_is_refused_by_name(key, value):
    method, name = key
    try:
        CONFIGS[method][3](with_value(method, name, (0, value) if "timesteps" in name else value))
    except UserError as error:
        assert str(error).startswith("config.") and len(str(error).splitlines()) == 1
