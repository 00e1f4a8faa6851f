"""What commands share: flags, one sentence for a user's mistake, several processes, quiet logs, a compilation cache."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import itertools
import math
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from spo_jax.errors import UserError, notice
from spo_jax.files import cache_folder
from spo_jax.rng import MAX_SEED


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the flags and calls ``main``; a mistake of the user ends with one sentence and exit code 2."""

    def guarded(_argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        cache = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else cache_folder()
        if cache is not None:
            with contextlib.suppress(OSError):  # a home that is not there, or belongs to others
                cache.mkdir(parents=True, exist_ok=True)
                jax.config.update("jax_compilation_cache_dir", str(cache))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # Small programs too: JAX leaves out what takes less than a second, and of these a start has dozens.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        try:
            main()
        except UserError as error:
            _fail(str(error))
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and not jax.distributed.is_initialized():
                print("spo_jax: stopped; run the same command again to go on.", file=sys.stderr)
                sys.exit(130)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(f"{error.strerror}; free some, and run the same command again to go on.")
            if jax.distributed.is_initialized():
                _fail_among_others(error)
            raise

    for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # so that --help lists what is defined here, too
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=_parse)


def config_flag() -> flags.FlagHolder:
    """Defines --config, a config file or the name of a shipped one; ``config_of`` gives its value."""
    meaning = f"Config file, or a shipped config by its name: {', '.join(shipped_configs())}."
    return config_flags.DEFINE_config_file("config", None, meaning, lock_config=True)


def config_of(flag: flags.FlagHolder) -> ConfigDict:
    """The config behind a ``--config`` flag; UserError if that is missing, or its file makes no ConfigDict."""
    # ml_collections puts a placeholder of its own in the place of a file that cannot be read.
    if not isinstance(flag.value, ConfigDict):
        wrong = (
            "must name a Python file whose get_config() returns a ConfigDict"
            if flag.value is not None
            else "is missing"
        )
        raise UserError(f"--{flag.name} {wrong}; for example --{flag.name}=configs/tiny.py.")
    return flag.value


def shipped_configs() -> dict[str, Path]:
    """The config files that come with the package, by name: of the checkout's ``configs/``, or of the wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def config_path(value: str) -> str:
    """The value of --config with the path of the file that it means; UserError if there is none.

    It is a path, or a shipped config as ``tiny`` or ``configs/tiny.py``, typed in any folder; a file that exists comes
    first. Behind a colon there may be an argument for ``get_config()``: ``sd15:16gb``.
    """
    path, colon, argument = value.partition(":")
    if os.path.exists(path) and not os.path.isdir(path):
        return value
    shipped = shipped_configs()
    name = path.removeprefix("configs/").removesuffix(".py")
    if name not in shipped:
        raise UserError(
            f"--config must name a Python file or a shipped config ({', '.join(shipped)}), and {path!r} is neither."
        )
    return f"{shipped[name]}{colon}{argument}"


def read_config(value: str) -> ConfigDict:
    """The config that ``--config=value`` gives, for use in Python; see ``config_path``. Keys can be set, not added."""
    path, colon, argument = config_path(value).partition(":")
    return runpy.run_path(path)["get_config"](*[argument] if colon else []).lock()


def workdir_of(flag: flags.FlagHolder) -> Path:
    """The folder behind a ``--workdir`` flag; UserError if it is missing or empty."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; for example --{flag.name}=runs/a.")
    return Path(flag.value)


def seed_flag(meaning: str) -> flags.FlagHolder:
    """Defines --seed, in its range."""
    return flags.DEFINE_integer("seed", 0, meaning, lower_bound=0, upper_bound=MAX_SEED)


def side_flag(name: str) -> flags.FlagHolder:
    """Defines --height or --width."""
    meaning = "Of an image, in pixels; what the model was trained for by default."
    return flags.DEFINE_integer(name, None, meaning, lower_bound=1, upper_bound=2**14)


@functools.cache  # one definition for all commands that are imported
def process_flags() -> tuple[flags.FlagHolder, ...]:
    """Defines the flags of a command that several processes can run together."""
    whole = flags.DEFINE_integer
    return (
        flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for a run of several processes."),
        whole("num_processes", None, "How many there are; from SLURM, GKE or the TPU by default, else 1."),
        whole("process_id", None, "Which of them this one is, from 0."),
        whole("initialization_timeout", 300, "Seconds to wait for the others.", lower_bound=1, upper_bound=10**6),
    )


def start_processes() -> None:
    """Joins the other processes of the run, if there are any; before JAX's backend is touched.

    Raises:
      UserError: a process is missing, or what is known of the processes is half there or contradictory.
    """
    from spo_jax.distributed import processes

    *place, timeout = (flag.value for flag in process_flags())
    given = processes.ProcessFlags(*place)
    layout = processes.process_layout(given, os.environ)
    if layout is None and given.num_processes is None:
        layout = processes.tpu_vm_layout(os.environ, timeout)
    if layout is not None:
        processes.initialize(layout, timeout)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        given = _written_out(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False))
        rest = flags.FLAGS(given, known_only=False)
    except UserError as error:
        _fail(str(error))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports an unknown key or a value of the wrong type with Python's own exceptions.
        _fail(
            _unknown_key(argv) or f"{_one_line(error)} (--help lists the flags, docs/commands.md says where keys are)"
        )
    except Exception as error:  # parsing runs the user's config file, in which anything may fail
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
        _fail(f"The config file does not run: {_one_line(error)}{where}; mend it and try again.")
    if len(rest) > 1:
        _fail(f"Unexpected argument {rest[1]!r}; every option is written --name=value.")
    _check_given_once(given)
    for name, value in flags.FLAGS.flag_values_dict().items():
        # The bounds of a flag let a number pass that is none.
        if any(isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
            _fail(f"--{name}={value} must be a finite number.")
    return rest


def _unknown_key(argv: Sequence[str]) -> str | None:
    """What to say of the first key among the flags that their config does not have, if there is one."""
    named = [argument.partition("=")[2] for argument in argv if argument.lstrip("-").startswith("config=")]
    try:
        config = read_config(named[-1]) if named else None
    except Exception:  # of the config file, which is what the user is told then
        return None
    for argument in argv[1:]:
        option, *path = argument.lstrip("-").partition("=")[0].split(".")
        inner = config if option == "config" else None
        for depth, key in enumerate(path):
            if not isinstance(inner, ConfigDict):
                break
            if key not in inner:
                close = difflib.get_close_matches(key, list(inner), 1)
                meant = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(inner)}."
                return f"{'.'.join(('config', *path[:depth]))} has no key {key!r}{meant}"
            inner = inner[key]
    return None


def _written_out(argv: Sequence[str]) -> list[str]:
    """The arguments with ``~`` and the name of a shipped config written out as paths.

    Both in ``--name=value`` and ``--name value``; the texts of prompts stay as they are.
    """
    written, last = [], ""
    for argument in argv:
        named = argument.startswith("-")
        name, equals, value = argument.partition("=") if named else (last, "", argument)
        start, option = argument[: len(argument) - len(value)], name.lstrip("-")
        if value.startswith("~") and option not in ("prompt", "negative_prompt"):
            home = os.path.expanduser(value)
            if home == value and "/" in value:
                raise UserError(f"{name}={value}: there is no such home folder here; write the path out.")
            value = home
        if option == "config" and option in flags.FLAGS and (equals or not named):
            value = config_path(value)
        written.append(start + value)
        last = "" if equals else name
    return written


def _check_given_once(argv: Sequence[str]) -> None:
    """A flag that takes one value has one: of two, absl would take the last without a word.

    Of a config's key the last counts, as scripts let their callers override it; that is said.
    """
    values: dict[str, list[str]] = {}
    arguments = iter(argv[1:])
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        negated = name not in flags.FLAGS  # --noestimate
        flag = flags.FLAGS[name.removeprefix("no") if negated else name]
        if not equals:
            value = ("false" if negated else "true") if flag.boolean else next(arguments)
        if isinstance(flag, flags.MultiFlag):
            continue
        values.setdefault(flag.name, []).append(value)
    for name, several in values.items():
        given = f"--{name} is given {len(several)} times ({', '.join(several)})"
        if len(several) > 1 and name.startswith("config."):
            notice(f"{given}; the last one counts.")
        elif len(several) > 1:
            _fail(f"{given}, but takes one value; leave one.")


def _one_line(error: BaseException) -> str:
    # str() of a KeyError is the repr of its message; ml_collections puts one into another error.
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Traceback (most recent call last)" in text:  # of what get_config raised, as ml_collections puts it
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def _fail_among_others(error: BaseException) -> NoReturn:
    """Ends one process of several after a failure that is no mistake of the user."""
    if "Gloo" in str(error):  # the collectives of CPUs; those of GPUs and TPUs wait, and JAX ends the process
        message = "Another process of the run has ended; its log says why. Start the same command again to go on."
        print(f"spo_jax: error: {message} ({_one_line(error)})", file=sys.stderr)
    else:
        traceback.print_exception(error)
    _leave(1)


def _fail(message: str) -> NoReturn:
    print(f"spo_jax: error: {message}", file=sys.stderr)
    if jax.distributed.is_initialized():
        _leave(2)
    sys.exit(2)


def _leave(code: int) -> NoReturn:
    # The usual exit would wait for the others, who in turn wait for this process in a collective.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
