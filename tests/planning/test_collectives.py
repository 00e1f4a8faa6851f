"""Collectives counted in the text of compiled programs: on CPU devices, and as TPUs and GPUs write them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.distributed.mesh import make_mesh
from spo_jax.planning.collectives import Traffic, collectives


def compiled(function, *arguments, out):
    """The text of ``function`` on eight devices; each argument is (shape, PartitionSpec)."""
    mesh = make_mesh(1, 8)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, spec in arguments
    ]
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(*out))).lower(*shapes).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce_of_its_size():
    text = compiled(lambda x: x.sum(axis=0), ((64, 32), ("fsdp",)), out=())
    assert collectives(text) == Traffic({"all-reduce": 1}, {"all-reduce": 32 * 4})


def test_a_split_weight_is_gathered_whole():
    text = compiled(lambda x, w: x @ w, ((64, 128), ("fsdp",)), ((128, 256), (None, "fsdp")), out=("fsdp",))
    assert collectives(text) == Traffic({"all-gather": 1}, {"all-gather": 128 * 256 * 4})


def test_nothing_is_said_where_rows_stay_apart():
    assert collectives(compiled(lambda x: jnp.tanh(x) * 2, ((64, 32), ("fsdp",)), out=("fsdp",))) == Traffic({}, {})


@pytest.mark.parametrize("rounds", [3, 7])
def test_a_scan_counts_once_for_each_round(rounds):
    def function(x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c + c.sum()), None), x, None, length=rounds)[0]

    traffic = collectives(compiled(function, ((64,), ("fsdp",)), out=("fsdp",)))
    assert traffic == Traffic({"all-reduce": rounds}, {"all-reduce": 4 * rounds})


def test_a_loop_that_ends_by_its_data_counts_one_round_and_is_reported():
    def function(x):
        return jax.lax.while_loop(lambda c: c[0] < 10.0, lambda c: c + c.sum(), x)

    traffic = collectives(compiled(function, ((64,), ("fsdp",)), out=("fsdp",)))
    assert traffic.unknown_loops == 1
    assert 1 <= traffic.counts["all-reduce"] <= 2, "the body's, and maybe the condition's"


def test_the_dearer_branch_of_a_conditional_counts():
    def function(x, flag):
        return jax.lax.cond(flag[0] > 0, lambda x: x + x.sum(), lambda x: x * x.sum(axis=0), x)

    traffic = collectives(compiled(function, ((64, 32), ("fsdp",)), ((1,), ()), out=("fsdp",)))
    assert traffic == Traffic({"all-reduce": 1}, {"all-reduce": 32 * 4})


# Shortened from the text of a program for v5e:2x4.
TPU = """HloModule jit_step
%fused_start (param_0: bf16[512,4096]) -> (bf16[512,4096], bf16[4096,4096], u32[]) {
  %param_0 = bf16[512,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[4096,4096]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=3, dimensions={0}
  ROOT %custom-call.1 = (bf16[4096], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (param_0: bf16[512,4096]) -> bf16[512,4096] {
  %param_0 = bf16[512,4096]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.2 = bf16[4096,4096]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=3, dimensions={0}
  ROOT %slice.1 = bf16[512,4096]{1,0} slice(%all-gather.2), slice={[0:512], [0:4096]}
}
%all-reduce-scatter (input: f32[4096,8]) -> f32[512,8] {
  %input = f32[4096,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.8 = f32[4096,8]{1,0:T(8,128)} all-reduce(%input), channel_id=10, to_apply=%add.1
  ROOT %dynamic-slice.12 = f32[512,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.8, %zero, %zero)
}
%body (param: (s32[], f32[4096,8])) -> (s32[], f32[4096,8]) {
  %param = (s32[]{:T(128)}, f32[4096,8]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.1 = f32[4096,8]{1,0:T(8,128)} get-tuple-element(%param), index=1
  %fusion.2 = f32[512,8]{1,0:T(8,128)} fusion(%get-tuple-element.1), kind=kCustom, calls=%all-reduce-scatter
  %fusion.3 = bf16[512,4096]{1,0} fusion(%get-tuple-element.1), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[4096,8]{1,0:T(8,128)}) tuple(%get-tuple-element.1)
}
%condition (param.1: (s32[], f32[4096,8])) -> pred[] {
  %constant.52 = s32[]{:T(128)} constant(5)
  %param.1 = (s32[]{:T(128)}, f32[4096,8]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %lt.17 = pred[]{:T(512)} compare(%get-tuple-element.2, %constant.52), direction=LT
}
ENTRY %main (p.0: bf16[512,4096], p.1: f32[4096,8]) -> bf16[512,4096] {
  %p.0 = bf16[512,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = f32[4096,8]{1,0:T(8,128)} parameter(1)
  %tuple.2 = (s32[]{:T(128)}, f32[4096,8]{1,0:T(8,128)}) tuple(%p.1)
  %while.39 = (s32[]{:T(128)}, f32[4096,8]{1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  %async-collective-start = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) fusion(%p.0), calls=%fused_start
  ROOT %fusion.1 = bf16[512,4096]{1,0} fusion(%p.0), kind=kOutput, calls=%async_collective_fusion.1
}
"""


def test_the_pieces_of_an_overlapped_collective_on_a_tpu_count_once_and_loops_are_read_from_their_conditions():
    counts = {"all-gather": 1, "reduce-scatter": 5}
    assert collectives(TPU) == Traffic(counts, {"all-gather": 4096 * 4096 * 2, "reduce-scatter": 5 * 4096 * 8 * 4})


def test_layers_that_are_traced_once_share_a_channel_and_each_counts():
    start = TPU[TPU.index("%fused_start") : TPU.index("%async_collective_fusion.1 (")]
    again = "  %again = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) fusion(%p.0), calls=%other_start\n"
    text = TPU.replace(start, start + start.replace("%fused_start", "%other_start"))
    text = text.replace("  ROOT %fusion.1", again + "  ROOT %fusion.1")
    assert collectives(text).counts["all-gather"] == 2


# In the form in which GPUs and TPUs have them.
ASYNC = """HloModule jit_step
%wrapped (param: f32[64,8]) -> f32[8,8] {
  %param = f32[64,8]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[8,8]{1,0} reduce-scatter(%param), channel_id=1, dimensions={0}, to_apply=%add
}
ENTRY %main (p: f32[8,8], q: f32[64,8]) -> f32[64,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[64,8]{1,0} parameter(1)
  %all-gather-start = (f32[8,8]{1,0}, f32[64,8]{1,0}) all-gather-start(%p), channel_id=2, dimensions={0}
  %async-start = ((f32[64,8]{1,0}), f32[8,8]{1,0}) async-start(%q), calls=%wrapped
  %permute = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1}}
  %permuted = f32[8,8]{1,0} collective-permute-done(%permute)
  %async-done = f32[8,8]{1,0} async-done(%async-start), calls=%wrapped
  %all-reduce-start = f32[8,8]{1,0} all-reduce-start(%p), channel_id=3, to_apply=%add
  %all-reduce-done = f32[8,8]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %all-gather-done = f32[64,8]{1,0} all-gather-done(%all-gather-start)
}
"""


def test_a_start_and_its_done_count_once():
    sizes = {"all-reduce": 256, "all-gather": 2048, "reduce-scatter": 2048, "collective-permute": 256}
    assert collectives(ASYNC) == Traffic(dict.fromkeys(sizes, 1), sizes)
