"""Flags that cannot be understood: one sentence, exit code 2, nothing written; files and values are in tests/system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

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


@pytest.mark.parametrize("command", ["main", "plan", "fetch"])
def test_a_config_that_is_not_there(tmp_path, command):
    words = sentence(run(f"spo_jax.{command}", "--config=configs/none.py"))
    assert "--config must name a Python file or a shipped config" in words and "'configs/none.py' is neither" in words
    assert all(path.stem in words for path in (ROOT / "configs").glob("*.py"))


class Parser:
    """The flags of a command of its own, parsed in this process as ``cli.run`` does it."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments):
        """The values of the flags."""
        values, argv = flags.FlagValues(), ["command", *arguments]
        self._monkeypatch.setattr(cli.flags, "FLAGS", values)
        config_flags.DEFINE_config_file("config", None, lock_config=True, sys_argv=argv, flag_values=values)
        for name in ("out", "prompts_file", "negative_prompt"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        flags.DEFINE_multi_string("prompt", [], "", flag_values=values)
        flags.DEFINE_bool("confirm", True, "", flag_values=values)
        flags.DEFINE_float("scale", 1.0, "", lower_bound=0.0, upper_bound=9.0, flag_values=values)
        self._monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: flags_parser(argv))
        cli.run(lambda: None)
        return values

    def refused(self, *arguments):
        """The sentence."""
        with pytest.raises(SystemExit) as stop:
            self(*arguments)
        error = self._capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("spo_jax: error: ") and len(error.splitlines()) == 1
        return error


@pytest.fixture
def parse(monkeypatch, capsys):
    return Parser(monkeypatch, capsys)


@pytest.mark.parametrize("value", ["tiny", "tiny.py", "configs/tiny.py", str(ROOT / "configs" / "tiny.py")])
@pytest.mark.parametrize("as_two", [False, True])
def test_a_shipped_config_is_named_in_any_folder(parse, monkeypatch, tmp_path, value, as_two):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # such as a --workdir: a folder is no config file
    config = parse(*(("--config", value) if as_two else (f"--config={value}",)), "--config.seed=7")["config"].value
    assert (config.model, config.seed) == ("emoji:model", 7)


def test_a_shipped_config_takes_an_argument(parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    full, small = (parse(f"--config={value}")["config"].value for value in ("sd15", "sd15:16gb"))
    assert small.prompts_per_batch < full.prompts_per_batch
    assert parse("--config=configs/sd15.py:16gb")["config"].value.to_dict() == small.to_dict()


def test_a_config_is_read_in_python_as_by_the_flag(parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = cli.read_config("sd15:16gb")
    assert config.to_dict() == parse("--config=sd15:16gb")["config"].value.to_dict()
    with pytest.raises(AttributeError):
        config.no_such_key = 1
    with pytest.raises(UserError, match="'sd16' is neither"):
        cli.read_config("sd16")


def test_every_shipped_config_has_a_name():
    assert set(cli.shipped_configs()) == {path.stem for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize("value", ["tiny", "configs/tiny.py"])
def test_a_file_that_exists_comes_before_a_shipped_config(parse, monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    text = (ROOT / "configs" / "tiny.py").read_text(encoding="utf-8").replace("c.num_batches = 60", "c.num_batches = 7")
    (tmp_path / value).write_text(text, encoding="utf-8")
    assert parse(f"--config={value}")["config"].value.num_batches == 7


@pytest.mark.parametrize("value", ["", ".", "tin", "mine/tiny.py", "configs/tiny.txt", "../configs/tiny.py"])
def test_what_is_no_file_and_no_shipped_config(parse, monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    assert f"{value!r} is neither" in parse.refused(f"--config={value}")


@pytest.mark.parametrize("override", ["trin.x=1", "trin=1", "train.learning_rat=1", "sampling.num_stepz=3"])
def test_an_unknown_key_is_quoted_once(parse, override):
    words = parse.refused(TINY, f"--config.{override}")
    assert "\\" not in words and "'\"" not in words and "did you mean" in words and "has no key" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out=a.png", "--out=b.png"), "--out is given 2 times (a.png, b.png), but takes one value"),
        (("--out", "a.png", "-out=a.png"), "--out is given 2 times (a.png, a.png)"),
        (("--noconfirm", "--confirm"), "--confirm is given 2 times (false, true)"),
        (("--scale=1", "--prompt=x", "--scale", "2"), "--scale is given 2 times (1, 2)"),
        ((TINY, "--config=configs/sd15.py"), "--config is given 2 times"),
    ],
)
def test_a_flag_with_one_value_is_given_once(parse, arguments, words):
    assert words in parse.refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words", "seed", "remat"),
    [
        (("--config.seed=1", "--config.seed=2"), "--config.seed is given 2 times (1, 2)", 2, False),
        (("--config.remat", "--noconfig.remat", "--config.remat"), "--config.remat is given 3 times", 0, True),
    ],
)
def test_the_last_value_of_a_config_key_counts_and_is_said(parse, capsys, arguments, words, seed, remat):
    config = parse(TINY, *arguments)["config"].value
    assert (config.seed, config.remat) == (seed, remat)
    error = capsys.readouterr().err
    assert words in error and "the last one counts" in error


def test_flags_of_several_values_and_values_that_look_like_flags(parse):
    values = parse("--prompt=--out=x", "--prompt", "--out", "--prompt=b", "--out=y", TINY, "--config.seed=1")
    assert values["prompt"].value == ["--out=x", "--out", "b"] and values["out"].value == "y"


def test_a_file_of_flags_counts(parse, tmp_path):
    (tmp_path / "flags").write_text("--out=a\n", encoding="utf-8")
    assert "--out is given 2 times (a, b)" in parse.refused(f"--flagfile={tmp_path / 'flags'}", "--out=b")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "10"])
def test_a_number_of_a_flag_is_finite_and_in_its_range(parse, value):
    words = parse.refused(f"--scale={value}")
    assert f"--scale={value}" in words and ("a finite number" in words or "[0.0, 9.0]" in words)


def test_the_home_is_written_out_but_not_in_a_prompt(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path / "mine.py")
    texts = ("--prompt=~/a", "--negative_prompt=~")
    values = parse("--config=~/mine.py", "--config.model=~/m", "--out=~/x.png", "--prompts_file=a~b", *texts)
    assert values["out"].value == f"{tmp_path}/x.png" and values["config"].value.model == f"{tmp_path}/m"
    assert values["prompts_file"].value == "a~b"
    assert (values["prompt"].value, values["negative_prompt"].value) == (["~/a"], "~")
    values = parse("--out", "~/x.png", "--prompt", "~/a", "--negative_prompt", "~/b")
    assert (values["out"].value, values["prompt"].value) == (f"{tmp_path}/x.png", ["~/a"])
    assert values["negative_prompt"].value == "~/b"
    assert "--out=~nobody_here/x.png: there is no such home folder" in parse.refused("--out=~nobody_here/x.png")


def test_a_user_without_a_home_or_a_name(tmp_path):
    """As in a container that runs under any user id; every command starts with the same lines."""
    code = (
        "import os, pwd, sys\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown; os.environ.pop('HOME', None)\n"
        "assert os.path.expanduser('~') == '~'\n"
        "import jax; from spo_jax import cli\n"
        "cli.run(lambda: print(jax.config.jax_compilation_cache_dir))"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in unset} | {"PYTHONPATH": str(ROOT)}
    for home, kept in ((None, "None"), ("/proc/nobody", "None"), (str(tmp_path / "home"), "home/.cache/spo_jax")):
        program = code if home is None else code.replace("os.environ.pop('HOME', None)", "0").replace("== '~'", "")
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=env | ({} if home is None else {"HOME": home}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0 and result.stdout.strip().endswith(kept), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


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
