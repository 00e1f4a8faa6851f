"""What a config needs from outside: which files, at which commits, what of them is here, and fetching the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from spo_jax.data.prompts import TFDS, place_of
from spo_jax.distributed.agreement import agree_text, everyone
from spo_jax.errors import UserError, notice
from spo_jax.evaluation.metric_places import places_of
from spo_jax.formats import download
from spo_jax.formats.download import RemoteFile, Unreachable, in_bytes
from spo_jax.formats.hub import exists, local, not_here, remote_of, with_strength
from spo_jax.formats.remote import RemoteName

PINS_FILE = "pins.json"

# Keys of configs that name something to read, with what it is for; of a tokenizer no weights are read.
_NAMED = {
    "model": "base model",
    "unet": "UNet, instead of the base model's",
    "vae": "autoencoder, instead of the base model's",
    "scorer.path": "preference model",
    "scorer.init": "CLIP to start from",
    "scorer.tokenizer": "its tokenizer",
    "lora.init": "adapters to start from",
    "prompts": "training prompts",
    "evaluation.prompts": "held-out prompts",
    "evaluation.judge": "CLIP that measures alignment",
    "labels.judge": "CLIP that labels pairs",
    "labels.tokenizer": "its tokenizer",
    "validation.plain": "CLIP to compare with",
}
_PAIRS = {"data.train": "training pairs", "data.validation": "validation pairs"}


class Artifact(NamedTuple):
    """Something that a config names.

    ``key`` is the config's key, ``what`` says what it is for, ``name`` is as the config has it. ``variant`` is that of
    its weight files; without ``weights`` only configs and tokenizers are read. A run does without what is ``optional``.
    """

    key: str
    what: str
    name: str
    variant: str = ""
    weights: bool = True
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Stock:
    """An artifact of the hub or of GitHub, and what is here of it.

    ``files`` are those that are read; None if that is not known, because its server was never asked on this machine,
    and ``unreachable`` then says why it cannot be now. ``missing`` are those of the files that are not here,
    ``damaged`` those that are, but not as they should be.
    """

    artifact: Artifact
    remote: RemoteName
    files: tuple[RemoteFile, ...] | None
    missing: tuple[RemoteFile, ...] = ()
    damaged: tuple[RemoteFile, ...] = ()
    unreachable: str = ""

    @property
    def lacking(self) -> tuple[RemoteFile, ...]:
        """The files to fetch."""
        return self.missing + self.damaged

    @property
    def complete(self) -> bool:
        """Whether it can be read; where its files are not known, whether there is a folder to read from."""
        if self.files is None:
            return self.remote.pinned and download.local_path(self.remote, self.remote.inside).exists()
        return not self.lacking


def artifacts_of(config: ConfigDict) -> list[Artifact]:
    """Everything that a run of the config reads, except pairs of preferences."""
    found = []
    for key, what, name in _named(config, _NAMED):
        if key == "lora.init":
            name, _ = with_strength(name)
        elif key == "scorer.path" and config["scorer"]["fn"]:
            continue
        elif key in ("prompts", "evaluation.prompts"):
            name = place_of(name)
        variant = config["variant"] if key in ("model", "unet", "vae") else ""
        found.append(Artifact(key, what, name, variant, weights=not key.endswith("tokenizer")))
        if key == "model":
            found += [Artifact(key, "its tokenizer", tokenizer, weights=False) for tokenizer in _tokenizers_of(name)]
    names = {artifact.name for artifact in found}
    for metric in config.evaluation.metrics if "evaluation" in config else ():
        for place, weights in places_of(metric):
            if place not in names:
                names.add(place)
                what = f"metric {metric}" if weights else f"vocabulary of metric {metric}"
                found.append(Artifact("evaluation.metrics", what, place, weights=weights, optional=True))
    return found


def pairs_of(config: ConfigDict) -> list[Artifact]:
    """The pairs of preferences that a run of the config reads, which ``spo_jax.prepare`` makes."""
    return [Artifact(*named) for named in _named(config, _PAIRS)]


def _named(config: ConfigDict, keys: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Key, what it is for and value, of the keys that the config has and that name something."""
    for key, what in keys.items():
        value = functools.reduce(lambda keys, part: keys.get(part) or {}, key.split("."), config)
        if value:
            yield key, what, value


def ready(config: ConfigDict, workdir: str | Path) -> tuple[ConfigDict, dict[str, str]]:
    """Makes sure that everything a run reads is on this machine; called by all processes of a run together.

    Returns:
      The config with a commit behind each name of the hub, and the commits that had to be looked up, for ``pins.json``.
      A run that has a workdir takes them from there.

    Raises:
      UserError: something stands for nothing, is not accessible, does not fit the disk, or cannot be fetched.
    """
    pins = json.loads(agree_text(lambda: json.dumps(look_up(config, read_pins(workdir)))))
    config = with_pins(config, pins)
    everyone(lambda: fetch_missing(take_stock(config)))
    return config, pins


def look_up(config: ConfigDict, known: Mapping[str, str]) -> dict[str, str]:
    """The commit of each name of the hub that lacks one, by the name without path: ``{"org/name@main": "0123..."}``.

    ``known`` are commits that the run has settled on. One that cannot be looked up now is left out. What is looked up
    is said. Raises UserError for a name that stands for nothing, here or elsewhere.
    """
    pins: dict[str, str] = {}
    unreachable = False
    for artifact, remote in _remotes(config):
        moving = _repository(remote)
        if remote.pinned or moving in pins:
            continue
        if moving in known:
            pins[moving] = known[moving]
        elif not unreachable:
            try:
                with _named_key(artifact):
                    pins[moving] = download.commit_of(remote)
                notice(f"config.{artifact.key}={artifact.name} is at commit {pins[moving]}.")
            except Unreachable:
                unreachable = True
    return pins


def with_pins(config: ConfigDict, pins: Mapping[str, str]) -> ConfigDict:
    """A copy of the config in which each name of the hub has the commit that ``look_up`` found."""
    config = config.copy_and_resolve_references()
    for artifact, remote in _remotes(config):
        if not remote.pinned and (commit := pins.get(_repository(remote))):
            ((_, _, given),) = _named(config, {artifact.key: ""})
            name = str(dataclasses.replace(remote, revision=commit))
            # Behind the name of adapters their strength may stand.
            config.update_from_flattened_dict({artifact.key: name + given.removeprefix(artifact.name)})
    return config


def read_pins(workdir: str | Path) -> dict[str, str]:
    """The commits that a run in ``workdir`` has settled on; none if there is no run, or it had nothing to look up."""
    path = Path(workdir) / PINS_FILE
    if not path.is_file():
        return {}
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(commit) for name, commit in pins.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"File {path} is damaged ({error}); choose another --workdir.") from error


def take_stock(config: ConfigDict) -> list[Stock]:
    """What is here of each artifact of a config that lies on the hub or on GitHub, in the order of ``artifacts_of``.

    A server is asked where something is missing; without network it tells what can be told from this machine.

    Raises:
      UserError: a repository or file does not exist, or is not accessible, and is not optional.
    """
    stocks, unreachable = [], {"hub": "", "github": ""}  # why, by site
    for artifact, remote in _remotes(config):
        try:
            stocks.append(_stock_of(artifact, remote, unreachable))
        except UserError as error:
            if not artifact.optional:
                raise
            stocks.append(Stock(artifact, remote, None, unreachable=str(error).rstrip(".")))
    return stocks


def _stock_of(artifact: Artifact, remote: RemoteName, unreachable: dict[str, str]) -> Stock:
    """What is here of one artifact; a site that cannot be reached is noted in ``unreachable`` and not asked again."""
    options: dict[str, Any] = {"variant": artifact.variant, "weights": artifact.weights}
    with _named_key(artifact):
        files = download.list_files(remote, network=False, **options) if remote.pinned else None
        all_here = files is not None and all(download.is_here(remote, file) for file in files)
        if not unreachable[remote.site] and not all_here:
            try:
                if not remote.pinned:  # look_up has tried; what a second try finds would be no pin of the run
                    download.commit_of(remote)
                    raise Unreachable("", "its commit could not be looked up")
                files = download.list_files(remote, **options)
            except Unreachable as error:
                unreachable[remote.site] = error.reason
        missing = tuple(file for file in files or () if not download.is_here(remote, file))
    known = None if files is None else tuple(files)
    return Stock(artifact, remote, known, missing, unreachable=unreachable[remote.site])


def fetch_missing(stocks: Sequence[Stock]) -> None:
    """Fetches what is not here, and verifies it; the disk is checked before.

    Raises:
      UserError: a file cannot be had or written, or is not what it should be; or one sentence that names all that is
        out of reach, when the rest is here. Of what is optional a notice tells it.
    """
    lost = [stock for stock in stocks if not stock.complete and stock.unreachable]
    out_of_reach = [stock for stock in lost if not stock.artifact.optional]
    left_out = [(stock, stock.unreachable) for stock in lost if stock.artifact.optional]
    lacking = [stock for stock in stocks if not stock.complete and not stock.unreachable]
    download.check_space([(stock.remote, file) for stock in lacking for file in stock.lacking])

    def size_of(stock: Stock) -> int:
        return sum(max(0, file.size) for file in stock.lacking)

    for stock in sorted(lacking, key=size_of):  # the small ones first: what is wrong with them shows soon
        size = f", {in_bytes(size_of(stock))}" if size_of(stock) else ""
        notice(f"fetching {stock.artifact.what}{size}: {stock.remote}")
        for file in stock.lacking:
            try:
                download.fetch(stock.remote, file, again=file in stock.damaged)
            except UserError as error:
                why = error.reason if isinstance(error, Unreachable) else str(error)
                if stock.artifact.optional:
                    left_out.append((stock, why))
                    break
                if not isinstance(error, Unreachable):
                    raise
                left = [s for s in lacking if not all(download.is_here(s.remote, f) for f in s.missing)]
                raise UserError(missing_sentence([*out_of_reach, *left], why)) from error
    if out_of_reach:
        raise UserError(missing_sentence(out_of_reach, out_of_reach[0].unreachable))
    for stock, why in left_out:
        what = dataclasses.replace(stock.remote, sha256="")
        notice(
            f"config.{stock.artifact.key}: {stock.artifact.what} cannot be had ({what}: {why}); a run leaves it out."
        )


def missing_sentence(stocks: Sequence[Stock], why: str) -> str:
    """One sentence that names all that is missing and the command that fetches it."""
    named = [(stock.artifact.key, dataclasses.replace(stock.remote, sha256="")) for stock in stocks]
    names = ", ".join(f"config.{key} ({remote})" for key, remote in named)
    return f"Missing here, and out of reach ({why}): {names}; with network, `{fetch_command()}` fetches all of it."


def fetch_command() -> str:
    """The command that fetches what this process was started for."""
    flags: list[str] = []
    for before, argument in zip(sys.argv, sys.argv[1:], strict=False):
        is_value = before in flags and "=" not in before and not argument.startswith("-")  # --config FILE
        if is_value or (argument.startswith("-") and argument.lstrip("-").startswith("config")):
            flags.append(argument)
    return shlex.join(["python", "-m", "spo_jax.fetch", *(flags or ["--config=..."])])


# ------------------------------------------------------------------------------------------------------------ pieces
def _remotes(config: ConfigDict) -> list[tuple[Artifact, RemoteName]]:
    """The artifacts that are not here and do not ship with the package, with their parsed names."""
    found = []
    for artifact in artifacts_of(config):
        if not artifact.name.startswith(TFDS) and not exists(artifact.name):
            with _named_key(artifact):
                if (remote := remote_of(artifact.name)) is None:
                    raise UserError(not_here(artifact.name))
            found.append((artifact, remote))
    return found


@contextlib.contextmanager
def _named_key(artifact: Artifact) -> Iterator[None]:
    """Puts the config's key before the sentence of a UserError."""
    try:
        yield
    except Unreachable:
        raise
    except UserError as error:
        raise UserError(f"config.{artifact.key}: {error}") from error


def _tokenizers_of(model: str) -> list[str]:
    """Names of the tokenizers that go with a model, if it is a single file that is here."""
    if not exists(model) or not local(model).is_file():
        return []
    from spo_jax.formats.single_file import tokenizers_of  # which imports the networks

    return tokenizers_of(local(model))


def _repository(remote: RemoteName) -> str:
    return str(dataclasses.replace(remote, inside="", sha256=""))
