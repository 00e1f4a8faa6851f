"""The server of the labelling page: what it answers, and to whom it does not."""

import http.client
import json
import re
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from spo_jax.errors import UserError
from spo_jax.images import write_png
from spo_jax.labelling import page
from spo_jax.labelling.server import HEADERS, Desk, address_of, make_server
from spo_jax.labelling.session import Pair, left_of

TOKEN = "a-token-of-the-tests"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def served(tmp_path):
    """The address, the desk, and its folder with three pairs and a file that is nobody's business."""
    pairs = [Pair(f"caption <b>{i}</b>", f"images/{i}_0.png", f"images/{i}_1.png") for i in range(3)]
    for i, pair in enumerate(pairs):
        for side, name in enumerate(pair[1:]):
            write_png(tmp_path / name, np.full((4, 4, 3), 10 * i + side, np.uint8))
    (tmp_path / "secret.txt").write_text("secret")
    desk = Desk(tmp_path, pairs, seed=0)
    with make_server(desk, TOKEN) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield address_of(server, TOKEN), desk, tmp_path
        server.shutdown()
    desk.close()


def ask(address, data=None, method=None, headers=()):
    """Status, headers and body of an answer; without a proxy."""
    data = json.dumps(data).encode() if isinstance(data, dict) else data
    request = urllib.request.Request(address, data, dict(headers or (JSON if data is not None else {})), method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def press(address, choice, at):
    status, _, body = ask(address + "press", {"choice": choice, "at": at})
    return json.loads(body) if status == 200 else status


def test_presses_become_pairs_and_undos_take_them_back(served):
    address, _, folder = served
    state = json.loads(ask(address + "state")[2])
    assert (state["number"], state["total"], state["caption"], state["at"]) == (0, 3, "caption <b>0</b>", 0)
    for at, choice in enumerate(("left", "tie", "undo", "right", "left")):
        state = press(address, choice, at)
    assert (state["number"], state["at"], state["ties"]) == (3, 5, 0)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [(choice == "left") == (left_of(0, i) == "a") for i, choice in enumerate(("left", "right", "left"))]
    assert [row["label"] for row in rows] == expected
    log = [json.loads(line) for line in (folder / "session" / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record.get("pair", "undo") for record in log] == [0, 1, "undo", 1, 2]
    assert [record["left"] for record in log if "pair" in record] == [left_of(0, i) for i in (0, 1, 1, 2)]
    assert press(address, "left", 5)["at"] == 5, "there is no fourth pair"


def test_a_window_that_has_not_seen_the_last_press_does_not_label(served):
    address, desk, _ = served
    assert press(address, "left", 0)["number"] == 1
    assert press(address, "left", 0) == 409
    assert len(desk.labels) == 1


def test_images_are_shown_on_the_sides_of_the_log(served):
    address, _, folder = served
    for i in range(3):
        names = [f"{i}_0.png", f"{i}_1.png"][:: 1 if left_of(0, i) == "a" else -1]
        for side, name in enumerate(names):
            status, headers, body = ask(f"{address}image/{i}/{side}")
            assert (status, headers["Content-Type"]) == (200, "image/png")
            assert body == (folder / "images" / name).read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        *(
            "image/3/0",
            "image/0/2",
            "image/-1/0",
            "image/0",
            "image/0/0/",
            "image/0/0?x",
            "image/%D9%A3/0",
            "secret.txt",
        ),
        *("images/0_0.png", "../secret.txt", "image/0/../../secret.txt", "%2e%2e/secret.txt", "pairs.jsonl", "/"),
    ],
)
def test_nothing_but_the_images_of_pairs_is_there(served, path):
    status, _, body = ask(served[0] + path)
    assert status == 404 and b"secret" not in body


@pytest.mark.parametrize("path", ["", "state", "image/0/0", "press", "../" + TOKEN + "/state"])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "%61" + TOKEN[1:]])
def test_without_the_token_there_is_nothing(served, path, token):
    address, desk, _ = served
    wrong = address.replace(TOKEN, token) + path
    assert ask(wrong)[0] == 403
    assert ask(wrong, {"choice": "left", "at": 0})[0] == 403
    assert not desk.labels


@pytest.mark.parametrize(
    "host, status",
    [
        *(("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:9999", 200)),
        *(("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("", 403)),
        *(("0.0.0.0", 403), ("[::1]", 403), ("127.0.0.1:80:80", 403)),
    ],
)
def test_a_name_that_others_can_point_here_is_refused(served, host, status):
    address, desk, _ = served
    assert ask(address + "state", headers={"Host": host})[0] == status
    assert ask(address + "press", {"choice": "left", "at": 0}, headers={**JSON, "Host": host})[0] == status
    assert len(desk.labels) == (status == 200)


def test_requests_without_or_with_two_host_headers_are_refused(served):
    place = served[0].split("/")[2]
    for hosts in ([], [place, place], [place, "evil.example"]):
        connection = http.client.HTTPConnection(place, timeout=10)
        connection.putrequest("GET", f"/{TOKEN}/state", skip_host=True)
        for host in hosts:
            connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status == 403
        connection.close()


@pytest.mark.parametrize(
    "data, headers, status",
    [
        (b'{"choice": "left", "at": 0}', {"Content-Type": "text/plain"}, 415),
        (b"choice=left&at=0", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b" " * 10_001, JSON, 413),
        (b" " * 200_000, JSON, 413),
        (b" " * 10_000, JSON, 400),
        (b"[" * 9_000, JSON, 400),
        (b"\xff", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"choice": "best", "at": 0}', JSON, 400),
        (b'{"choice": ["left"], "at": 0}', JSON, 400),
        (b'{"choice": "left"}', JSON, 400),
        (b'{"choice": "left", "at": false}', JSON, 400),
        (b"{}", JSON | {"Content-Length": "2x"}, 400),
        (b"{}", JSON | {"Content-Length": "-2"}, 400),
        (b"{}", JSON | {"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_a_press_that_is_none_is_refused(served, data, headers, status):
    address, desk, _ = served
    assert ask(address + "press", data, headers=headers)[0] == status
    assert not desk.labels and press(address, "left", 0)["number"] == 1


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"])
def test_other_methods_are_refused(served, method):
    status, headers, _ = ask(served[0] + "state", method=method)
    assert status == 405 and headers["Allow"] == "GET, POST"


def test_pages_are_not_posted_to_and_presses_not_got(served):
    assert ask(served[0] + "press")[0] == 405
    assert ask(served[0], {"choice": "left", "at": 0})[0] == 405
    assert ask(served[0] + "state", {"choice": "left", "at": 0})[0] == 405


def test_every_answer_is_guarded(served):
    address = served[0]
    for path, method in (
        ("", "GET"),
        ("state", "GET"),
        ("image/0/0", "GET"),
        ("no", "GET"),
        ("", "PUT"),
        ("../x", "GET"),
    ):
        _, headers, _ = ask(address + path, method=method)
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert headers["Server"] == "spo_jax"
    assert "'unsafe" not in page.POLICY and "default-src 'none'" in page.POLICY
    text = ask(address)[2].decode()
    assert not re.search(r"https?:|//[a-z]|style=|onclick=\"", text), "it works offline and under its policy"


def test_it_listens_on_the_loopback_alone(served):
    address, desk, _ = served
    with make_server(desk, TOKEN) as server:
        assert server.server_address[0] == "127.0.0.1"
    taken = int(address.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"--port={taken} cannot be used"):
        make_server(desk, TOKEN, taken)


def test_a_label_that_cannot_be_written_is_said_and_does_not_count(served, monkeypatch):
    address, desk, _ = served

    def full(_record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(desk._log, "append", full)
        status, _, body = ask(address + "press", {"choice": "left", "at": 0})
    assert status == 500 and body == b"Not written: No space left on device."
    assert press(address, "left", 0)["number"] == 1
