"""The wheel: it holds the whole package, and what is installed from it trains outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST = """
import json
import setuptools
from distutils.core import run_setup
build = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
build.ensure_finalized()
print(json.dumps(build.get_outputs(include_bytecode=False)))
"""
SMALL = ("num_batches=2", "prompts_per_batch=8", "evaluation.num_prompts=8", "evaluation.batch_size=8")


def run(arguments, cwd, **environ):
    result = subprocess.run(arguments, cwd=cwd, env=os.environ | environ, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def sources(tmp_path):
    """What a wheel is made of; building leaves files beside it, so it is a copy."""
    folder = tmp_path / "sources"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("spo_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_wheel_has_every_file(sources):
    files = json.loads(run([sys.executable, "-c", LIST], sources).splitlines()[-1])
    files = {Path(file).relative_to("build/lib").as_posix() for file in files}
    package = {path.relative_to(sources).as_posix() for path in (sources / "spo_jax").rglob("*") if path.is_file()}
    configs = {f"spo_jax/configs/{path.name}" for path in (sources / "configs").glob("*.py")}
    assert files == package | configs


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_of_the_checkout(sources, tmp_path):
    """Built and installed without a network: pip sees this environment's packages, but not the checkout."""
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir=.", str(sources)], tmp_path)
    run([sys.executable, "-m", "venv", "--without-pip", "fresh"], tmp_path)
    python = tmp_path / "fresh" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (wheel,) = tmp_path.glob("spo_jax-*.whl")
    run([python, *pip, "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
    shutil.rmtree(sources)

    place = tmp_path / "anywhere"
    place.mkdir()
    where = run([python, "-c", "import spo_jax; print(spo_jax.__file__)"], place, PYTHONPATH="")
    assert Path(where.strip()).is_relative_to(site)
    small = [f"--config.{setting}" for setting in SMALL]
    run([python, "-m", "spo_jax.main", "--config=tiny", "--workdir=run", *small], place, PYTHONPATH="")
    for name in ("pytorch_lora_weights", "kohya_lora_weights"):
        assert (place / "run" / f"{name}.safetensors").stat().st_size > 0
    flags = ["--lora=run", "--prompt=a fox on a teal background", "--out=fox.png"]
    run([python, "-m", "spo_jax.generate", *flags], place, PYTHONPATH="")
    assert (place / "fox.png").is_file()

    shutil.copy(ROOT / "examples" / "pool_step_by_step.ipynb", place)
    execute = "from nbclient.cli import main; main()"
    run([python, "-c", execute, "pool_step_by_step.ipynb"], place, PYTHONPATH="")
    assert (place / "pool.png").is_file()
