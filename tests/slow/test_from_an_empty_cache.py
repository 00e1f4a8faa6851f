"""The recipes as they are, from an empty cache to a report: models of their layout, but small, from a small server.

    bash launch/test.sh -m slow -n 0 -s tests/slow/test_from_an_empty_cache.py

Only sizes are overridden, and the two files of prompts: their checksums are of texts that are not shipped. Pictures of
a random SDXL differ too little for the recipe's threshold of pairs, so that is overridden as well.
"""

import json
import os
import subprocess
import sys

import pytest

from spo_jax.runs.metrics import read_metrics
from tests.hub_server import files_of, serve
from tests.parity.test_pipeline_sdxl import ONE_LEVEL, save_pipeline
from tests.preference_data import record
from tests.published_models import SDXL, SDXL_VAE, prompts_as_served, repositories
from tests.system.commands import ROOT

pytestmark = pytest.mark.slow

SPO_SIZES = {
    "num_batches": 2,
    "prompts_per_batch": 4,
    "sampling.num_steps": 6,
    "sampling.num_plain_steps": 2,
    "train.minibatch_size": 4,
    "evaluation.num_prompts": 8,
    "evaluation.batch_size": 8,
}
SDXL_SIZES = SPO_SIZES | {"pairs.threshold": 0.0}
SPM_SIZES = {
    "num_steps": 4,
    "train.batch_size": 8,
    "train.warmup_steps": 2,
    "log_every": 2,
    "checkpoint.every": 2,
    "validation.every": 2,
    "validation.num_pairs": 8,
    "validation.batch_size": 8,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    files = dict(repositories())
    _, sdxl = save_pipeline(tmp_path_factory.mktemp("sdxl"), ONE_LEVEL)
    files |= {SDXL: files_of(sdxl), SDXL_VAE: files_of(sdxl / "vae")}
    with serve(files) as server:
        yield server


def start(hub, folder, module, config, sizes, *flags, **environ):
    """The command in ``folder``, where a user would have cloned the project."""
    options = {f"config.{key}": value for key, value in sizes.items()}
    if config.startswith("sd"):
        options |= prompts_as_served(hub.repositories)
    overrides = [f"--{key}={value}" for key, value in options.items()]
    arguments = [sys.executable, "-m", module, f"--config={ROOT}/configs/{config}", *flags, *overrides]
    env = hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=1500)


def prepare_pairs(folder):
    from spo_jax.data.builder import write_split

    (folder / "data").mkdir()
    for split in ("train", "validation_unique"):
        write_split(folder / "data" / "pickapic", split, [record(i) for i in range(24)])


@pytest.mark.parametrize(
    ("config", "sizes", "results"),
    [
        ("sd15.py", SPO_SIZES, ["pytorch_lora_weights.safetensors"]),
        ("sdxl.py", SDXL_SIZES, ["pytorch_lora_weights.safetensors"]),
        ("spm_sd15.py", SPM_SIZES, ["best", "last"]),
    ],
)
def test_from_an_empty_cache_to_a_report(hub, tmp_path, config, sizes, results):
    if config.startswith("spm"):
        prepare_pairs(tmp_path)
    done = start(hub, tmp_path, "spo_jax.main", config, sizes, "--workdir=W")
    print(done.stderr, done.stdout)
    assert done.returncode == 0, done.stderr
    for name in [*results, "report.html", "summary.json", "config.json"]:
        assert (tmp_path / "W" / name).exists(), name
    rows = read_metrics(tmp_path / "W" / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows), rows
    recorded = json.loads((tmp_path / "W" / "config.json").read_text(encoding="utf-8"))
    assert all(len(recorded[key].partition("@")[2]) == 40 for key in ("model", "vae") if recorded[key])


@pytest.mark.parametrize("config", ["sd15.py", "sdxl.py"])
def test_what_is_fetched_is_enough_without_network(hub, tmp_path, config):
    done = start(hub, tmp_path, "spo_jax.fetch", config, {})
    print(done.stderr, done.stdout)
    assert done.returncode == 0, done.stderr
    asked = len(hub.requests)
    done = start(hub, tmp_path, "spo_jax.main", config, SPO_SIZES, "--workdir=W", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "W" / "report.html").exists()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("config", ["sd15.py", "sdxl.py", "sd21.py"])
def test_without_network_nothing_begins(hub, tmp_path, config):
    done = start(hub, tmp_path, "spo_jax.main", config, {}, "--workdir=W", HF_HUB_OFFLINE="1")
    print(done.stderr)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "`python -m spo_jax.fetch --config=" in done.stderr
    assert sorted(os.listdir(tmp_path)) == []
