"""Planning without hardware: targets, shapes, the walk over a jaxpr, what a compiler's answers become, proposals."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from configs import sd15, sdxl, spm_sd15, tiny
from spo_jax.distributed.mesh import make_mesh, replicated
from spo_jax.distributed.sharding import weight_sharding
from spo_jax.errors import UserError
from spo_jax.formats.base import Base, base_of_config
from spo_jax.formats.hub import local
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.lora_write import write_kohya
from spo_jax.formats.pipeline import read_unet
from spo_jax.planning import compile as compiling
from spo_jax.planning import planner
from spo_jax.planning.chips import GIB
from spo_jax.planning.collectives import Traffic
from spo_jax.planning.estimate import abstract_run, estimate_program, resident_bytes, share_of
from spo_jax.planning.planner import Need, Plan, overrides, search, table, verdict
from spo_jax.planning.shapes import Shapes, device_bytes, num_parameters
from spo_jax.planning.targets import parse_target
from spo_jax.planning.walk import walk
from spo_jax.spm import config as spm_config
from spo_jax.spo import config as spo_config
from tests.lora_files import random_adapters

V5E = parse_target("v5e:2x4")


# --------------------------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize(
    "config, parameters",
    [(sd15.get_config(), 859_520_964 + 83_653_863 + 123_060_480), (sdxl.get_config(), 2_567_463_684 + 901_374_183)],
    ids=["sd15", "sdxl"],
)
def test_published_pipelines_need_no_file(config, parameters):
    mesh = make_mesh(1, 8)
    pipeline = Shapes(functools.partial(weight_sharding, mesh), jnp.bfloat16).pipeline(
        base_of_config(config), None, None, remat=False
    )
    assert num_parameters(pipeline.params) == parameters
    assert 2 * parameters / 8 <= device_bytes(pipeline.params) < 2.1 * parameters / 8, "each of eight has an eighth"


def test_a_preference_model_that_is_not_here_is_a_vit_h_and_a_plain_one_is_known_by_its_name():
    place = lambda _path, _shape: replicated(make_mesh(-1, 1))  # noqa: E731
    _, released = Shapes(place, jnp.bfloat16).clip("not/here.bin", "scorer")
    assert num_parameters(released) == pytest.approx(1.306e9, rel=1e-3)
    pickscore = spm_sd15.get_config().validation.plain
    _, plain = Shapes(place, jnp.bfloat16).clip(pickscore, "scorer")
    assert num_parameters(plain) == 986_109_441
    _, timed = Shapes(place, jnp.bfloat16).clip(pickscore, "scorer", step_aware=True)
    assert num_parameters(timed) == num_parameters(released)


@pytest.mark.parametrize("name, timed", [("emoji:model/clip", False), ("emoji:model/scorer", True)])
def test_a_clip_that_is_here_has_time_layers_if_its_weights_have_them(name, timed):
    clip, shapes = Shapes(lambda *_: replicated(make_mesh(-1, 1)), jnp.float32).clip(name, "scorer")
    assert (clip.step_aware, "t_embedder" in shapes) == (timed, timed)


def test_a_model_of_unknown_size_is_refused_with_those_that_are_known():
    with pytest.raises(UserError, match=r"'no/model' has no model_index\.json here.*stable-diffusion-xl-base-1\.0"):
        Shapes(lambda *_: replicated(make_mesh(-1, 1)), jnp.bfloat16).pipeline(
            Base("no/model"), None, None, remat=False
        )


# ----------------------------------------------------------------------------------------------------------------- walk
def size_of(aval):
    return aval.size * aval.dtype.itemsize


def cost(function, *shapes, **options):
    return walk(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr, size_of, **options)


def test_products_and_their_results_are_counted():
    result = cost(lambda x, w: x @ w, (64, 1024), (1024, 512))
    assert result.flops == 2 * 64 * 1024 * 512
    assert result.peak == 64 * 512 * 4


def test_a_convolution_is_counted():
    def function(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert cost(function, (2, 32, 32, 16), (3, 3, 16, 8)).flops == 2 * (2 * 32 * 32 * 8) * 3 * 3 * 16


def test_elementwise_work_makes_no_array_and_what_is_used_no_more_is_gone():
    def chain(x, w):
        for _ in range(5):
            x = jnp.tanh(x @ w) * 2 + 1
        return x

    side = 256 * 256 * 4
    assert cost(chain, (256, 256), (256, 256)).peak == 2 * side
    assert cost(chain, (256, 256), (256, 256), fuses_operands=False).peak == 3 * side, "operands are written out"


def test_a_gradient_keeps_what_it_needs_and_remat_does_not():
    def loss(x, w, wrap):
        for _ in range(6):
            x = wrap(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x)
        return x.sum()

    def peak(wrap):
        return cost(jax.grad(lambda x, w: loss(x, w, wrap)), (256, 256), (256, 256)).peak / (256 * 256 * 4)

    assert 12 <= peak(lambda f: f) <= 15
    assert 6 <= peak(jax.checkpoint) <= 10


def test_a_residual_sum_takes_the_place_of_a_summand():
    assert cost(lambda x, v, w: x @ v + x @ w, (256, 256), (256, 256), (256, 256)).peak == 2 * 256 * 256 * 4


def test_results_that_are_made_together_keep_their_own_inputs_only():
    """Gradients of adapters, small, and the one that goes on, large: the barrier between them is no array of both."""

    def small_and_large(x, a):
        large = x @ a
        small, large = jax.lax.optimization_barrier((large.sum(0), large))
        return small + (large @ a.T).sum(0)[:64]

    assert cost(small_and_large, (4096, 64), (64, 64)).peak < 2.1 * 4096 * 64 * 4


def test_a_loop_multiplies_flops_and_not_memory():
    def loop(x, w, length):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=length)[0]

    three, nine = (cost(lambda x, w, n=n: loop(x, w, n), (256, 256), (256, 256)) for n in (3, 9))
    assert nine.flops == 3 * three.flops
    assert nine.peak == three.peak == 2 * 256 * 256 * 4


def test_results_that_take_the_place_of_arguments_are_not_counted():
    both = cost(lambda x, w: (x @ w, w @ x), (256, 256), (256, 256))
    first_free = cost(lambda x, w: (x @ w, w @ x), (256, 256), (256, 256), num_donated=1)
    assert (both.peak, first_free.peak) == (2 * 256 * 256 * 4, 256 * 256 * 4)


def test_a_cond_writes_over_arguments_that_its_results_take_the_place_of():
    """Accumulation of gradients: most of what it chooses is the state."""

    def choose(state, x):
        state, update = jax.lax.cond(x.sum() > 0, lambda s: (s + 1, s * 2), lambda s: (s, s), state)
        return state, update[0]

    shapes, side = [(256, 256), (8,)], 256 * 256 * 4
    assert abs(cost(choose, *shapes).peak - 2 * side) < 100
    assert abs(cost(choose, *shapes, num_donated=1).peak - side) < 100


# ------------------------------------------------------------------------------------------------------------- estimate
def test_a_share_is_the_recipe_of_one_device():
    share = share_of(sd15.get_config(), 4)
    assert (share.prompts_per_batch, share.train.minibatch_size, share.mesh.data) == (10, 10, 1)
    config = spm_config.get_config()
    config.chunk = 16
    share = share_of(config, 8)
    assert (share.train.batch_size, share.validation.batch_size, share.chunk) == (8, 8, 2)


def test_what_stays_on_a_device_is_split_by_fsdp():
    config = sd15.get_config()
    whole = resident_bytes(abstract_run(config, V5E))
    config.mesh.data, config.mesh.fsdp = 1, 8
    split = resident_bytes(abstract_run(config, V5E))
    assert whole["unet"] == 2 * 859_520_964
    assert whole["optimizer"] == pytest.approx(2 * whole["trained"], rel=1e-3), "two moments"
    assert whole["texts"] == split["texts"]
    for name in ("unet", "scorer"):
        assert split[name] == pytest.approx(whole[name] / 8, rel=0.05)


def test_adapters_to_start_from_are_counted_where_they_are_here(tmp_path):
    unet = read_unet(local("emoji:model/unet"))[1]
    file = write_kohya(tmp_path, random_adapters({"unet": unet}), unet)
    config = tiny.get_config()
    fresh = resident_bytes(abstract_run(config, V5E))["trained"]
    config.lora.init = f"{file}:0.5"
    start = starting_lora(jax.random.key(0), unet, config.lora.rank, config.lora.init)
    counted = resident_bytes(abstract_run(config, V5E))["trained"]
    assert counted == sum(x.nbytes for x in jax.tree.leaves(start)) > fresh
    config.lora.init = "not/here"
    assert resident_bytes(abstract_run(config, V5E))["trained"] == fresh


@pytest.mark.parametrize(
    "program, part, least, most",
    [
        ("pool", 0.6, ["unet"], ["unet", "vae", "scorer", "trained"]),
        ("evaluation", 0.7, ["unet"], ["unet"]),  # the largest of those it reads
        ("update", 0.2, ["unet"], ["unet"]),
    ],
)
def test_an_estimate_for_a_tpu_has_a_part_of_the_weights_that_are_gathered(program, part, least, most):
    config, target = tiny.get_config(), parse_target("v5e:2x2")
    *_, plain = estimate_program(config, target, program)
    config.mesh.data, config.mesh.fsdp = 1, 4
    *_, own = estimate_program(config, target, program)
    resident = abstract_run(config, target).resident

    def from_others(names):
        leaves = jax.tree.leaves([resident[name] for name in names])
        size = sum(leaf.size for leaf in leaves if "fsdp" in leaf.sharding.spec)
        return part * size * 4 * 3 / 4  # bytes of float32, three quarters of them from the other devices

    assert round(from_others(least)) <= own - plain <= round(from_others(most))


@pytest.mark.parametrize("program", ["update", "evaluation"])
def test_a_gpu_gathers_a_split_weight_where_it_is_used_and_lets_it_go(program):
    config, target = tiny.get_config(), parse_target("h100:4")
    *_, plain = estimate_program(config, target, program)
    config.mesh.data, config.mesh.fsdp = 1, 4
    assert estimate_program(config, target, program)[-1] == plain


@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_what_waits_in_the_hosts_memory_does_not_stay_and_is_an_argument_of_its_own(target):
    config, target = tiny.get_config(), parse_target(target)
    stays = resident_bytes(abstract_run(config, target))
    _, extra, own = estimate_program(config, target, "evaluation")
    config.offload = True
    assert resident_bytes(abstract_run(config, target)) == stays | {"text_encoder": 0, "clip": 0}
    assert estimate_program(config, target, "evaluation")[1:] == (extra + stays["clip"], own)


def test_gradients_of_split_weights_are_split():
    config, target = tiny.get_config(), parse_target("h100:8")
    config.lora.rank, config.train.accumulation_steps, config.train.minibatch_size = 0, 2, 8
    *_, whole = estimate_program(config, target, "update")
    config.mesh.data, config.mesh.fsdp = 1, 8
    *_, split = estimate_program(config, target, "update")
    weights = sum(x.size * 4 for x in jax.tree.leaves(abstract_run(config, target).resident["trained"]))
    assert whole - split > 1.5 * weights, "of gradients and of updates seven eighths are elsewhere"


def test_a_program_of_the_emoji_models_compiles_as_estimated_on_a_cpu():
    config, target = tiny.get_config(), parse_target("cpu:2")
    answer = compiling.compile_program(config, target.name, "encode")
    assert (answer.status, answer.message) == ("compiled", "")
    assert answer.traffic == Traffic({}, {}) and answer.seconds > 0
    _, extra, own = estimate_program(config, target, "encode")
    assert (extra + own) / 3 < answer.own < 3 * (extra + own), "a CPU's compiler fuses less"


# ------------------------------------------------------------------------------------------------- answers of compilers
class Lowered:
    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (20.50G) exceeds available", 20.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.25T of 15.75G hbm.", 1280),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes.", 1),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_a_program_that_is_too_large_is_an_answer(message, gib):
    answer = compiling.compile_lowered(Lowered(message), "tpu")
    assert (answer.status, answer.own / GIB) == ("too large", gib)


def test_any_other_error_of_a_compiler_is_one():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        compiling.compile_lowered(Lowered("INTERNAL: no"), "tpu")


@pytest.mark.parametrize(
    "message, read", [("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390)", True), ("no", False)]
)
def test_a_program_whose_text_jax_cannot_read_has_its_memory_and_no_collectives(message, read):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError(message)

    if read:
        assert compiling.traffic_of(Unreadable()) is None
    else:
        with pytest.raises(jax.errors.JaxRuntimeError):
            compiling.traffic_of(Unreadable())


def test_the_workspace_that_cudnn_hides_is_counted_once_for_the_largest_gradient():
    results = "bf16[2,8,80,40]{{3,2,1,0}}, u8[0]{{0}}"
    call = f'ROOT %a.1 = (bf16[{{}}]{{{{3,2,1,0}}}}, {results}) custom-call(%x), custom_call_target="__cudnn${{}}"'
    calls = [
        ("2,8,4096,40", "fmhaSoftmaxBackward"),
        ("2,8,64,40", "fmhaSoftmaxBackward"),
        ("9,8,4096,40", "fmhaSoftmax"),
    ]
    text = "\n".join(call.format(*each) for each in calls)
    assert compiling.hidden_bytes(text) == 2 * 8 * 4096 * 40 * 4
    assert compiling.hidden_bytes("") == 0


def test_an_attention_that_the_target_does_not_have_is_refused():
    config = sd15.get_config()
    config.attention = "cudnn"
    planner.check(config, parse_target("h100:4"))
    with pytest.raises(UserError, match="'cudnn' is for NVIDIA GPUs from Ampere on, and this is a tpu"):
        planner.check(config, parse_target("v5e:2x2"))


def test_an_answer_is_kept_for_a_program_a_target_and_the_code_that_reads_it(monkeypatch):
    cpu, two = parse_target("cpu"), parse_target("cpu:2")
    kept = compiling.key_of(cpu, "program")
    assert compiling.key_of(cpu, "program") == kept
    assert len({kept, compiling.key_of(cpu, "another"), compiling.key_of(two, "program")}) == 3
    monkeypatch.setattr("spo_jax.planning.collectives.__file__", compiling.__file__)
    assert compiling.key_of(cpu, "program") != kept


@pytest.mark.parametrize(
    "script, message",
    [
        ("kill -SEGV $$", "the compiler was ended by SIGSEGV"),
        ("echo 'jax.errors.JaxRuntimeError: INTERNAL: no' >&2; exit 1", "jax.errors.JaxRuntimeError: INTERNAL: no"),
        ("exit 3", "its process ended with code 3"),
    ],
)
def test_a_crash_is_an_answer(tmp_path, monkeypatch, script, message):
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    answer = compiling.compile_program(tiny.get_config(), "cpu", "pool")
    assert (answer.status, answer.message) == ("failed", message)


# ------------------------------------------------------------------------------------------------------------ proposals
def worst_of(sizes, limit):
    """``sizes(config)`` gives a size for each program."""

    def worst(config: ConfigDict):
        program, size = max(sizes(config).items(), key=lambda item: item[1])
        return program, size <= limit, 0

    return worst


def test_knobs_are_turned_for_the_program_that_needs_most_until_all_fit():
    def sizes(config):
        return {
            "score": config.prompts_per_batch * ((config.scorer.chunk or 40) + 9) / 10,
            "update": config.train.minibatch_size * (1 if config.remat else 3),
            "evaluation": config.evaluation.batch_size,
        }

    config = spo_config.get_config()
    _, changed = search(config, 4, worst_of(sizes, limit=25))
    assert changed == {
        "scorer.chunk": 1,
        "remat": True,
        "offload": True,
        "train.minibatch_size": 20,
        "train.accumulation_steps": 2,
        "prompts_per_batch": 20,
        "num_batches": 2000,
    }
    assert config.scorer.chunk == 0, "the config asked about stays as it is"


def test_a_large_rest_is_split_first():
    config = spo_config.get_config()
    _, changed = search(config, 8, lambda c: ("update", c.mesh.fsdp == 8, 80))
    assert changed == {"mesh.fsdp": 8, "mesh.data": 1}


def test_spm_takes_chunks_that_devices_can_split():
    config = spm_config.get_config()
    config.mesh.fsdp = 8
    _, changed = search(config, 8, lambda c: ("update", c.remat and 0 < c.chunk <= 16, 0))
    assert changed == {"remat": True, "chunk": 16}


def test_images_of_evaluation_are_scored_in_pieces_and_then_fewer():
    _, changed = search(
        spo_config.get_config(),
        2,
        lambda c: ("evaluation", c.offload and c.evaluation.batch_size * c.scorer.chunk == 4, 0),
    )
    assert changed == {"scorer.chunk": 1, "offload": True, "evaluation.batch_size": 4}


def test_where_no_knob_is_left_there_is_no_proposal():
    assert search(spo_config.get_config(), 4, lambda c: ("update", False, 0)) is None


def test_a_batch_that_cannot_be_split_is_refused_with_one_that_can():
    with pytest.raises(UserError, match=r"prompts_per_batch = 40 .* 16 devices of v5e:4x4.*prompts_per_batch=160"):
        planner.check(sd15.get_config(), parse_target("v5e:4x4"))


# --------------------------------------------------------------------------------------------------------------- report
class Resident(NamedTuple):
    """Of a run, what is there all the time."""

    resident: dict[str, object]


def test_the_table_says_what_stays_and_what_each_program_needs():
    mesh = make_mesh(1, 8)
    shape = jax.ShapeDtypeStruct((2**20, 2**9), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    run = Resident({"unet": shape, "average": None})
    traffic = Traffic({"all-gather": 1200}, {"all-gather": 3_400_000_000}, unknown_loops=1)
    needs = [
        Need("pool", 2e12, GIB, 2 * GIB, True, traffic, 12.4),
        Need("update", 1e11, GIB // 2, 20 * GIB, False),
    ]
    plan = Plan(run, resident_bytes(run), needs)
    text = table(plan, V5E)
    assert re.search(r"^unet +536\.9 M +0\.12$", text, re.M)
    assert "average" not in text
    assert re.search(
        r"^pool +1\.00 +2\.00 \(13 %\) +2\.00 +1,200 all-gather 3\.4 GB, and loops of unknown length +12 s$", text, re.M
    )
    assert re.search(r"^update +0\.50 +20\.00 \(127 %\), does not fit +0\.10 +- +-$", text, re.M)
    assert verdict(plan, V5E) == "Does not fit: 'update' needs 20.00 of 15.75 GiB."
    assert verdict(Plan(run, {}, needs[:1]), V5E).startswith("Fits: the program 'pool' needs 2.00 of 15.75 GiB, the")
    failed = Plan(run, {}, [Need("pool", 0, 0, 0, False, problem="not known: it crashed")])
    assert verdict(failed, V5E).startswith("Not known: the program 'pool'")
    assert overrides({"remat": True, "mesh.fsdp": 8}) == "--config.remat=True --config.mesh.fsdp=8"


def test_cpu_has_no_limit():
    plan = Plan(Resident({}), {}, [Need("pool", 1.0, GIB, GIB, True)])
    assert plan.fits
    assert "no fixed limit" in verdict(plan, parse_target("cpu"))
