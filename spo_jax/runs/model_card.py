"""The model card of a run: a ``README.md`` as the Hugging Face hub shows it, so that the folder can be published.

It is made of the summary. Names of models and data become links; of what lies on this machine only the last part of the
path is told. Every value of a config is shown as code on one line, so that it cannot change the page.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ml_collections import ConfigDict

from spo_jax.files import write_text
from spo_jax.formats.hub import PREFIX
from spo_jax.runs.artifacts import artifacts_of, pairs_of
from spo_jax.runs.html import duration
from spo_jax.runs.sources import licence_of, source_of, url_of
from spo_jax.runs.words import Paper


# ---------------------------------------------------------------------------------- what all cards share, in its order
def write_card(path: Path, sections: Sequence[str]) -> None:
    """Writes the sections that are not empty; a card that is there stays, because its owner may have changed it."""
    if not path.exists():
        write_text(path, "\n".join(section for section in sections if section))


def front_matter(base: str, *, relation: str, **fields: str | Sequence[str]) -> str:
    """The YAML at the top, which the hub reads; what is empty or not known is left out."""
    source = source_of(base)
    if source is not None and source.site == "hub":
        fields = {"base_model": source.repo, "base_model_relation": relation, **fields}
    fields = {"license": licence_of(base).identifier, **fields}
    lines = [f"{key}: {literal(x) if isinstance(x, str) else list(x)}" for key, x in sorted(fields.items()) if x]
    return "\n".join(["---", *lines, "---", ""])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""

    def cell(text: str) -> str:
        # A backslash before a pipe would be escaped in the place of the pipe; in code nothing else can part them.
        return text.replace("\\|", "\\ |").replace("|", r"\|")

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def code(value: Any) -> str:
    """A value as Markdown code on one line, whatever is in it."""
    text = _one_line(value) or "(empty)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def shown(name: str) -> str:
    """A model or a file: a link to its page with the commit, or its name without the folders of this machine."""
    source = source_of(name)
    if source is not None:
        inside = f", {code(source.inside)}" if source.inside else ""
        return f"[{source.repo}]({url_of(source)}){inside}, commit `{source.revision[:10]}`"
    return code(local_name(name)) + (", part of `spo_jax`" if is_emoji(name) else ", a local path")


def local_name(name: str) -> str:
    """What is told of a local path; ``tfds:NAME`` and ``emoji:...`` stay what they are."""
    path = PurePath(name.removeprefix("tfds:"))
    return name if ":" in name and not path.is_absolute() else path.name or name


def made_from(config: Mapping[str, Any], notes: Mapping[str, str], *more: tuple[str, str, str]) -> str:
    """What the model was made from: all that the config names, with its licence, and ``more`` rows.

    ``notes`` go on with what the name of a key is for.
    """
    rows = []
    read = ConfigDict(config)
    for artifact in (*artifacts_of(read), *pairs_of(read)):
        source, licence = source_of(artifact.name), licence_of(artifact.name).words
        what = artifact.what + notes.get(artifact.key, "")
        rows.append((what, shown(artifact.name), licence if source is None else f"[{licence}]({url_of(source)})"))
    return "## Made from\n\n" + table(("part", "what", "licence"), (*rows, *more))


def command(module: str, **flags: Any) -> str:
    """A command of this package in a code block; a flag that is None or empty is left out."""
    given = [f"--{name}={shlex.quote(_one_line(x))}" for name, x in flags.items() if x not in (None, "")]
    return "```\n" + " \\\n    ".join([f"python -m spo_jax.{module}", *given]) + "\n```\n"


def ending(summary: Mapping[str, Any], base: str, results: str, limits: str, paper: Paper) -> list[str]:
    """The last sections: how to repeat the run, whose config is recorded, what not to expect of it, whom to cite.

    ``base`` is the base model, ``results`` are what is made with the trained one, ``limits`` begin a sentence.
    """
    again = command("main", config="configs/recorded.py:WORKDIR", workdir="runs/again")
    return [
        f"## Repeat\n\nThe run took {duration(summary['seconds'])} with seed {code(summary['seed'])}. `config.json` "
        "has every setting; a model or file that it names by a local path has to be there. WORKDIR is this folder.\n\n"
        + again,
        "## Limits\n\n"
        f"{limits}, and the biases of the base model stay. The licence of the base model ({licence_of(base).words}), "
        "with its conditions of use, holds for these weights as well, and for the "
        f"{results} that are made with them.\n",
        f"## Citation\n\n```bibtex\n{paper.bibtex}```\n",
    ]


def is_emoji(name: str) -> bool:
    """Whether this is the small model that ships with the package."""
    return name.startswith(PREFIX)


def _one_line(value: Any) -> str:
    # Not printable are line ends of all kinds, control characters and halves of surrogate pairs.
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def literal(value: Any) -> str:
    """A literal of Python and of YAML."""
    return json.dumps(_one_line(value), ensure_ascii=False)
