"""A training run without a model: takes batches, logs them, saves the loader's state, and resumes from it.

python -m tests.system.consume_pairs DATA WORKDIR LAST_POSITION WORKERS
"""

import json
import os
import sys
import time
from pathlib import Path

from spo_jax.data.preferences import PairLoader, open_pairs


def write(path, content):
    """Replaces a file at once; it is on the disk when this returns."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main(data, workdir, last_position, workers):
    """Runs until the loader has come to a position."""
    log, saved = workdir / "log.jsonl", workdir / "state.json"
    state = None
    if saved.is_file():
        checkpoint = json.loads(saved.read_text())
        state = checkpoint["state"]
        os.truncate(log, checkpoint["log_bytes"])
    loader = PairLoader(open_pairs(data), batch_size=4, size=(16, 16), seed=7, state=state, num_workers=workers)
    with log.open("a") as file:
        for number, batch in enumerate(loader):
            rows = zip(batch.captions, batch.positions.tolist(), strict=True)
            file.writelines(json.dumps(row) + "\n" for row in rows if row[1] >= 0)
            file.flush()
            done = loader.state()["position"] >= last_position
            if done or number % 3 == 2:
                os.fsync(file.fileno())
                write(saved, json.dumps({"state": loader.state(), "log_bytes": file.tell()}))
            if done:
                break
            time.sleep(0.02)  # the update
    loader.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
