"""Everyone hears the same verdict: all are there, or who is not. Real processes: tests/system."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from spo_jax.distributed import roll_call as module
from spo_jax.distributed.roll_call import ranges, roll_call, split_address
from spo_jax.errors import UserError


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def verdicts(address, *processes, timeout=5.0, hosts=()):
    """What (number of processes, process) hear: an empty text if all are there."""

    def hear(count_and_process):
        try:
            roll_call(address, *count_and_process, timeout, "a test", hosts)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(hear, processes))


def test_all_are_there(address):
    start = time.monotonic()
    assert verdicts(address, (4, 2), (4, 0), (4, 1), (4, 3)) == [""] * 4
    assert verdicts(address, (2, 1), (2, 0)) == [""] * 2  # the port is free again at once
    assert time.monotonic() - start < 4


def test_the_missing_are_named_in_every_process(address):
    heard = verdicts(address, (5, 1), (5, 0), timeout=0.5, hosts=["h0", "h1", "h2", "h3", "h4"])
    assert heard[0] == heard[1]
    assert heard[0].startswith(
        "Processes 2-4 of 5 are missing (2 on h2, 3 on h3, 4 on h4): process 0 has waited for 0.5 s"
    )
    assert f"there are 0 on {socket.gethostname()}, 1 on {socket.gethostname()} (a test)" in heard[0]


def test_process_0_is_missing(address):
    (heard,) = verdicts(address, (2, 1), timeout=0.3)
    assert heard.startswith("Process 0 of 2 is missing: process 1 on ")
    assert f"reach it at {address} for 0.3 s (connection refused)" in heard


def test_the_name_of_process_0_is_wrong():
    (heard,) = verdicts("nowhere.invalid:8482", (2, 1), timeout=0.3)
    assert "(the name nowhere.invalid is not known)" in heard


def test_something_else_listens(address):
    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(1000)

    host, port = split_address(address, "")
    with socket.create_server((host, port)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        (heard,) = verdicts(address, (2, 1), timeout=0.3)
        assert "(something else listens there)" in heard
        (heard,) = verdicts(address, (2, 0), timeout=0.3)
        assert heard.startswith(
            f"Port {port} of {socket.gethostname()}, on which process 0 meets the others, is in use"
        )
        listener.shutdown(socket.SHUT_RDWR)


def test_processes_that_disagree(address):
    heard = verdicts(address, (2, 0), (3, 1))
    assert heard[0] == heard[1] and heard[0].startswith("The processes disagree: process 1 on ")
    assert "says that there are 3, process 0 on " in heard[0]


def test_two_with_the_same_number(address):
    heard = verdicts(address, (3, 0), (3, 1), (3, 1))
    assert len(set(heard)) == 1 and heard[0].startswith("Two processes say that they are process 1 of 3, on ")


def come_and_go(address):
    """Process 1 of 3 on node7, which ends at once."""
    for _ in range(100):
        try:
            with socket.create_connection(split_address(address, "")) as connection:
                connection.sendall(b'{"spo_jax": [1, 3, "node7"]}\n')
            return
        except ConnectionRefusedError:
            time.sleep(0.02)


def test_one_that_ended_again_is_missing(address):
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(verdicts, address, (3, 0), timeout=0.5)
        come_and_go(address)
        assert heard.result()[0].startswith("Processes 1-2 of 3 are missing (1 on node7 (it came and ended again)): ")


def test_one_that_ended_may_come_back(address):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(verdicts, address, (3, 0))
        come_and_go(address)
        assert verdicts(address, (3, 1), (3, 2)) == ["", ""]
        assert first.result() == [""]


def test_strangers_do_no_harm(address, monkeypatch):
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.1)
    target = split_address(address, "")

    def knock():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"spo_jax": 3}\n', b"x" * 10000, b""):
            for _ in range(100):
                try:
                    with socket.create_connection(target, timeout=1) as connection:
                        connection.sendall(text)
                        connection.settimeout(1)
                        connection.recv(1)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
                except OSError:
                    break

    stranger = threading.Thread(target=knock)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(verdicts, address, (2, 0))
        stranger.start()
        stranger.join()
        assert verdicts(address, (2, 1)) == [""]
        assert first.result() == [""]


def test_addresses():
    assert split_address("node1:8482", "x") == ("node1", 8482)
    assert split_address("[fd00::1]:8482", "x") == ("fd00::1", 8482)
    for wrong in ("", "node1", ":8482", "node1:", "node1:0", "node1:70000", "node1:http"):
        with pytest.raises(UserError, match="must be host:port"):
            split_address(wrong, "x")


def test_ranges():
    assert ranges([1]) == "1"
    assert ranges([1, 3, 4, 5, 9, 10]) == "1, 3-5, 9-10"
