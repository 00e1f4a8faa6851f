"""Checkpoints: bits and devices of what is restored, damaged ones, full disks, and a workdir of another config."""

import gc
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from spo_jax.errors import UserError
from spo_jax.runs import checkpoint
from spo_jax.runs.state import TrainState

# When one read fails, orbax drops the others unawaited; they are collected here, not during some later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def make_state(seed, rows=5):
    lora = {"to_q": {"A": jax.random.normal(jax.random.key(seed), (rows, 2)), "B": jnp.full((2, 3), 1 / 3)}}
    optimizer = optax.adamw(1e-3, weight_decay=1e-4)
    updates, opt_state = optimizer.update(lora, optimizer.init(lora), lora)
    return TrainState(jnp.int32(seed), optax.apply_updates(lora, updates), opt_state)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints") / "c"
    manager = checkpoint.make_manager(folder, keep=2)
    for step in (1, 2):
        checkpoint.save(manager, step, make_state(step), {"batch": step})
    checkpoint.close(manager)
    return folder


def restore(folder, template):
    manager = checkpoint.make_manager(folder, keep=2)
    try:
        return checkpoint.restore_latest(manager, template)
    finally:
        checkpoint.close(manager)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bits(tree):
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(tree))]


def test_every_bit_comes_back(written):
    state, extra = restore(written, make_state(0))
    chex.assert_trees_all_equal_structs(state, make_state(2))
    assert bits(state) == bits(make_state(2))
    assert extra == {"batch": 2}


def test_only_the_newest_are_kept_and_a_folder_without_any_gives_none(tmp_path):
    assert restore(tmp_path / "c", make_state(0)) is None
    manager = checkpoint.make_manager(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        checkpoint.save(manager, step, make_state(step), {"batch": step})
    checkpoint.close(manager)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3"}
    assert restore(tmp_path / "c", make_state(0))[1] == {"batch": 3}


def test_unusual_numbers_come_back(tmp_path):
    values = {
        "float32": np.array([np.nan, np.inf, -0.0, 1e-45, 1 / 3], np.float32),
        "bfloat16": jnp.array([1 / 3, -0.0, jnp.inf], jnp.bfloat16),
        "int32": np.array([-(2**31), 2**31 - 1], np.int32),
        "scalar": jnp.uint32(2**32 - 1),
    }
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, values, {})
    checkpoint.close(manager)
    state, extra = restore(tmp_path, jax.tree.map(jnp.zeros_like, values))
    assert bits(state) == bits(values)
    assert extra == {}


def test_arrays_come_back_to_the_devices_of_the_template(tmp_path):
    mesh = make_mesh(-1, 1)
    values = jnp.arange(16.0).reshape(8, 2)
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, {"x": jax.device_put(values, jax.devices()[0])}, {})
    checkpoint.close(manager)
    for sharding in (replicated(mesh), batch_sharding(mesh)):
        state, _ = restore(tmp_path, {"x": jax.device_put(jnp.zeros((8, 2)), sharding)})
        assert state["x"].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(state["x"], values)


def test_sharded_state_goes_from_eight_devices_to_one_to_four(tmp_path):
    values = {"big": jnp.arange(64.0).reshape(16, 4), "step": jnp.int32(3)}

    def placed(tree, count):
        mesh = jax.make_mesh((count,), ("fsdp",), devices=jax.devices()[:count])
        big = jax.NamedSharding(mesh, jax.P("fsdp"))
        return jax.device_put(tree, {"big": big, "step": jax.NamedSharding(mesh, jax.P())})

    state = placed(values, 8)
    for step, count in enumerate((8, 1, 4), start=1):
        if step > 1:
            state, _ = restore(tmp_path, placed(jax.tree.map(jnp.zeros_like, values), count))
        assert len(state["big"].sharding.device_set) == count
        assert bits(state) == bits(values)
        manager = checkpoint.make_manager(tmp_path, keep=1)
        checkpoint.save(manager, step, state, {})
        checkpoint.close(manager)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """What is written is the state at the time of the call, not what the next update makes of its buffers."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"x": jnp.zeros((512, 1024)), "n": jnp.zeros((), jnp.int32)}
    manager = checkpoint.make_manager(tmp_path, keep=9)
    for step in range(1, 4):
        checkpoint.save(manager, step, state, {"n": step})
        for _ in range(20):
            state = advance(state)
    checkpoint.close(manager)
    for step in range(3, 0, -1):
        restored, extra = restore(tmp_path, jax.tree.map(jnp.zeros_like, state))
        assert np.unique(restored["x"]).tolist() == [restored["n"]] == [20 * (step - 1)]
        assert extra == {"n": step}
        shutil.rmtree(tmp_path / str(step))


def test_save_returns_before_the_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, checksum = threading.Event(), zlib.crc32
    monkeypatch.setattr("zlib.crc32", lambda *block: (may_write.wait(), checksum(*block))[1])  # of the last step
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, make_state(1), {})
    assert not (tmp_path / "1").exists()
    may_write.set()
    checkpoint.close(manager)
    assert (tmp_path / "1").is_dir()


@pytest.mark.parametrize("template", [make_state(0, rows=7), {"other": jnp.zeros(3)}], ids=["shape", "structure"])
def test_checkpoint_of_another_model_is_refused_and_stays(written, template):
    before = files(written)
    with pytest.raises(UserError, match=r"Checkpoint .*/2 is intact, but does not fit .*choose another --workdir") as e:
        restore(written, template)
    assert len(str(e.value)) < 500, "a sentence, not the specification of a tensor"
    assert files(written) == before


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGED = [
    *(("extra/metadata", harm) for harm in (cut, flip_one_bit)),
    *(("state/_METADATA", harm) for harm in (cut, flip_one_bit)),
    *(("state/manifest.ocdbt", harm) for harm in (cut, flip_one_bit, lambda path: path.unlink())),
    *(("state/d/*", harm) for harm in (cut, flip_one_bit, lambda path: path.unlink())),
    *(("checksums.json", harm) for harm in (cut, flip_one_bit, lambda path: path.unlink())),
    ("state", shutil.rmtree),
]


@pytest.mark.parametrize("name, harm", DAMAGED)
def test_damaged_checkpoint_is_put_aside_for_the_one_before(written, tmp_path, name, harm, capsys):
    folder = shutil.copytree(written, tmp_path / "c")
    harm(next((folder / "2").glob(name)))
    left = files(folder / "2")
    state, extra = restore(folder, make_state(0))
    assert bits(state) == bits(make_state(1))
    assert extra == {"batch": 1}
    assert capsys.readouterr().err.startswith(f"spo_jax: warning: checkpoint {folder / '2'} is damaged (")
    assert files(folder / "2.damaged") == left, "nothing is destroyed"

    manager = checkpoint.make_manager(folder, keep=2)
    checkpoint.save(manager, 2, make_state(2), {"batch": 2})
    checkpoint.close(manager)
    state, extra = restore(folder, make_state(0))
    assert bits(state) == bits(make_state(2))
    assert capsys.readouterr().err == ""


def test_a_step_can_be_damaged_twice(written, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / "c")
    for _ in range(2):
        shutil.copytree(written / "2", folder / "2", dirs_exist_ok=True)
        cut(folder / "2" / "extra" / "metadata")
        restore(folder, make_state(0))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged", "2.damaged-2"]
    assert "extra/metadata is not what was written); going on from checkpoint 1 instead" in capsys.readouterr().err


def test_if_all_are_damaged_nothing_is_touched(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "c")
    for step in "12":
        cut(folder / step / "state" / "manifest.ocdbt")
    before = files(folder)
    with pytest.raises(
        UserError, match=r"No checkpoint in .* \(2: state/manifest\.ocdbt is not what was written\); move"
    ):
        restore(folder, make_state(0))
    assert files(folder) == before


def test_half_written_checkpoint_is_ignored_and_its_step_can_be_written(written, tmp_path):
    """A checkpoint gets its final name when it is complete; a kill leaves the temporary one."""
    folder = shutil.copytree(written, tmp_path / "c")
    left = shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    (left / "state" / "manifest.ocdbt").unlink()
    assert restore(folder, make_state(0))[1] == {"batch": 2}
    assert not left.exists()
    manager = checkpoint.make_manager(folder, keep=2)
    checkpoint.save(manager, 3, make_state(3), {"batch": 3})
    checkpoint.close(manager)
    state, extra = restore(folder, make_state(0))
    assert bits(state) == bits(make_state(3))
    assert extra == {"batch": 3}


FILL = """
import sys
import jax.numpy as jnp
from absl import logging
from spo_jax.errors import UserError
from spo_jax.runs import checkpoint
logging.set_verbosity(logging.WARNING)
folder, limit = sys.argv[1], int(sys.argv[2])
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
manager = checkpoint.make_manager(folder, keep=9)
try:
    for step in range(1, 9):
        checkpoint.save(manager, step, {"x": jnp.arange(200_000.0) * step}, {"step": step})
        if limit and step == 2:
            manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoint.close(manager)
except UserError as error:
    print(error)
"""


def fill(folder, limit):
    arguments = [sys.executable, "-c", FILL, str(folder), str(limit)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


def last_good(folder, process):
    """The step that the message names, after all checkpoints up to it have been read back."""
    assert process.stderr == "", "one sentence, no traces of the background thread"
    found = re.search(r"the last good checkpoint is (\d)\. .*run the same command again", process.stdout)
    assert found, process.stdout
    step = int(found[1])
    for good in range(step, 0, -1):
        state, extra = restore(folder, {"x": jnp.zeros(200_000)})
        assert extra == {"step": good}
        np.testing.assert_array_equal(state["x"], np.arange(200_000, dtype=np.float32) * good)
        shutil.rmtree(folder / str(good))
    return step


def test_file_that_cannot_grow(tmp_path):
    """The limit of a process stands for a full disk: writing fails in the middle of a file."""
    process = fill(tmp_path / "c", limit=100_000)
    assert "could not be written" in process.stdout
    assert "(File too large)" in process.stdout
    assert last_good(tmp_path / "c", process) == 2


def test_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        process = fill(tmp_path / "c", limit=0)
        assert "(No space left on device)" in process.stdout
        assert last_good(tmp_path / "c", process) >= 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("content", [b'{"seed": ', b"\xff\xfe", b""])
def test_damaged_config_of_a_workdir(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged .*choose another --workdir"):
        checkpoint.check_workdir(tmp_path, {"seed": 0})
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({"a": 1}, {"a": 1, "b": 2}, r"config\.b is only in the new one"),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}, r"config\.a\.y is only in the old one"),
        ({"a": {"x": 1}}, {"a": 1}, r"config\.a was {'x': 1} there and is 1 now"),
        ({"a": None}, {"a": 1.0}, r"config\.a was None there and is 1\.0 now"),
    ],
)
def test_first_difference_between_configs_is_named(tmp_path, old, new, message):
    checkpoint.check_workdir(tmp_path, old)
    with pytest.raises(UserError, match=message):
        checkpoint.check_workdir(tmp_path, new)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == old


def test_what_does_not_change_the_results_may_differ(tmp_path):
    def config(number):
        keys = {"mesh": {"data": number}, "remat": number > 1, "chunk": number, "checkpoint": {"every": number}}
        nested = {"scorer": {"chunk": number}, "data": {"num_workers": number}, "validation": {"batch_size": number}}
        return {"seed": 0, **keys, **nested, "evaluation": {"batch_size": number}}

    checkpoint.check_workdir(tmp_path, config(1))
    checkpoint.check_workdir(tmp_path, config(2))
    newer = config(2) | {"offload": True, "wandb": {"project": "emoji"}}
    checkpoint.check_workdir(tmp_path, newer)
    for change in (
        {"seed": 1},
        {"data": {"num_workers": 1, "train": "x"}},
        {"evaluation": {"batch_size": 1, "eta": 1.0}},
    ):
        with pytest.raises(UserError, match="belongs to a run with another config"):
            checkpoint.check_workdir(tmp_path, newer | change)


def test_config_that_json_writes_differently_is_still_the_same(tmp_path):
    config = {"sizes": (1, 2), "rate": 1e-4, "none": None}
    checkpoint.check_workdir(tmp_path, config)
    checkpoint.check_workdir(tmp_path, config)


@pytest.mark.parametrize(
    "old, same, other, message",
    [
        ({"vae": ""}, {"unet": ""}, {"unet": "u"}, r"config\.unet was '' there and is 'u' now"),
        (
            {"train": {}},
            {"train": {"warmup": "linear"}},
            {"train": {"warmup": "log"}},
            r"config\.train\.warmup was 'linear' there and is 'log' now",
        ),
        (
            {"pairs": {"threshold": 0.3}},
            {"pairs": {"threshold": 0.3, "kind": "best_worst", "timesteps": (0, 1000)}},
            {"pairs": {"threshold": 0.3, "kind": "best_worst", "timesteps": (0, 750)}},
            r"config\.pairs\.timesteps was \[0, 1000\] there and is \[0, 750\] now",
        ),
    ],
)
def test_a_run_from_before_a_key_was_added_goes_on_where_the_key_has_the_old_meaning(
    tmp_path, old, same, other, message
):
    checkpoint.check_workdir(tmp_path / "w", old)
    checkpoint.check_workdir(tmp_path / "w", old | same)
    with pytest.raises(UserError, match=message):
        checkpoint.check_workdir(tmp_path / "w", old | other)


@pytest.mark.parametrize("name", ["tiny", "sd15", "sdxl", "spm_tiny", "spm_sd15", "spm_sdxl"])
def test_a_run_of_a_shipped_config_from_before_the_rooms_goes_on(tmp_path, name):
    recorded = Path(__file__).parents[1] / "golden" / "configs_2026-11-29.json"
    (tmp_path / "config.json").write_text(json.dumps(json.loads(recorded.read_text(encoding="utf-8"))[name]))
    config = importlib.import_module(f"configs.{name}").get_config().to_dict()
    checkpoint.check_workdir(tmp_path, config)
    with pytest.raises(UserError, match="seed was 0 there and is 1 now"):
        checkpoint.check_workdir(tmp_path, config | {"seed": 1})


def test_a_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be made"):
            checkpoint.check_workdir(workdir, {"seed": 0})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
