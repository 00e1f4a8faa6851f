"""``spo_jax.fetch`` against a small server: it lists, resumes and verifies; each fault ends with its sentence."""

import json
import subprocess
import sys
import time

import pytest

from tests.hub_server import COMMIT, serve
from tests.system.commands import ROOT, run
from tests.system.forks import run_forked

LARGE = bytes(range(256)) * 2000
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "unet/config.json": b"{}",
    WEIGHTS: LARGE,
    "tokenizer/vocab.json": b"{}",
}
NOT_READ = {
    "README.md": b"a page",
    "modeling_evil.py": b"raise SystemExit",
    "unet/diffusion_pytorch_model.non_ema.safetensors": LARGE,
    "safety_checker/config.json": b"{}",
}
PROMPTS = json.dumps(["a fox", "a hen"]).encode()
NAMES = {
    "config.model": f"org/sd@{COMMIT}",
    "config.scorer.path": f"org/judges@{COMMIT}/sd_preference_model.bin",
    "config.prompts": f"github:owner/texts@{COMMIT}/a/prompts.json",
    "config.evaluation.prompts": "emoji:prompts/held_out.txt",
    "config.evaluation.judge": "emoji:model/clip",
}


@pytest.fixture
def hub():
    repositories = {
        "org/sd": PIPELINE | NOT_READ,
        "org/judges": {"sd_preference_model.bin": LARGE[::-1], "other.bin": LARGE},
        "github:owner/texts": {"a/prompts.json": PROMPTS},
    }
    with serve(repositories) as server:
        yield server


def arguments(*flags, command="spo_jax.fetch"):
    names = [f"--{key}={value}" for key, value in NAMES.items()]
    return [sys.executable, "-m", command, "--config=configs/tiny.py", *names, *flags]


def fetch(env, *flags, command="spo_jax.fetch", run=run_forked, **options):
    """Runs the command and returns exit code, output and errors."""
    done = run(arguments(*flags, command=command), env, **options)
    return done.returncode, done.stdout, done.stderr


def sentence(ended):
    """The one sentence that a command has ended with."""
    code, _, errors = ended
    assert code == 2 and "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("spo_jax: error: "), errors
    return last.removeprefix("spo_jax: error: ")


def cached(home, name=WEIGHTS, repo="org/sd"):
    return home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT / name


def left_overs(home):
    return [path for path in home.rglob("*") if path.name.endswith(".incomplete")]


def size_of(path):
    """0 of a file that has gone since it was listed: the process goes on meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_it_fetches_what_is_read_and_then_needs_no_network(hub, tmp_path):
    env = hub.environment(tmp_path)
    code, output, errors = fetch(env, run=run)
    assert code == 0, errors
    assert "Fetched and verified" in output
    assert cached(tmp_path).read_bytes() == LARGE
    assert cached(tmp_path, "sd_preference_model.bin", "org/judges").read_bytes() == LARGE[::-1]
    there = {path.relative_to(cached(tmp_path, "")).as_posix() for path in cached(tmp_path, "").rglob("*.*")}
    assert there == set(PIPELINE)
    assert not hub.downloads("other.bin")
    asked = len(hub.requests)
    code, output, _ = fetch(env | {"HF_HUB_OFFLINE": "1"})
    assert code == 0 and "no network is needed" in output
    assert len(hub.requests) == asked


def test_a_dry_run_lists_commits_sizes_and_what_is_missing(hub, tmp_path):
    code, output, _ = fetch(hub.environment(tmp_path), "--dry_run", run=run)
    assert code == 1
    for words in (f"org/sd@{COMMIT}", "4 files, 512 kB, 4 missing", f"{WEIGHTS}, 512 kB", f"owner/texts@{COMMIT}"):
        assert words in output
    assert "(config.evaluation.judge): local\n    emoji:model/clip" in output and "To fetch: 1.02 MB; " in output
    assert not hub.sent and not cached(tmp_path).exists()


def test_without_network_everything_that_is_missing_is_named(hub, tmp_path):
    env = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    ended = fetch(env, "--config.vae=org/vae", run=run)
    said, output = sentence(ended), ended[1]
    for name in (NAMES["config.model"], "config.vae (org/vae)", NAMES["config.scorer.path"], NAMES["config.prompts"]):
        assert name in said
    assert "HF_HUB_OFFLINE is set" in said
    assert NAMES["config.model"] in output and f"owner/texts@{COMMIT}" in output and "missing" in output
    ended = fetch(env, f"--workdir={tmp_path / 'w'}", command="spo_jax.main", run=run)
    said = sentence(ended)
    assert NAMES["config.scorer.path"] in said and "`python -m spo_jax.fetch --config=configs/tiny.py" in said
    assert len(ended[2].strip().splitlines()) == 1
    assert not (tmp_path / "w").exists() and not hub.requests


def test_a_server_that_is_not_there_is_no_network(tmp_path, hub):
    env = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "config.model" in sentence(fetch(env))


def test_a_connection_that_breaks_is_made_again_and_goes_on(hub, tmp_path):
    content = bytes(30_000_000)
    hub.repositories["org/sd"] = PIPELINE | {WEIGHTS: content}
    hub.faults.cut = {"a/prompts.json": [3], WEIGHTS: [12_000_000, 15_000_000]}  # a piece of 1 MiB may be lost
    code, _, errors = fetch(hub.environment(tmp_path))
    assert code == 0, errors
    assert cached(tmp_path).read_bytes() == content
    starts = [int(asked[6:-1]) for asked in hub.downloads(WEIGHTS)[1:]]
    assert 10_900_000 < starts[0] <= 12_000_000 and starts[0] + 13_900_000 < starts[1] <= 27_000_000


def test_a_full_disk_is_said_and_the_same_command_goes_on(hub, tmp_path):
    env = hub.environment(tmp_path)
    said = sentence(fetch(env, file_size=200_000))
    assert "File too large" in said and "set HF_HOME" in said and "goes on where it stopped" in said
    (part,) = left_overs(tmp_path)
    assert not cached(tmp_path).exists()
    kept = part.stat().st_size
    assert 0 < kept <= 200_000
    code, output, errors = fetch(env)
    assert code == 0, errors
    assert "of it here " in output
    assert f"bytes={kept}-" in hub.downloads(WEIGHTS) + hub.downloads("sd_preference_model.bin")
    assert cached(tmp_path).read_bytes() == LARGE and not left_overs(tmp_path)


def test_space_is_checked_before_anything_is_fetched(hub, tmp_path):
    hub.sizes[WEIGHTS] = 10**16
    said = sentence(fetch(hub.environment(tmp_path)))
    assert "10000000.00 GB have to be fetched" in said and "free" in said
    assert not hub.sent


def test_wrong_content_is_thrown_away(hub, tmp_path):
    hub.faults.wrong.add(WEIGHTS)
    env = hub.environment(tmp_path)
    assert f"File {WEIGHTS} of org/sd did not come as it should be (checksum " in sentence(fetch(env))
    assert not cached(tmp_path).exists() and not left_overs(tmp_path)
    hub.faults.wrong.clear()
    assert fetch(env)[0] == 0


def test_a_file_of_github_is_checked_against_the_sum_in_its_name(hub, tmp_path):
    name = NAMES["config.prompts"] + "#sha256=" + "0" * 64
    said = sentence(fetch(hub.environment(tmp_path), f"--config.prompts={name}"))
    assert "a/prompts.json of owner/texts did not come as it should be" in said and "behind #sha256=" in said


def test_a_sum_that_is_not_that_of_the_hub_is_refused_before_the_transfer(hub, tmp_path):
    name = NAMES["config.scorer.path"] + "#sha256=" + "0" * 64
    said = sentence(fetch(hub.environment(tmp_path), f"--config.scorer.path={name}"))
    assert "sd_preference_model.bin of org/judges has the checksum" in said
    assert not hub.sent


def test_a_damaged_file_of_the_cache_is_fetched_again(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert fetch(env)[0] == 0
    cached(tmp_path).write_bytes(LARGE[:-1] + b"?")
    code, _, errors = fetch(env)
    assert code == 0 and f"{WEIGHTS} of org/sd is damaged" in errors
    assert cached(tmp_path).read_bytes() == LARGE


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        ("org/sd", 401, ("There is no repository org/sd", "/org/sd", "HF_TOKEN")),
        ("org/sd", 403, ("org/sd is gated", "/org/sd, accept its terms", "HF_TOKEN")),
        ("org/sd", 404, ("There is no repository org/sd", "nothing of that name is here")),
        (WEIGHTS, 403, ("org/sd is gated", "/org/sd, accept its terms")),
        ("a/prompts.json", 404, ("a/prompts.json of owner/texts", "https://github.com/owner/texts")),
    ],
)
def test_what_the_server_refuses_is_one_sentence_with_the_page(hub, tmp_path, what, status, words):
    hub.faults.statuses[what] = status
    said = sentence(fetch(hub.environment(tmp_path)))
    for word in words:
        assert word in said, said


def test_revision_and_file_that_do_not_exist(hub, tmp_path):
    env = hub.environment(tmp_path)
    said = sentence(fetch(env, "--config.model=org/sd@nightly"))
    assert "config.model: org/sd has no revision nightly" in said and "/org/sd/commits/main" in said
    said = sentence(fetch(env, f"--config.scorer.path=org/judges@{COMMIT}/none.bin"))
    assert "config.scorer.path: " in said and "that is read here as none.bin; it has other.bin" in said


def test_a_busy_server_is_asked_again(hub, tmp_path):
    hub.faults.busy |= {"org/sd": 2, WEIGHTS: 2, "a/prompts.json": 1}
    code, _, errors = fetch(hub.environment(tmp_path))
    assert code == 0, errors
    assert not any(hub.faults.busy.values())


def test_a_token_opens_a_gated_repository(hub, tmp_path):
    hub.tokens["org/sd"] = "hf_mine"
    env = hub.environment(tmp_path)
    assert "org/sd is gated" in sentence(fetch(env))
    code, _, errors = fetch(env | {"HF_TOKEN": "hf_mine"})
    assert code == 0, errors


def test_a_proxy_is_respected(hub, tmp_path):
    """The server stands in for the proxy, too: it answers for a host that does not exist."""
    env = hub.environment(tmp_path) | {"HTTP_PROXY": hub.address, "http_proxy": hub.address}
    hub.address = "http://hub.invalid"
    env |= {"HF_ENDPOINT": "http://hub.invalid", "GITHUB_RAW_ENDPOINT": "http://raw.invalid/raw"}
    code, _, errors = fetch(env)
    assert code == 0, errors
    assert cached(tmp_path).read_bytes() == LARGE


def test_two_processes_fetch_a_file_once(hub, tmp_path):
    options = {"cwd": ROOT, "env": hub.environment(tmp_path), "stdout": subprocess.DEVNULL}
    both = [subprocess.Popen(arguments(), **options) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(hub.downloads(WEIGHTS)) == len(hub.downloads("a/prompts.json")) == 1
    assert cached(tmp_path).read_bytes() == LARGE and not left_overs(tmp_path)


def test_a_cache_that_cannot_be_written_is_one_sentence(hub, tmp_path):
    (tmp_path / "home").write_text("a file")
    said = sentence(fetch(hub.environment(tmp_path / "home")))
    assert "set HF_HOME to a folder of yours" in said


@pytest.mark.parametrize("name", ["../../../../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_mirror_cannot_write_outside_the_cache(hub, tmp_path, name):
    hub.repositories["org/sd"] = PIPELINE | {name: b"{}"}
    said = sentence(fetch(hub.environment(tmp_path / "a" / "b" / "home")))
    assert "lists a file" in said and "evil.json" in said
    assert not list(tmp_path.rglob("evil.json")) and not hub.sent


def test_a_login_page_is_not_taken_for_a_file(hub, tmp_path):
    hub.faults.pages |= {"a/prompts.json", WEIGHTS}
    said = sentence(fetch(hub.environment(tmp_path)))
    assert "a login page, or a proxy?" in said
    assert not list(tmp_path.rglob("prompts.json")) and not cached(tmp_path).exists()


def test_a_login_page_leaves_what_came_before(hub, tmp_path):
    content = bytes(20_000_000)
    hub.repositories["org/sd"] = PIPELINE | {WEIGHTS: content}
    hub.faults.cut[WEIGHTS] = [12_000_000, 0, 0, 0]
    env = hub.environment(tmp_path)
    process = subprocess.Popen(arguments(), cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    while not any(size_of(path) > 10_000_000 for path in left_overs(tmp_path)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.faults.cut.clear()
    part = max(left_overs(tmp_path), key=lambda path: path.stat().st_size)
    kept = part.stat().st_size
    hub.faults.pages.add(WEIGHTS)
    assert "a login page, or a proxy?" in sentence(fetch(env))
    assert part.stat().st_size == kept
    hub.faults.pages.clear()
    code, _, errors = fetch(env)
    assert code == 0, errors
    assert f"bytes={kept}-" in hub.downloads(WEIGHTS) and cached(tmp_path).read_bytes() == content


def test_a_damaged_file_stays_until_another_has_come(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert fetch(env)[0] == 0
    damaged = LARGE[:-1] + b"?"
    cached(tmp_path).write_bytes(damaged)
    said = sentence(fetch(env | {"HF_HUB_OFFLINE": "1"}))
    assert "config.model" in said and cached(tmp_path).read_bytes() == damaged


def test_a_file_whose_name_has_a_sum_is_checked_though_it_is_here(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert fetch(env)[0] == 0
    name = NAMES["config.prompts"] + "#sha256=" + "0" * 64
    said = sentence(fetch(env, f"--config.prompts={name}", f"--workdir={tmp_path / 'w'}", command="spo_jax.main"))
    assert "a/prompts.json" in said and not (tmp_path / "w").exists()


def test_a_branch_that_was_fetched_needs_no_network(hub, tmp_path):
    env = hub.environment(tmp_path)
    assert fetch(env, "--config.model=org/sd")[0] == 0
    code, _, errors = fetch(env | {"HF_HUB_OFFLINE": "1"}, "--config.model=org/sd")
    assert code == 0, errors


def test_content_that_is_here_is_not_sent_again(hub, tmp_path):
    hub.repositories["org/sd"] |= {"text_encoder/config.json": b"{}", "text_encoder/model.safetensors": LARGE}
    env = hub.environment(tmp_path)
    assert fetch(env)[0] == 0
    later = "f" * 40
    code, _, errors = fetch(env, f"--config.model=org/sd@{later}")
    assert code == 0, errors
    assert len(hub.downloads(WEIGHTS)) + len(hub.downloads("text_encoder/model.safetensors")) == 1
    assert (cached(tmp_path, "").parent / later / WEIGHTS).read_bytes() == LARGE


def test_github_out_of_reach_does_not_keep_from_fetching_of_the_hub(hub, tmp_path):
    env = hub.environment(tmp_path) | {"GITHUB_RAW_ENDPOINT": "http://127.0.0.1:9"}
    said = sentence(fetch(env))
    assert f"config.prompts ({NAMES['config.prompts']})" in said and "config.model (" not in said
    assert cached(tmp_path).read_bytes() == LARGE


def test_what_has_nothing_to_read_is_refused(hub, tmp_path):
    said = sentence(fetch(hub.environment(tmp_path), f"--config.model=org/sd@{COMMIT}/nothing"))
    assert "has nothing at" in said and "README.md" in said
