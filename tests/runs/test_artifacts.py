"""What a config needs: commits are looked up once and kept, and what is here is not asked for."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from configs import sd15, tiny
from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.errors import UserError
from spo_jax.formats import download
from spo_jax.formats.hub import fetched
from spo_jax.formats.remote import parse_remote
from spo_jax.runs.artifacts import Stock, artifacts_of, fetch_command, fetch_missing, look_up, ready, take_stock
from spo_jax.runs.checkpoint import check_workdir
from spo_jax.spm import config as spm_config
from spo_jax.spo import config as spo_config
from tests.hub_server import COMMIT, serve

LATER = "f" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, which this process takes for the hub, and an empty cache."""
    with serve({"org/sd": {"model_index.json": b"{}"}, "org/judge": {"config.json": b"{}"}}) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def config_with(**names):
    config = tiny.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): name for key, name in names.items()})
    return config.lock()


def test_a_run_keeps_the_commit_that_it_began_with(hub, tmp_path, capsys):
    given = config_with(model="org/sd", scorer__path="org/judge@main", evaluation__judge=f"org/judge@{COMMIT}")
    config, pins = ready(given, tmp_path / "w")
    assert (config.model, config.scorer.path) == (f"org/sd@{COMMIT}", f"org/judge@{COMMIT}")
    assert given.model == "org/sd"
    assert f"config.model=org/sd is at commit {COMMIT}" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    check_workdir(tmp_path / "w", config.to_dict(), pins)
    hub.commits |= {"org/sd": LATER, "org/judge": LATER}
    again, pins = ready(given, tmp_path / "w")
    assert again.to_dict() == config.to_dict()
    check_workdir(tmp_path / "w", again.to_dict(), pins)
    other, _ = ready(given, tmp_path / "other")
    assert other.model == f"org/sd@{LATER}" and other.evaluation.judge == f"org/judge@{COMMIT}"
    assert json.loads((tmp_path / "w" / "config.json").read_text())["model"] == f"org/sd@{COMMIT}"


def test_the_strength_of_adapters_stays_behind_their_commit(hub, tmp_path):
    config, _ = ready(config_with(lora__init="org/judge@main:0.5"), tmp_path / "w")
    assert config.lora.init == f"org/judge@{COMMIT}:0.5"
    (artifact,) = (artifact for artifact in artifacts_of(config) if artifact.key == "lora.init")
    assert artifact.name == f"org/judge@{COMMIT}"


def test_another_branch_is_another_config(hub, tmp_path):
    config, pins = ready(config_with(model="org/sd"), tmp_path / "w")
    check_workdir(tmp_path / "w", config.to_dict(), pins)
    hub.commits["org/sd"] = LATER
    config, pins = ready(config_with(model="org/sd@main"), tmp_path / "w")
    with pytest.raises(UserError, match="another config"):
        check_workdir(tmp_path / "w", config.to_dict(), pins)


def test_what_is_here_is_not_asked_for(hub, tmp_path):
    config = config_with(model=f"org/sd@{COMMIT}")
    ready(config, tmp_path / "w")
    asked = len(hub.requests)
    assert asked
    ready(config, tmp_path / "w")
    assert len(hub.requests) == asked


def test_damaged_pins_are_refused(tmp_path):
    (tmp_path / "pins.json").write_text("[")
    with pytest.raises(UserError, match=r"pins\.json is damaged"):
        ready(tiny.get_config(), tmp_path)


def test_local_name_that_is_not_there_is_refused_before_the_hub_is_asked(hub):
    with pytest.raises(UserError, match=r"config\.prompts: '/nowhere\.txt' does not exist here"):
        look_up(config_with(model="org/sd", prompts="/nowhere.txt"), {})
    assert not hub.requests


@pytest.mark.parametrize(
    "config", [tiny.get_config(), spo_config.get_config(), spm_config.get_config(), sd15.get_config()]
)
def test_every_name_is_a_value_of_its_config(config):
    flat = {artifact.key: artifact.name for artifact in artifacts_of(config) if not artifact.optional}
    for key, name in flat.items():
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == name


def test_what_ships_with_the_package_is_no_remote_artifact():
    assert take_stock(tiny.get_config()) == []


def test_what_is_known_of_one_name_is_taken_though_another_cannot_be_looked_up(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = config_with(model="org/sd", scorer__path="org/judge")
    assert look_up(config, {"org/judge": LATER}) == {"org/judge": LATER}


def test_a_name_that_could_not_be_looked_up_at_first_is_not_fetched_without_a_pin(hub, tmp_path, monkeypatch):
    ask, failed = download.commit_of, []

    def once(remote):
        if not failed:
            failed.append(remote)
            raise download.Unreachable("", "a hiccup")
        return ask(remote)

    monkeypatch.setattr(download, "commit_of", once)
    with pytest.raises(UserError, match=r"config\.model \(org/sd\).*with network"):
        ready(config_with(model="org/sd"), tmp_path / "w")
    assert not hub.sent


@pytest.mark.parametrize(
    "entry",
    [
        ["../../evil.json", 2, f"git:{'0' * 40}"],
        ["model_index.json", "2", f"git:{'0' * 40}"],
        ["model_index.json", 2, "git:../../evil"],
        ["a" * 300 + ".json", 2, f"git:{'0' * 40}"],
    ],
)
def test_a_listing_that_was_tampered_with_is_asked_for_again(hub, tmp_path, entry):
    listing = tmp_path / "home" / "spo_jax" / "listings" / "models--org--sd" / f"{COMMIT}.json"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps([entry]))
    ready(config_with(model=f"org/sd@{COMMIT}"), tmp_path / "w")
    assert [name for name, _ in hub.sent] == ["model_index.json"]


def test_a_slip_in_a_local_path_asks_no_server(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"config\.scorer\.path: 'runs/spm' does not exist here"):
        ready(config_with(scorer__path="runs/spm"), tmp_path / "w")
    assert fetched("other/lora") == Path("other/lora")
    assert not hub.requests


def test_the_command_that_fetches_has_the_flags_of_this_one(monkeypatch):
    given = [
        "main",
        "--config",
        "configs/tiny.py",
        "--workdir=w",
        "--config.model=a b",
        "--config.vae",
        "x",
        "--seed=1",
    ]
    monkeypatch.setattr("sys.argv", given)
    command = "python -m spo_jax.fetch --config configs/tiny.py '--config.model=a b' --config.vae x"
    assert fetch_command() == command


def test_prompt_sets_are_found_by_their_names():
    config = sd15.get_config()
    config.prompts, config.evaluation.prompts = "spo-4k", "parti"
    named = {artifact.key: artifact.name for artifact in artifacts_of(config)}
    for key, name in (("prompts", "spo-4k"), ("evaluation.prompts", "parti")):
        assert named[key] == PROMPT_SETS[name] and parse_remote(named[key]).pinned


def test_a_run_does_without_what_is_optional_and_out_of_reach(capsys):
    """Files of a metric: the run tells later that it left the metric out."""
    config = sd15.get_config()
    found = {artifact.what: artifact for artifact in artifacts_of(config) if artifact.optional}
    assert set(found) == {"metric pickscore"}, "the CLIP of the other one is read anyway"
    for optional in (True, False):
        artifact = found["metric pickscore"]._replace(optional=optional)
        stock = Stock(artifact, parse_remote(artifact.name), None, unreachable="no network")
        if optional:
            fetch_missing([stock])
            assert "metric pickscore cannot be had" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match=r"Missing here, and out of reach \(no network\)"):
                fetch_missing([stock])


def test_a_repository_of_a_metric_that_is_gone_stops_no_run(monkeypatch, capsys):
    def list_files(remote, **_options):
        if remote.repo == "yuvalkirstain/PickScore_v1":
            raise UserError(f"{remote.repo} does not exist.")
        return []

    monkeypatch.setattr(download, "list_files", list_files)
    stocks = take_stock(sd15.get_config())
    (gone,) = [stock for stock in stocks if stock.artifact.optional]
    assert not gone.complete and "does not exist" in gone.unreachable
    fetch_missing(stocks)
    assert "cannot be had" in capsys.readouterr().err
