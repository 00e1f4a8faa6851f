"""Which scorer a config names, and what becomes of a user's own function."""

from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import make_mesh
from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_clip, read_pipeline
from spo_jax.formats.scorers import function_scorer, load_function, write_scorer
from spo_jax.models.clip import is_time_layer
from spo_jax.preference.scorers import ScorerSetup, image_candidates_scorer, make_clip_scorer, make_function_scorer
from spo_jax.sampling.encode import encode_prompts, make_encode
from spo_jax.sampling.generate import make_decode
from spo_jax.spo.config import check as check_config
from spo_jax.spo.rollout import make_draw_pool, make_score_pool
from tests.golden_data import FOLDER


class Tokenizer:
    model_max_length = 6


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's into a folder that Python searches; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = iter(f"judge_of_{tmp_path.name}_{i}" for i in range(9))

    def write(text):
        name = next(names)
        (tmp_path / f"{name}.py").write_text(f"import jax, jax.numpy as jnp, numpy as np\n{text}\n", encoding="utf-8")
        return name

    return write


def inputs(count=3, size=32):
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.uniform(-1, 1, (count, size, size, 3)), jnp.float32)
    return images, jnp.asarray(generator.integers(1, 60, (count, 16)), jnp.int32)


def score_of(scorer):
    return jax.jit(
        lambda params, images, tokens, t: scorer.score(params, images, scorer.encode_text(params, tokens), t)
    )


# -------------------------------------------------------------------------------------------------- preference models
def test_a_step_aware_model_is_told_the_timestep_and_a_plain_clip_has_no_time_layers(tmp_path):
    images, tokens = inputs()
    clip, params = read_clip(FOLDER / "spm", step_aware=None)
    flat = flax.traverse_util.flatten_dict(params)
    plain = flax.traverse_util.unflatten_dict({path: x for path, x in flat.items() if not is_time_layer(path)})
    write_scorer(tmp_path, clip.clone(step_aware=False), plain)
    for path, moves in ((FOLDER / "spm", True), (tmp_path, False)):
        clip, params = read_clip(path, step_aware=None)
        scorer = make_clip_scorer(clip)
        assert any(is_time_layer(path) for path in flax.traverse_util.flatten_dict(params)) == moves
        score = score_of(scorer)
        first, second = (score(params, images, tokens, jnp.full(3, t)) for t in (0, 951))
        assert bool((first != second).any()) == moves
    with_identity, params = read_clip(tmp_path, step_aware=True)
    as_before = score_of(make_clip_scorer(with_identity))(params, images, tokens, jnp.full(3, 951))
    np.testing.assert_allclose(second, as_before, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------- a user's function
def test_a_function_gets_pictures_tokens_and_timesteps_as_promised(module):
    name = module("def score(images, tokens, timesteps):\n    seen.append((images, tokens, timesteps))\n"
                  "    return images.mean((1, 2, 3)) + tokens.sum(1) + timesteps\nseen = []")  # fmt: skip
    scorer, params = make_function_scorer(load_function(f"{name}:score")), {}
    images, tokens = inputs()
    text = scorer.encode_text(params, np.asarray(tokens))
    np.testing.assert_array_equal(text, tokens)
    scores = scorer.score(params, (images * 2).astype(jnp.bfloat16), text, jnp.array([0, 1, 951]))
    ((seen_images, seen_tokens, seen_timesteps),) = __import__(name).seen
    assert (seen_images.dtype, seen_tokens.dtype, seen_timesteps.dtype) == (jnp.float32, jnp.int32, jnp.int32)
    assert float(jnp.abs(seen_images).max()) == 1, "the decoder's overshoots are clipped"
    np.testing.assert_allclose(scores, seen_images.mean((1, 2, 3)) + tokens.sum(1) + jnp.array([0, 1, 951]), rtol=1e-6)
    assert jax.jit(scorer.score)(params, images, text, jnp.zeros(3)).shape == (3,)


@pytest.mark.parametrize(
    "text, words",
    [
        ("def other(images, tokens, timesteps): ...", "has no function score"),
        ("score = 3", "something else than a function under the name score"),
        ("import no_such_package_anywhere", "does not run (ModuleNotFoundError: No module named 'no_such_package_any"),
        ("1 / 0", "does not run (ZeroDivisionError: division by zero; judge_of_"),
        ("def score(:", "does not run (SyntaxError"),
    ],
)
def test_a_module_that_has_no_such_function_is_refused(module, text, words):
    name = module(text)
    config = tiny.get_config()
    config.scorer.fn = f"{name}:score"
    with pytest.raises(UserError) as caught:
        check_config(config)
    assert words in str(caught.value) and f"config.scorer.fn={name}:score" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["judge", "judge.score", ":score", "judge:", "../judge:score", "judge.py:score", "a:b:c"]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(UserError, match=r"--fn=.*(my_module:score|there is no module)"):
        load_function(name, "--fn")


def test_a_module_that_is_not_there_is_refused():
    for name in ("no_such_judge:score", "no_such.judge:score", "spo_jax.no_such:score"):
        with pytest.raises(UserError, match=r"there is no module .*; start in the folder that has its file"):
            load_function(name)


@pytest.mark.parametrize(
    "body, words",
    [
        ("return np.asarray(images).mean((1, 2, 3))", "TracerArrayConversionError"),
        ("return images.mean((1, 2, 3)) if images.max() > 0 else 0", "TracerBoolConversionError"),
        ("return images.mean((1, 2, 3)) + jnp.zeros(5)", "TypeError"),
        ("return undefined", "NameError: name 'undefined' is not defined; judge_of_"),
        ("return images.mean()", "gives float32 [] for 4 pictures; it must give float32 [4]"),
        ("return images.mean((2, 3))", "gives float32 [4, 8] for 4 pictures"),
        ("return tokens.sum(1)", "gives int32 [4] for 4 pictures"),
        ("return images.mean((1, 2, 3)).astype(jnp.bfloat16)", "gives bfloat16 [4]"),
        ("return images.mean((1, 2, 3)), timesteps", "gives no array"),
        ("pass", "gives no array"),
    ],
)
def test_a_function_that_training_could_not_use_is_refused(module, body, words):
    name = module(f"def score(images, tokens, timesteps):\n    {body}")
    with pytest.raises(UserError) as caught:
        function_scorer(f"{name}:score", num_images=4, image_size=(8, 12), tokenizer=Tokenizer)
    assert words in str(caught.value) and f"config.scorer.fn={name}:score" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_good_function_is_traced_on_the_shapes_of_the_run_and_not_computed(module):
    name = module("shapes = []\ndef score(images, tokens, timesteps):\n"
                  "    shapes.append([x.shape for x in (images, tokens, timesteps)])\n"
                  "    assert isinstance(images, jax.core.Tracer)\n    return images.mean((1, 2, 3))")  # fmt: skip
    function_scorer(f"{name}:score", num_images=4, image_size=(8, 12), tokenizer=Tokenizer)
    assert __import__(name).shapes == [[(4, 8, 12, 3), (4, 6), (4,)]]


def test_a_functions_scores_are_its_own():
    scorer = make_function_scorer(lambda images, tokens, timesteps: images[:, 0, 0, 0])
    images = jnp.linspace(-1, 1, 5)[:, None, None, None] * jnp.ones((5, 4, 4, 3))
    np.testing.assert_array_equal(scorer.score({}, images, None, jnp.zeros(5)), images[:, 0, 0, 0])


# -------------------------------------------------------------------------------------------------------- in training
def test_a_plain_clip_fits_into_the_sampling_program():
    """Its shapes only; runs with the other two kinds of judges are in tests/system."""
    config = tiny.get_config()
    config.sampling.num_steps = 4
    pipeline = read_pipeline(local(config.model))
    clip, scorer_params = read_clip("emoji:model/clip", step_aware=None)
    scorer = image_candidates_scorer(ScorerSetup(config.scorer, make_clip_scorer(clip), make_decode(pipeline), 8))
    params = {**pipeline.params, "scorer": scorer_params}
    encode = make_encode(pipeline, scorer)
    prompts = encode_prompts(
        partial(jax.eval_shape, encode), params, pipeline, pipeline.tokenizer, ["a fox on a teal background"] * 8
    )
    draw = make_draw_pool(config, pipeline, scorer, make_schedule(pipeline.scheduler_config, 4), make_mesh(1, 8))
    pool = jax.eval_shape(draw, params, {}, prompts, jax.random.key(0))
    pairs, _ = jax.eval_shape(make_score_pool(config, scorer), params, pool, prompts.scorer_text, jax.random.key(0))
    assert pairs.valid.shape == (2, 8)
