"""The systems that tests/bench.py compares: the shop, and others that answer GET /users the same.

Each is a context manager that yields the ports of its users service and its gateway. The packages
that one needs go into a temporary folder. If they cannot be had, it raises Absent.
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microshop.gateway import Gateway
from microshop.users import Users
from tests.helpers import TOP, process

PACKAGE_TIME = 60.0  # seconds that each step of getting packages may take
END_TIME = 5.0       # seconds that a server may take to end, before it is killed
DEMO = ("users", "products", "orders", "api-gateway")  # the files of the Express demo
Ports = dict[str, int]


class Absent(Exception):
    """A system that is not available here; the text is one line that says why."""


@contextlib.contextmanager
def microshop(*flags: str) -> Iterator[tuple[Ports, int, float]]:
    """Run the shop; yield its ports, the supervisor's pid, and the seconds until it was ready."""
    began = time.perf_counter()
    with process("microshop.run_all", "--port", "0", *flags) as shop:
        shop.wait_for("ready in")
        took = time.perf_counter() - began
        ports = {"users": shop.port(Users.title), "gateway": shop.port(Gateway.title)}
        yield ports, shop.popen.pid, took
        shop.stop()


@contextlib.contextmanager
def textbook() -> Iterator[Ports]:
    with process("tests.textbook", "users", "0") as users:
        ports = {"users": users.port("textbook")}
        upstream = f"http://localhost:{ports['users']}"
        with process("tests.textbook", upstream, "0") as gateway:
            yield {**ports, "gateway": gateway.port("textbook")}


@contextlib.contextmanager
def aiohttp_pair() -> Iterator[Ports]:
    with tempfile.TemporaryDirectory(prefix="microshop-bench-") as folder:
        prepare("python -m venv", [sys.executable, "-m", "venv", folder])
        python = [f"{folder}/bin/python", "-m"]
        prepare("pip install aiohttp", [
            *python, "pip", "install", "-q", "--disable-pip-version-check",
            "--retries", "1", "--timeout", "10", "aiohttp"])
        command = [*python, "tests.aiohttp_pair"]
        with server([*command, "users"]) as users:
            with server([*command, f"http://127.0.0.1:{users}"]) as gateway:
                yield {"users": users, "gateway": gateway}


@contextlib.contextmanager
def express(seed: Path) -> Iterator[Ports]:
    """Run a copy of the demo in `seed`, with packages of its own unless `seed` has them."""
    if missing := [tool for tool in ("node", "npm") if not shutil.which(tool)]:
        raise Absent(f"{' and '.join(missing)} not found")
    if missing := [f"{name}.js" for name in DEMO if not (seed / f"{name}.js").is_file()]:
        raise Absent(f"{', '.join(missing)} not found in {seed} (see --seed)")
    with tempfile.TemporaryDirectory(prefix="microshop-bench-") as folder:
        demo = Path(folder, "demo")
        shutil.copytree(seed, demo, symlinks=True, copy_function=shutil.copyfile)
        demo.chmod(0o700)  # copytree() copies the mode, too, and `seed` may be read-only
        if not (demo / "node_modules").is_dir():
            prepare("npm install", ["npm", "install", "--no-audit", "--no-fund",
                                    "--fetch-retries=1", "--fetch-timeout=10000"], demo)
        with contextlib.ExitStack() as stack:
            ports = {name: stack.enter_context(server(["node", f"{name}.js"], demo))
                     for name in DEMO}
            yield {"users": ports["users"], "gateway": ports["api-gateway"]}


# --- the processes of others, each in a session of its own: only we send them signals

def prepare(what: str, command: list[str], folder: Path = TOP) -> None:
    """Run a command that gets packages. Raises Absent if it fails, or exceeds PACKAGE_TIME."""
    child = start(command, folder)
    try:
        output = finish(child, PACKAGE_TIME)
    except subprocess.TimeoutExpired:
        raise Absent(f"{what} takes longer than {PACKAGE_TIME:g} s") from None
    if child.returncode:
        raise Absent(f"{what} failed: {error_in(output)}")


def finish(child: subprocess.Popen, seconds: float, content: bytes | None = None) -> Any:
    """Send a process `content`, wait until it has ended, and return its output.

    If it takes longer than `seconds`, or if we are interrupted, it is killed, with all that it has
    started. Raises TimeoutExpired, whose `output` is what it has printed by then.
    """
    try:
        return child.communicate(content, seconds)[0]
    except BaseException as failure:
        with contextlib.suppress(ProcessLookupError):  # after Ctrl-C, it may have ended
            os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        if isinstance(failure, subprocess.TimeoutExpired):
            failure.output = output
        raise


@contextlib.contextmanager
def server(command: list[str], folder: Path = TOP) -> Iterator[int]:
    """Run a server; yield the port that it says. Raises Absent if it ends instead."""
    child = start(command, folder)
    try:
        listening = re.search(r"listening at http://localhost:(\d+)", child.stdout.readline())
        if not listening:
            raise Absent(f"{command[-1]} did not start: {error_in(child.stdout.read())}")
        yield int(listening[1])
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_TIME)
        child.kill()
        child.wait()
        child.stdout.close()


def start(command: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)


def error_in(output: str) -> str:
    """Return the first line that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("(?i)(npm )?err(or|!)", line)]
    return (errors or lines or ["it printed nothing"])[0]
