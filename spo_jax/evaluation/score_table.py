"""Scores of images as a table: ``scores.csv``, one row an image, which anyone may recompute the numbers from.

While an evaluation goes on, rows are appended, also several with other metrics for one image; what was interrupted goes
on from there. When all is scored the file is written whole, a row an image, in order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spo_jax.errors import UserError
from spo_jax.files import saying_where, write_text

COLUMNS = ("model", "prompt_id", "seed", "prompt")


class ScoreTable(NamedTuple):
    """All scores of an evaluation.

    Attributes:
      models: names, that of the model compared against first.
      metrics: names.
      prompts: texts; the i-th has ``prompt_id`` i.
      seeds: numbers, the same for all prompts and models.
      scores: float32 [models, metrics, prompts, seeds], finite; higher is better.
    """

    models: tuple[str, ...]
    metrics: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: np.ndarray


class Row(NamedTuple):
    """Scores of one image by metric, not necessarily of all of them."""

    model: str
    prompt_id: int
    seed: int
    prompt: str
    scores: Mapping[str, float]


def number_text(value: float) -> str:
    """The shortest decimal that reads back to the same float32."""
    single = np.float32(value)
    text = str(single)
    # A decimal is read as a double first; if that ever rounds to another float32, all digits are written.
    return text if np.float32(float(text)) == single or not np.isfinite(single) else repr(float(single))


def open_rows(path: str | Path, metrics: Sequence[str]) -> tuple[tuple[str, ...], list[Row]]:
    """Makes ``path`` ready for ``append_rows``, and says what it holds already.

    It is made if it is not there. If it lacks some of ``metrics``, or an interruption left half a row at its end, it
    is written anew, whole.

    Returns:
      The metrics that it has columns for, first those that it had; and its rows.

    Raises:
      UserError: the file is no table of scores, or cannot be written.
    """
    path = Path(path)
    with saying_where(path):
        header, rows, torn = _rows_of(path) if path.exists() else ((), [], True)
        names = tuple(dict.fromkeys([*header, *metrics]))
        if torn or names != header:
            write_text(path, _lines([[*COLUMNS, *names], *(_cells(row, names) for row in rows)]))
    return names, rows


def append_rows(path: str | Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    """Adds rows at the end of a file that ``open_rows`` has made ready.

    A row needs not have all metrics: metrics may be computed one after the other, each with rows of its own.

    Args:
      path: of the file.
      names: the metrics that ``open_rows`` returned.
      rows: of images that were scored since.
    """
    with saying_where(path), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(_lines(_cells(row, names) for row in rows))


def read_rows(path: str | Path) -> tuple[tuple[str, ...], list[Row]]:
    """Metrics and rows of a file that may be unfinished; half a row at its end is left out.

    Raises:
      UserError: it is not there, has no such columns, or a cell is no number.
    """
    return _rows_of(Path(path))[:2]


def _rows_of(path: Path) -> tuple[tuple[str, ...], list[Row], bool]:
    """See ``read_rows``; and whether half a row was left out."""
    header, lines, torn = _read(path, ours=True)
    if tuple(header[:4]) != COLUMNS:
        raise UserError(f"{path} begins with the columns {header[:4]}, a table of scores with {list(COLUMNS)}.")
    metrics = tuple(header[4:])
    rows = []
    for line, cells in lines:
        scores = {name: _float(path, line, name, cells[name]) for name in metrics if cells[name]}
        prompt_id, seed = (_whole(path, line, name, cells[name]) for name in ("prompt_id", "seed"))
        rows.append(Row(cells["model"], prompt_id, seed, cells["prompt"], scores))
    return metrics, rows, torn


def scored(rows: Iterable[Row]) -> set[tuple[str, int, int, str]]:
    """What is done already, as ``(model, prompt_id, seed, metric)``, for going on after an interruption."""
    return {(row.model, row.prompt_id, row.seed, name) for row in rows for name in row.scores}


def make_table(
    rows: Iterable[Row],
    metrics: Sequence[str],
    *,
    models: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    source: str = "the scores",
) -> ScoreTable:
    """Puts rows in order and makes sure that each image has each metric once.

    Args:
      rows: in any order; several for one image are put together if they have other metrics.
      metrics: names of those that are wanted; scores of others are left out.
      models: expected names in order; by default those of the rows, in the order of their first rows.
      prompts: expected texts; by default those of the rows.
      seeds: expected numbers in order; by default those of the rows, in rising order.
      source: named in messages, such as the path of the file.

    Raises:
      UserError: rows are missing, too many, of an unknown model, prompt or seed, say another prompt, or a score is not
        finite.
    """
    rows = list(rows)
    if not rows or not metrics:
        raise UserError(f"{source} holds no {'scores of a metric' if rows else 'rows'}; score images first.")
    models = list(dict.fromkeys(row.model for row in rows)) if models is None else list(models)
    texts = _texts(rows, source) if prompts is None else dict(enumerate(prompts))
    seeds = sorted({row.seed for row in rows}) if seeds is None else list(seeds)
    shape = (len(models), len(metrics), len(texts), len(seeds))
    values, known = np.full(shape, np.nan), np.zeros(shape, bool)
    places = [{name: i for i, name in enumerate(names)} for names in (models, metrics, seeds)]
    for row in rows:
        _check_place(row, models, texts, seeds, source)
        for name, score in row.scores.items():
            if name not in places[1]:
                continue
            place = (places[0][row.model], places[1][name], row.prompt_id, places[2][row.seed])
            if known[place]:
                raise UserError(f"{source} has {name} of {_image(row)} twice; remove one of the rows.")
            if not _is_finite(score):
                raise UserError(
                    f"{source} has {score} as {name} of {_image(row)}, which is not a finite number; score it again."
                )
            values[place], known[place] = score, True
    if not known.all():
        model, metric, prompt, seed = np.argwhere(~known)[0]
        missing, images = int((~known).sum()), known.size // len(metrics)
        raise UserError(
            f"{source} lacks {missing} of {known.size} scores ({images} images of {len(models)} models, {len(texts)} "
            f"prompts and {len(seeds)} seeds), the first {metrics[metric]} of model {models[model]}, prompt {prompt}, "
            f"seed {seeds[seed]}; score what is missing, or leave that model, prompt or seed out."
        )
    return ScoreTable(
        tuple(models),
        tuple(metrics),
        tuple(texts[i] for i in range(len(texts))),
        tuple(seeds),
        values.astype("float32"),
    )


def read_table(
    path: str | Path,
    *,
    models: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> ScoreTable:
    """Reads a finished ``scores.csv``, see ``make_table`` for the arguments and for what is refused."""
    metrics, rows = read_rows(path)
    return make_table(rows, metrics, models=models, prompts=prompts, seeds=seeds, source=str(path))


def write_table(path: str | Path, table: ScoreTable) -> None:
    """Writes a table whole: a row an image, by model, prompt and seed."""
    rows = (_cells(row, table.metrics) for row in table_rows(table))
    with saying_where(path):
        write_text(path, _lines([[*COLUMNS, *table.metrics], *rows]))


def table_rows(table: ScoreTable) -> Iterable[Row]:
    """The rows of a table, by model, prompt and seed."""
    for i, model in enumerate(table.models):
        for number, prompt in enumerate(table.prompts):
            for j, seed in enumerate(table.seeds):
                yield Row(
                    model, number, seed, prompt, dict(zip(table.metrics, table.scores[i, :, number, j], strict=True))
                )


def import_scores(
    path: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> ScoreTable:
    """Reads scores that another program computed.

    Args:
      path: a CSV file in UTF-8 with a header, columns in any order: ``model``; ``prompt_id`` (counted from 0) or
        ``prompt``, or both; ``seed``, which may be missing if each prompt has one image; and scores, higher is better.
      metrics: columns with scores; by default all other columns.
      models: their order, the one compared against first; by default that of the file.
      prompts: their texts in order. By default they are numbered as they appear, and one that has only a number is
        called "prompt 7".
      seeds: their numbers; by default those of the file.

    Raises:
      UserError: a column is missing or holds no numbers, or see ``make_table``.
    """
    path = Path(path)
    header, lines, _ = _read(path, ours=False)
    if "model" not in header or not {"prompt_id", "prompt"} & set(header):
        raise UserError(f"{path} has the columns {header}; scores need model, and prompt_id or prompt.")
    names = [name for name in header if name not in COLUMNS] if metrics is None else list(metrics)
    unknown = [name for name in names if name not in header]
    if unknown or not names:
        raise UserError(f"{path} has no column {unknown[0] if unknown else 'with scores'}, only {header}.")
    numbers: dict[str, int] = {}
    for i, prompt in enumerate(prompts or ()):
        if numbers.setdefault(prompt, i) != i and "prompt_id" not in header:
            raise UserError(f"{path} names prompts by their text, but two of them are {prompt!r}; add prompt_id.")
    rows = []
    for line, cells in lines:
        prompt = cells.get("prompt") or ""
        if "prompt_id" in header:
            number = _whole(path, line, "prompt_id", cells["prompt_id"])
        elif prompts is None:
            number = numbers.setdefault(prompt, len(numbers))
        elif prompt in numbers:
            number = numbers[prompt]
        else:
            raise UserError(f"{path}, line {line}: {prompt!r} is none of the {len(prompts)} prompts.")
        if "prompt" not in header:
            prompt = prompts[number] if prompts is not None and 0 <= number < len(prompts) else f"prompt {number}"
        seed = _whole(path, line, "seed", cells["seed"]) if "seed" in header else 0
        scores = {name: _float(path, line, name, cells[name]) for name in names}
        rows.append(Row(cells["model"], number, seed, prompt, scores))
    return make_table(rows, names, models=models, prompts=prompts, seeds=seeds, source=str(path))


def _image(row: Row) -> str:
    return f"model {row.model}, prompt {row.prompt_id}, seed {row.seed}"


def _texts(rows: Sequence[Row], source: str) -> dict[int, str]:
    """Texts of prompts by number, which have to be all from 0."""
    texts = {row.prompt_id: row.prompt for row in rows}
    gap = next((i for i in range(len(texts)) if i not in texts), None)
    if gap is not None:
        raise UserError(
            f"{source} has no rows of prompt {gap}, but some of {max(texts)}; prompts are counted from 0 without a gap."
        )
    return texts


def _check_place(row: Row, models: Sequence[str], texts: Mapping[int, str], seeds: Sequence[int], source: str) -> None:
    """Raises UserError for a row that belongs nowhere."""
    if row.model not in models:
        raise UserError(f"{source} has scores of model {row.model!r}, which is none of {', '.join(models)}.")
    if row.prompt_id not in texts:
        raise UserError(f"{source} has scores of prompt {row.prompt_id}, but there are {len(texts)}, counted from 0.")
    if row.seed not in seeds:
        raise UserError(f"{source} has scores of {_image(row)}, but the seeds are {', '.join(map(str, seeds))}.")
    if row.prompt != texts[row.prompt_id]:
        raise UserError(
            f"{source} says {row.prompt!r} in a row of {_image(row)}, but prompt {row.prompt_id} is "
            f"{texts[row.prompt_id]!r}; these scores are of another list of prompts."
        )


def _read(path: Path, ours: bool) -> tuple[list[str], list[tuple[int, dict[str, str]]], bool]:
    """Header, each row with its line, and whether half a row at the end was left out, as files of ours may have it."""
    try:
        data = path.read_bytes()
        torn = ours and not data.endswith(b"\n")
        text = data[: data.rfind(b"\n") + 1 if torn else None].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a CSV file in UTF-8 ({error}).") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        lines.extend((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        if not (ours and lines and "end of data" in str(error)):  # the file may end within a prompt of several lines
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error
        torn = True
    header = [name.strip() for name in lines[0][1]] if lines else []
    if not header or len(set(header)) < len(header):
        raise UserError(f"{path} has {'a column twice' if header else 'no header'}; its first line names the columns.")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; mend the row.")
        rows.append((line, dict(zip(header, cells, strict=True))))
    return header, rows, torn


def _is_finite(score: float) -> bool:
    """As a float32: the shortest text of its largest number is a little above it."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(score)))


def _float(path: Path, line: int, name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{path}, line {line}: {cell!r} under {name} is not a number.") from None


def _whole(path: Path, line: int, name: str, cell: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise UserError(f"{path}, line {line}: {cell!r} under {name} is not a whole number.") from None


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    scores = (number_text(row.scores[name]) if name in row.scores else "" for name in metrics)
    return [row.model, str(row.prompt_id), str(row.seed), row.prompt, *scores]


def _lines(rows: Iterable[Sequence[str]]) -> str:
    """CSV. Not by ``csv.writer``, which before Python 3.13 leaves a lone carriage return bare and then misreads it."""
    return "".join(",".join(map(_quoted, cells)) + "\n" for cells in rows)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in ',"\r\n') else cell
