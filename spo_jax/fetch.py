"""Fetches what a run needs: models, prompts, preference model; what is here already is verified.

    python -m spo_jax.fetch --config=configs/sd15.py            lists, fetches, verifies
    python -m spo_jax.fetch --config=configs/sd15.py --dry_run  lists only; exit code 1 if something is missing

Run the same command again after an interruption: it goes on where it stopped. Everything goes below HF_HOME (by default
~/.cache/huggingface), which may be copied to a machine without network. HF_ENDPOINT and GITHUB_RAW_ENDPOINT name
mirrors, HF_TOKEN opens gated repositories.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax import cli
from spo_jax.data.places import EMOJI_PAIRS, pairs_folder
from spo_jax.formats.download import (
    bytes_to_fetch,
    cache_folder,
    fault_of,
    in_bytes,
    local_path,
    partial_bytes,
    size_of,
)
from spo_jax.runs import artifacts
from spo_jax.runs.artifacts import Stock

CONFIG = cli.config_flag()
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List only what a run needs and what of it is missing.")


def main() -> None:
    """Lists, fetches and verifies; exits with 1 if a dry run finds something missing."""
    config = cli.config_of(CONFIG)
    config = artifacts.with_pins(config, artifacts.look_up(config, {}))
    stocks = artifacts.take_stock(config)
    if not DRY_RUN.value:
        stocks = verified(stocks)
    print(inventory(config, stocks))
    complete = all(stock.complete for stock in stocks)
    known = all(stock.files is not None for stock in stocks)
    if DRY_RUN.value:
        sys.exit(0 if complete and known else 1)
    if not complete:
        artifacts.fetch_missing(stocks)
        print("Fetched and verified. ", end="")
    told = "is here" if known else "is here, as far as can be told without network"
    optional = any(stock.artifact.optional and not stock.complete for stock in stocks)  # was it had just now?
    left_out = optional and not all(stock.complete for stock in artifacts.take_stock(config))
    what = "Everything that a run cannot do without" if left_out else "Everything that lies elsewhere"
    print(f"{what} {told}; no network is needed any more.")


def verified(stocks: Sequence[Stock]) -> list[Stock]:
    """The stocks with what is damaged, by its digest, of the files that are here; it is said."""
    here = [[file for file in stock.files or () if file not in stock.missing] for stock in stocks]
    total = sum(size_of(stock.remote, file) for stock, files in zip(stocks, here, strict=True) for file in files)
    faults: dict[Path, str | None] = {}  # content that several files share is looked at once
    found = []
    with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=None if total else True) as progress:
        for stock, files in zip(stocks, here, strict=True):
            damaged = []
            for file in files:
                content = local_path(stock.remote, file.path).resolve()
                if content not in faults:
                    faults[content] = fault = fault_of(content, file)
                    progress.update(size_of(stock.remote, file))
                    if fault is not None:
                        told = f"{file.path} of {stock.remote.repo} is damaged ({fault}); it is fetched again."
                        progress.write(f"spo_jax: {told}", file=sys.stderr)
                if faults[content] is not None:
                    damaged.append(file)
            found.append(dataclasses.replace(stock, damaged=tuple(damaged)))
    return found


def inventory(config: ConfigDict, stocks: Sequence[Stock]) -> str:
    """What a run of the config reads: names with commits, files, sizes, and what of it is missing."""
    remote = {stock.artifact: stock for stock in stocks}
    lines = []
    for artifact in artifacts.artifacts_of(config):
        stock, title = remote.get(artifact), f"{artifact.what} (config.{artifact.key})"
        if stock is None:
            lines += [f"{title}: local", f"    {artifact.name}"]
            continue
        lines += [f"{title}: {_state(stock)}", f"    {stock.remote}"]
        for file in stock.lacking:
            part = partial_bytes(stock.remote, file)
            size = f"{in_bytes(file.size)}" if file.size >= 0 else "size not known"
            lines.append(f"        {file.path}, {size}" + (f", of it here {in_bytes(part)}" if part else ""))
    for pairs in artifacts.pairs_of(config):  # they are not fetched, because Pick-a-Pic has left the hub
        here = pairs_folder(pairs.name.partition("@")[0]).is_dir()
        makes = "the first run makes them" if pairs.name.startswith(EMOJI_PAIRS) else "make them with spo_jax.prepare"
        state = "here" if here else f"missing; {makes}, as the top of the config file says"
        lines += [f"pairs (config.{pairs.key}): {state}", f"    {pairs.name}"]
    return "\n".join([*lines, _total(stocks)])


def _state(stock: Stock) -> str:
    if stock.files is None:
        state = "here, as far as can be told" if stock.complete else "missing"
        return f"{state}; which files it has is not known ({stock.unreachable})"
    size = sum(size_of(stock.remote, file) for file in stock.files)
    files = f"{len(stock.files)} file{'s' if len(stock.files) > 1 else ''}" + (f", {in_bytes(size)}" if size else "")
    lacking = f"{len(stock.missing)} missing" + (f", {len(stock.damaged)} damaged" if stock.damaged else "")
    return f"{files}, {'here' if stock.complete else lacking}"


def _total(stocks: Sequence[Stock]) -> str:
    """What is to be fetched in all, and where to."""
    lacking = [stock for stock in stocks if not stock.complete]
    if not lacking:
        return "Nothing is missing that would have to be fetched."
    folder = cache_folder(lacking[0].remote)
    room = f"{folder} has {in_bytes(shutil.disk_usage(folder).free)} free"
    if any(stock.files is None for stock in lacking):
        return f"{len(lacking)} of {len(stocks)} are missing; {room}."
    size = bytes_to_fetch([(stock.remote, file) for stock in lacking for file in stock.lacking])
    return f"To fetch: {in_bytes(size)}; {room}."


if __name__ == "__main__":
    cli.run(main)
