"""Flags that cannot be understood: one sentence, exit code 2, nothing written; files and values are in tests/system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo_jax import cli
from spo_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = "--config=configs/tiny.py"


def run(code_or_module, *arguments):
    start = ["-c", code_or_module] if " " in code_or_module else ["-m", code_or_module]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def sentence(result):
    """What the user sees, which must be one line and end with exit code 2."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("spo_jax: error: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "--config is missing"),
        ((TINY,), "--workdir is missing"),
        ((TINY, "--workdir="), "--workdir is missing"),
        ((TINY, "--workdir={}", "more"), "Unexpected argument 'more'"),
        ((TINY, "--workdri={}"), "Did you mean: workdir"),
        ((TINY, "--workdir={}", "--config.train.learning_rat=1"), "learning_rate"),
        ((TINY, "--workdir={}", "--config.train=3"), "is not a dict"),
        (("--config=configs/none.py", "--workdir={}", "--config.seed=1"), "configs/none.py"),
    ],
)
def test_mistakes_in_flags(tmp_path, arguments, words):
    workdir = tmp_path / "w"
    assert words in sentence(run("spo_jax.main", *(argument.format(workdir) for argument in arguments)))
    assert not workdir.exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("def get_config(:", "invalid syntax (mine.py, line 1)"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found' (mine.py, line 1)"),
        ("def get_config():\n    return 1 / 0", "division by zero (mine.py, line 2)"),
        ("def get_config():\n    return {'seed': 0}", "returns a ConfigDict"),
        ("seed = 0", "get_config"),
    ],
)
def test_a_config_file_that_makes_no_config(tmp_path, content, words):
    (tmp_path / "mine.py").write_text(content + "\n", encoding="utf-8")
    workdir = tmp_path / "w"
    assert words in sentence(run("spo_jax.main", f"--config={tmp_path / 'mine.py'}", f"--workdir={workdir}"))
    assert not workdir.exists()


@pytest.mark.parametrize("config", ["", ".", "configs/none.py"])
def test_a_config_that_is_no_file(tmp_path, config):
    assert "--config must name a Python file" in sentence(
        run("spo_jax.main", f"--config={config}", f"--workdir={tmp_path / 'w'}")
    )


def test_an_unknown_key_is_quoted_once(tmp_path):
    words = sentence(run("spo_jax.main", TINY, f"--workdir={tmp_path / 'w'}", "--config.trin.x=1"))
    assert "\\" not in words and 'Did you mean "train"' in words


def test_generate_has_the_same_manners(tmp_path):
    assert "Unknown command line flag" in sentence(
        run("spo_jax.generate", f"--out={tmp_path / 'x.png'}", "--promt=fox")
    )
    assert not list(tmp_path.iterdir())


def test_eta_has_no_place_in_a_deterministic_solver(tmp_path):
    flags = ("--solver=dpmpp_2m", "--eta=1", "--prompt=fox", f"--out={tmp_path / 'x.png'}")
    assert "--eta belongs to --solver=ddim" in sentence(run("spo_jax.generate", *flags))


def test_a_programming_error_keeps_its_traceback():
    """Exit code 2 is for the user's mistakes alone; a KeyError of ours must not be taken for one."""
    result = run("from spo_jax import cli; cli.run(lambda: {}['ours'])")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "KeyError: 'ours'" in result.stderr


def test_a_user_error_anywhere_below_main(capsys, monkeypatch):
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main(["command"]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")

    def main():
        raise UserError("Prompt file p.txt is empty; write one prompt a line.")

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "spo_jax: error: Prompt file p.txt is empty; write one prompt a line.\n"


def test_a_full_disk_is_said_in_one_sentence():
    """Writing to this device fails as on a full disk."""
    code = "from spo_jax import cli; from pathlib import Path; cli.run(lambda: Path('/dev/full').write_text('x'))"
    assert "No space left on device" in sentence(run(code))
