"""How fast the loader feeds preference pairs, and in how much memory.

    python -m benchmarks.loader                   # 20,000 records, 2 workers, 512 pixels; 8 GB of disk
    python -m benchmarks.loader --records=2000 --workers=4 --size=1024

Writes a synthetic Pick-a-Pic (parquet files with the published columns; 200 pictures with a spectrum like that of
photographs, combined at random), prepares it as a user would, runs one shuffled epoch and prints pairs a second, CPU
time, and the resident memory of this process and the workers. On a machine that does other work, seconds say little.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from PIL import Image

from spo_jax import cli
from spo_jax.data.preferences import PairLoader, open_pairs

RECORDS = flags.DEFINE_integer("records", 20_000, "Pairs in the epoch.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", 2, "Processes that decode; 0: none.", lower_bound=0)
PIXELS = flags.DEFINE_integer("pixels", 512, "Height and width of the stored pictures.", lower_bound=16)
SIZE = flags.DEFINE_integer("size", 512, "Height and width that the loader makes.", lower_bound=16)
BATCH = flags.DEFINE_integer("batch_size", 16, "Pairs in a batch.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Where to write; by default a temporary folder, removed at the end.")

_POOL, _FILES = 200, 4


def picture(seed: int, pixels: int) -> bytes:
    """A JPEG of a random field, the amplitudes of which fall with frequency as in photographs, and some grain."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(pixels)[:, None], np.fft.rfftfreq(pixels)) + 1 / pixels
    spectrum = np.fft.rfft2(rng.normal(size=(3, pixels, pixels))) / frequency**1.2
    field = np.fft.irfft2(spectrum, s=(pixels, pixels)).transpose(1, 2, 0)
    field = 128 + 50 * field / field.std() + rng.normal(scale=2, size=field.shape)
    data = io.BytesIO()
    Image.fromarray(field.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
    return data.getvalue()


def write_parquet(folder: Path, records: int, pixels: int) -> None:
    """``_FILES`` parquet files with Pick-a-Pic's columns."""
    rng = np.random.default_rng(0)
    pool = [picture(i, pixels) for i in range(_POOL)]
    print(f"pictures of {pixels} px: {np.mean([len(p) for p in pool]) / 1024:.0f} KB on average")
    for number, rows in enumerate(np.array_split(np.arange(records), _FILES)):
        path = folder / f"train-{number:05d}-of-{_FILES:05d}.parquet"
        writer = None
        for part in np.array_split(rows, max(1, len(rows) // 500)):
            first = rng.integers(3, size=len(part)) / 2
            table = pa.table(
                {
                    "caption": [f"caption {i // 3}" for i in part],
                    "jpg_0": pa.array([pool[i] for i in rng.integers(_POOL, size=len(part))], pa.binary()),
                    "jpg_1": pa.array([pool[i] for i in rng.integers(_POOL, size=len(part))], pa.binary()),
                    "label_0": first,
                    "label_1": 1 - first,
                    "has_label": np.ones(len(part), bool),
                    "num_example_per_prompt": np.full(len(part), 3),
                }
            )
            writer = writer or pq.ParquetWriter(path, table.schema, use_dictionary=False)
            writer.write_table(table)
        if writer:
            writer.close()


def processes() -> list[int]:
    """This process and grain's workers."""
    found = [os.getpid()]
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone already
            if path.name.isdigit() and b"spawn_main" in (path / "cmdline").read_bytes():
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(path.name)] * (parent == os.getpid())
    return sorted(found)


def resident(pid: int) -> float:
    """MB of a process without shared memory files; pages that it shares with others are divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return (kilobytes["Pss:"] - kilobytes.get("Pss_Shmem:", 0)) / 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Writes, prepares, reads, prints."""
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as name:
        folder = Path(name)
        # In a process of its own, so that what it has allocated does not count.
        writing = multiprocessing.get_context("spawn").Process(
            target=write_parquet, args=(folder, RECORDS.value, PIXELS.value)
        )
        writing.start()
        writing.join()
        start = time.time()
        command = [
            sys.executable,
            "-m",
            "spo_jax.prepare",
            f"--source={folder}/train-*.parquet",
            f"--out={folder}/data",
        ]
        subprocess.run(command, check=True)
        print(f"prepared in {time.time() - start:.0f} s")
        for path in folder.glob("*.parquet"):
            path.unlink()
        run_epoch(f"{folder}/data@train")


def run_epoch(name: str) -> None:
    """Goes through one epoch as training does, and prints what it took."""
    loader = PairLoader(
        open_pairs(name), batch_size=BATCH.value, size=(SIZE.value, SIZE.value), seed=0, num_workers=WORKERS.value
    )
    start = time.time()
    next(loader)
    print(f"first batch after {time.time() - start:.1f} s")
    start, cpu = time.time(), sum(map(cpu_seconds, processes()))
    pairs, samples, marks = 0, [], [round(RECORDS.value * i / 40) for i in range(41)]
    while pairs < RECORDS.value - BATCH.value:
        next(loader)
        pairs += BATCH.value
        if pairs >= marks[0]:
            marks = [mark for mark in marks if mark > pairs]
            sizes = [resident(pid) for pid in processes()]
            # Pictures on their way between the processes; of this whole machine.
            sizes.append(shutil.disk_usage("/dev/shm").used / 2**20)
            samples.append((time.time() - start, sizes))
    seconds, cpu = time.time() - start, sum(map(cpu_seconds, processes())) - cpu
    counts = {name: count for name, count in loader.state()["counts"].items() if count}
    loader.close()
    print("seconds   MB of this process, of the workers, in shared memory")
    for when, sizes in samples[:: max(1, len(samples) // 10)]:
        print(f"{when:7.1f}   " + " ".join(f"{size:6.0f}" for size in sizes))
    totals = np.array([sum(sizes) for _, sizes in samples])
    tail = totals[len(totals) // 5 :]  # caches of readers and allocators fill up at first
    slope = np.polyfit(np.linspace(0, 1, len(tail)), tail, 1)[0]
    print(f"memory: {totals[0]:.0f} MB at first, {totals[-1]:.0f} at the end, {totals.max():.0f} at most;")
    print(f"        {slope:+.0f} MB from a fifth of the epoch to its end (fitted line)")
    print(f"counts: {counts}")
    print(f"{pairs / seconds:.0f} pairs/s ({pairs} in {seconds:.1f} s), {1000 * cpu / pairs:.1f} CPU ms a pair")


if __name__ == "__main__":
    cli.run(main)
