"""Weights & Biases: what a run writes offline, that a resumed one goes on with it, and what becomes of failures."""

import json
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from spo_jax import methods
from spo_jax.errors import UserError
from spo_jax.runs import wandb_run
from spo_jax.runs.metrics import MetricsWriter, read_metrics
from spo_jax.spo import config as spo_config


@pytest.fixture
def config():
    config = spo_config.get_config()
    config.wandb.project = "emoji"
    return config


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The real wandb, without a user and without network; returns a folder for runs."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "user" / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # it keeps the settings of the process
    yield tmp_path / "run"
    wandb.teardown()


def records(path):
    """The records of an offline run: of LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows(path):
    """The history of an offline run: values by name, without W&B's own."""
    items = [record.history.item for record in records(path) if record.HasField("history")]
    histories = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in items]
    return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in histories]


def few_steps(config, workdir, resume_step=0):
    """A training that writes two rows, one image and its results."""
    with wandb_run.finished():
        _few_steps(config, workdir, resume_step)


def _few_steps(config, workdir, resume_step):
    wandb_run.check(config)
    run = wandb_run.start(config, workdir, resume_step)
    with MetricsWriter(workdir, resume_step, run) as writer:
        for step in (resume_step + 1, resume_step + 2):
            writer.write(step, {"loss": 1 / step, "grad_norm": np.float32(2)})
        writer.write_image(step, "validation", np.zeros((4, 6, 3), np.uint8))
    run.write_summary({"base": {"alignment_top1": 0.5}, "win_rate": 0.75, "config": config.to_dict()})


def test_offline_rows_pictures_results_and_config_are_found_again(alone, config, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    config.wandb.name = "a name"
    few_steps(config, alone)
    wandb.teardown()  # waits for W&B's own process, as the end of a command does
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers

    (folder,) = (alone / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    first, last = rows(path)
    assert first == {"_step": 1, "loss": 1.0, "grad_norm": 2.0}
    assert (last["_step"], last["loss"]) == (2, 0.5) and "validation" in last
    assert len(list(folder.glob("files/media/images/*.png"))) == 1
    found = records(path)
    (run,) = (record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name) == ("emoji", "a name")
    assert run.run_id == (alone / wandb_run.ID_FILE).read_text(encoding="utf-8").strip()
    values = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert values["sampling"]["num_steps"] == 20
    results = {u.key: json.loads(u.value_json) for r in found if r.HasField("summary") for u in r.summary.update}
    assert results["win_rate"] == 0.75 and results["base"] == {"alignment_top1": 0.5} and "config" not in results
    output = capfd.readouterr()
    assert output.out == f"W&B: offline; `wandb sync {folder}` sends the run later.\n"
    assert output.err == ""


def test_a_resumed_run_is_the_same_and_its_last_folder_has_all_rows(alone, config, monkeypatch):
    """W&B shows the last folder of a run that it is sent, so that folder has to have all rows."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    few_steps(config, alone)
    config.mesh.fsdp = 2  # what may change when a run goes on
    few_steps(config, alone, resume_step=1)
    wandb.teardown()
    paths = sorted((alone / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(paths) == 2 and paths[0].name == paths[1].name
    assert [[row["_step"] for row in rows(path)] for path in paths] == [[1, 2], [1, 2, 3]]
    assert [row["step"] for row in read_metrics(alone / "metrics.jsonl")] == [1, 2, 3]


def test_nobody_is_logged_in(alone, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="nobody is logged in to W&B; run `wandb login`, set WANDB_MODE=offline"):
        methods.train(config, alone)
    assert not alone.exists()


def test_without_a_project_wandb_is_not_imported(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    config.wandb.project = ""
    few_steps(config, tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_missing_package_is_found_before_anything_is_written(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed; install it with `pip install wandb`, or leave the"):
        methods.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


class StandIn:
    """A module wandb, whose ``failing`` functions raise, and that notes what is called."""

    def __init__(self, *failing):
        self.failing, self.calls, self.run = failing, [], None
        self.Image = self.Settings = lambda *_args, **_options: None

    def _call(self, called, **options):
        self.calls.append((called, options))
        if called in self.failing:
            raise RuntimeError("no\nnetwork.")

    def setup(self, settings):
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    def login(self, **_options):
        return True

    def init(self, **options):
        self._call("init", **options)

        def finish(**options):
            self._call("finish", **options)
            self.run = None

        summary = SimpleNamespace(update=lambda values: self._call("summary"))
        log = lambda values, step: self._call("log", step=step)  # noqa: E731
        self.run = SimpleNamespace(log=log, finish=finish, summary=summary, offline=False, url="https://w/1")
        return self.run


@pytest.fixture
def stand_in(monkeypatch):
    def put(*failing):
        module = StandIn(*failing)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def test_online_the_address_is_said_once_and_known_rows_are_left_to_wandb(tmp_path, config, stand_in, capsys):
    module = stand_in()
    few_steps(config, tmp_path)
    few_steps(config, tmp_path, resume_step=2)
    starts = [options for name, options in module.calls if name == "init"]
    assert [start["resume"] for start in starts] == ["allow"] * 2 and starts[0]["id"] == starts[1]["id"]
    assert [options["step"] for name, options in module.calls if name == "log"] == [1, 2, 2, 3, 4, 4]
    assert [options for name, options in module.calls if name == "finish"] == [{"exit_code": 0}] * 2
    assert capsys.readouterr().out == "W&B: https://w/1\n" * 2


@pytest.mark.parametrize("failing, calls", [("log", ["init", "log", "finish"]), ("finish", None)])
def test_a_failure_on_the_way_is_said_once_and_stops_nothing(tmp_path, config, stand_in, capsys, failing, calls):
    module = stand_in(failing)
    few_steps(config, tmp_path)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().err == "spo_jax: warning: W&B failed (no network); what it lacks is in metrics.jsonl.\n"
    assert calls is None or [name for name, _ in module.calls] == calls


def test_a_failure_at_the_start_stops_a_new_run_but_not_a_resumed_one(tmp_path, config, stand_in, capsys):
    stand_in("init")
    with pytest.raises(UserError, match=r"W&B does not take the run \(no network\); mend that, set WANDB_MODE=offline"):
        few_steps(config, tmp_path)
    few_steps(config, tmp_path, resume_step=1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert "W&B failed (no network)" in capsys.readouterr().err


def test_wandb_is_told_that_a_run_failed(tmp_path, config, stand_in):
    module = stand_in()

    with pytest.raises(UserError, match="loss is not finite"), wandb_run.finished():
        wandb_run.start(config, tmp_path, 0)
        raise UserError("loss is not finite")
    assert module.calls[-1] == ("finish", {"exit_code": 1})
