"""Waits until every process of a run is there, or says in each of them which one is missing.

``jax.distributed.initialize`` of JAX 0.10 ends by SIGABRT when a process is missing and by SIGSEGV when the port is in
use, and names neither. So process 0 listens on the coordinator's port first, the others say who they are, and all get
the same answer. JAX uses the port afterwards: a firewall that blocks it for JAX blocks it here too, and is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spo_jax.errors import UserError

CONNECT_SECONDS = 5.0  # for one attempt; a packet that a firewall drops has no answer
HELLO_SECONDS = 2.0  # for a process to say who it is; another program that connects may stay silent
ANSWER_SECONDS = 10.0  # for the answer to arrive, beyond the time that process 0 waits
RETRY_SECONDS = 0.2
LONGEST_HELLO = 4096  # bytes


class _Present(NamedTuple):
    host: str
    connection: socket.socket


def roll_call(
    address: str, num_processes: int, process_id: int, timeout: float, source: str, hosts: Sequence[str] = ()
) -> None:
    """Returns in all processes as soon as all ``num_processes`` of them are there.

    Args:
      address: host:port of process 0.
      timeout: seconds that process 0 waits for the others, and each of them for process 0.
      source: where the settings are from, for the message.
      hosts: the host of every process if they are known, for the message.

    Raises:
      UserError: a process did not come, two came as the same one, they disagree, or the port cannot be used.
    """
    if process_id == 0:
        _gather(address, num_processes, timeout, source, hosts)
    else:
        _report(address, num_processes, process_id, timeout, source)


def split_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[IPv6]:port``; UserError if it is neither."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{name}={address} must be host:port, the host of process 0 and a free port of it.")
    return host, int(port)


def _gather(address: str, num_processes: int, timeout: float, source: str, hosts: Sequence[str]) -> None:
    """Process 0: hears all others, and tells them the same answer."""
    here = socket.gethostname()
    present: dict[int, _Present] = {}
    last_host = dict(enumerate(hosts))
    gone: set[int] = set()
    problem = ""
    deadline = time.monotonic() + timeout
    with _listen(split_address(address, source)[1], num_processes) as listener, contextlib.ExitStack() as connections:
        while not problem:
            for process in [process for process, other in present.items() if _hung_up(other.connection)]:
                del present[process]
                gone.add(process)
            missing = [process for process in range(1, num_processes) if process not in present]
            remaining = deadline - time.monotonic()
            if not missing:
                break
            if remaining <= 0:
                there = {0: here} | {process: other.host for process, other in present.items()}
                left = " (it came and ended again)"
                names = {i: last_host[i] + left * (i in gone) for i in missing if i in last_host}
                problem = (
                    f"{_missing(missing, num_processes, names)}: process 0 has waited for {timeout:g} s at {address}; "
                    "check that every process was started and still runs, and that a firewall lets it reach this host "
                    f"and port; there are {_listed(there)} ({source})."
                )
                break
            listener.settimeout(min(remaining, 1.0))
            try:
                connection = connections.enter_context(listener.accept()[0])
            except TimeoutError:
                continue
            hello = _read_hello(connection)
            if hello is None:
                connection.close()
                continue
            process, count, host = hello
            if count != num_processes or not 0 < process < num_processes:
                problem = (
                    f"The processes disagree: process {process} on {host} says that there are {count}, process 0 on "
                    f"{here} that there are {num_processes}; start all with the same number ({source})."
                )
            elif process in present and not _hung_up(present[process].connection):
                problem = (
                    f"Two processes say that they are process {process} of {num_processes}, on {present[process].host} "
                    f"and on {host}; give each a number of its own ({source})."
                )
            else:
                present[process] = _Present(host, connection)
                last_host[process] = host
                gone.discard(process)
                continue
            _tell(connection, problem)
        for other in present.values():
            _tell(other.connection, problem)
    if problem:
        raise UserError(problem)


def _report(address: str, num_processes: int, process_id: int, timeout: float, source: str) -> None:
    """Any other process: tells process 0 that it is there, and waits for the answer."""
    host, port = split_address(address, source)
    hello = {"spo_jax": [process_id, num_processes, socket.gethostname()]}
    deadline = time.monotonic() + timeout
    while True:
        try:
            patience = max(RETRY_SECONDS, min(CONNECT_SECONDS, deadline - time.monotonic()))
            with socket.create_connection((host, port), timeout=patience) as link:
                link.sendall(json.dumps(hello).encode() + b"\n")
                link.settimeout(timeout + ANSWER_SECONDS)
                answer = link.makefile("rb").readline()
            problem = json.loads(answer)["problem"] if answer else None
            if isinstance(problem, str):
                break
            cause = "it closed the connection"
        except socket.gaierror:
            cause = f"the name {host} is not known"
        except (ValueError, KeyError, TypeError):
            cause = "something else listens there"
        except TimeoutError:
            cause = "no answer"
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
        if time.monotonic() >= deadline:
            raise UserError(
                f"Process 0 of {num_processes} is missing: process {process_id} on {socket.gethostname()} has tried to "
                f"reach it at {address} for {timeout:g} s ({cause}); check that process 0 was started and still runs, "
                f"that this is its host and port ({source}), and that no firewall is between."
            )
        time.sleep(RETRY_SECONDS)
    if problem:
        raise UserError(problem)


def _listen(port: int, num_processes: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=num_processes + 16
                )
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        return socket.create_server(("", port), backlog=num_processes + 16)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} of {socket.gethostname()}, on which process 0 meets the others, is in use; end the "
                "program that listens there (an earlier run?), or choose another port with --coordinator_address."
            ) from error
        raise UserError(
            f"Process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}); choose another "
            "port with --coordinator_address."
        ) from error


def _read_hello(connection: socket.socket) -> tuple[int, int, str] | None:
    """Who is there: process, number of processes, host; None if it is another program."""
    connection.settimeout(HELLO_SECONDS)
    try:
        process, count, host = json.loads(connection.makefile("rb").readline(LONGEST_HELLO))["spo_jax"]
        return int(process), int(count), str(host)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hung_up(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _tell(connection: socket.socket, problem: str) -> None:
    """Sends the answer; empty if all are there. JAX will notice a process that has just ended."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")


def _missing(missing: list[int], num_processes: int, names: dict[int, str]) -> str:
    process, verb = ("Process", "is") if len(missing) == 1 else ("Processes", "are")
    known = f" ({_listed(names)})" if names else ""
    return f"{process} {ranges(missing)} of {num_processes} {verb} missing{known}"


def _listed(hosts: dict[int, str], most: int = 8) -> str:
    listed = [f"{process} on {hosts[process]}" for process in sorted(hosts)]
    return ", ".join(listed[:most]) + f" and {len(listed) - most} more" * (len(listed) > most)


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: ``1, 4-7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
