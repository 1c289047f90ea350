"""Soak: one shop, five minutes of hostile clients, kills and overload; it must serve all others.

    python -m tests.soak [--seconds 300] [--seed N]

The shop runs as its users run it, but without an access log. Each scene takes its share of the
time, measures, and prints one line. Figures out of bounds are listed at the end, and then the exit
status is 1. In a shorter run the counts are smaller. Clients are coroutines in this one process,
and talk to 127.0.0.1 only.

They compete with the shop for the cores, as does everything else on the machine. So on two cores
the seconds, the percentiles and above all the scene "overload" are worse than with clients
elsewhere, although its load generator is a process of its own. Counts, and what the product's own
limits decide (408, 503, which connection is closed), do not depend on that.
"""
import argparse
import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from microshop import SERVICES
from microshop.audit import find_violations
from microshop.chassis.turns import MAX_SPARE
from microshop.products import Products
from tests import bench, chaos, load
from tests.helpers import TOP, Answered, clean_environment, service_of

PATIENCE = 60.0                           # seconds: the bound on waits
WATCH_TIME = 20.0                         # seconds to watch a connection that sends too slowly
AT_ONCE = 1.0                             # seconds
SLOW_CLIENTS, SLOW_REQUESTS = 500, 10_000
PIECE, PAUSE = (1, 9), (0.01, 0.09)       # bytes that a slow client sends, and seconds between
# What a second crowd may leave in a process: spare threads; and descriptors, since the connections
# to a database are opened when they are first needed, with two files each.
MORE = {"{:+} threads": MAX_SPARE, "{:+} descriptors": 16, "{:+.1f} MiB": 16}
IDLE, NEWCOMERS, MOST = 1000, 100, 1024   # connections; MOST is the default of --max-connections
IDLE_MEMORY = 64                          # KiB for each
DRIPS, SILENT = 20, 10                    # connections of each kind
CUT_OFF, SILENCE = (10, 11.5), (60, 63.5)  # seconds until those are closed; timers add up to 5%
CLIENTS = 16                              # of the constant load
CLIENT_PAUSES = (0.3, 0.01, 0.01, 0.01)   # seconds until a client's next request
KILL_PAUSE = (1.5, 4.0)                   # seconds; more frequent kills make the restarts slower
BACK = (10, 21)                           # seconds until a stopped process is replaced
OVERLOAD, LEAST_OF_PEAK = 2, 0.8          # times what 64 connections reach
UNREAD = 24_000                           # lines: twice what a pipe and a process's log hold
GRACE = 10                                # seconds, the default of --grace
REPLACED = "every process has been replaced"  # lines of the supervisor
GIVEN_UP = "killing it|starting it again"

BODY = b"Host: shop\r\nContent-Type: application/json\r\nContent-Length: "
GETS = [b"GET /%s HTTP/1.1\r\nHost: shop\r\n\r\n" % target
        for target in (b"users", b"products/101", b"orders/201")]
PUT = b"PUT /users/2 HTTP/1.1\r\n" + BODY + b'14\r\n\r\n{"name":"Bob"}'
BOUGHT = '{"userId":1,"productId":1001}'
ORDER = (b"POST /orders HTTP/1.1\r\nIdempotency-Key: %s\r\n" + BODY
         + b'29\r\n\r\n{"userId":1,"productId":1001}')
OFFERED = re.compile("[0-9a-f]{16}-[0-9]+")  # a key made by load.requests(): those are not compared
# 40 requests for 9 MB of answers: more than the system buffers for a client that does not read.
LARGE = b"GET /products?limit=1000 HTTP/1.1\r\nHost: shop\r\n\r\n" * 40
FILL = f"INSERT INTO products VALUES (?, '{'Lamp' * 50}', 1000000, 1000000)"


# --- what is reported

class Figure:
    """Numbers in a text, like "{} of 5 came"; wrong if one is below `least` or above `most`.

    NaN stands for a number that this system cannot tell; it is never wrong.
    """

    def __init__(self, text: str, *values: float, least: float = -math.inf, most: float = math.inf):
        self.text, self.bounds = text.format(*values), f"{least:g} to {most:g}"
        self.is_wrong = any(value < least or value > most for value in values)

    @classmethod
    def none(cls, text: str, found: Sequence[object]) -> "Figure":
        """Count things that must not exist, and show the first."""
        figure = cls("{} " + text, len(found), most=0)
        figure.text += "".join(f" [{first}]" for first in found[:1])
        return figure


class Report:
    """Prints the figures of each scene, and keeps those that are wrong."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def note(self, scene: str, figures: Sequence[Figure]) -> None:
        print(f"{scene:8}  {', '.join(figure.text for figure in figures)}", flush=True)
        self.wrong += [f"{scene}: {figure.text} (allowed: {figure.bounds})"
                       for figure in figures if figure.is_wrong]


# --- what processes hold

class Holding(NamedTuple):
    """Threads of a process, its descriptors without pooled connections, and its MiB."""

    threads: int
    files: int
    memory: float


HAS_PROC = Path("/proc/self/task").is_dir() and Path("/proc/net/tcp").exists()


def hold_of(pid: int, ports: Sequence[int] = ()) -> Holding:
    """Return what a process holds; pooled connections to these `ports` do not count."""
    if not HAS_PROC:
        return Holding(math.nan, math.nan, math.nan)
    process, files = Path(f"/proc/{pid}"), []
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            files.append(os.readlink(link))
    pooled = pooled_sockets(ports)
    threads = len(list((process / "task").iterdir()))
    pages = int((process / "statm").read_text().split()[1])
    return Holding(threads, len([file for file in files if file not in pooled]),
                   pages * resource.getpagesize() / 2**20)


def pooled_sockets(ports: Sequence[int]) -> set[str]:
    """Return the sockets, at both ends, of connections to these ports."""
    ends = [f"0100007F:{port:04X}" for port in ports]  # as /proc/net/tcp writes 127.0.0.1
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    connections = [row for row in rows if row[3] != "0A"]  # a row of that state is a listener
    return {f"socket:[{row[9]}]" for row in connections if row[1] in ends or row[2] in ends}


def find_growth(before: dict[str, Holding], after: dict[str, Holding]) -> list[Figure]:
    """Return how much more is held, of each kind by the process that has grown most."""
    figures = []
    for kind, (text, most) in enumerate(MORE.items()):
        growth = {name: now[kind] - before[name][kind] for name, now in after.items()}
        name = max(growth, key=growth.__getitem__)
        figures.append(Figure(f"{text} ({name})", growth[name], most=most))
    return figures


# --- clients

class Connection:
    """A client's connection; ask() opens it if it is not open."""

    def __init__(self, port: int):
        self.port, self.is_open = port, False

    async def open(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.is_open = True
        return self

    def close(self) -> None:
        if self.is_open:
            self.writer.close()
        self.is_open = False

    def write(self, data: bytes) -> bool:
        """Send bytes; return False if the server has closed the connection."""
        if self.writer.transport.is_closing():
            return False
        self.writer.write(data)
        return True

    async def read(self) -> Answered:
        """Read an answer. Raises OSError or EOFError.

        If not a byte arrived, that is an IncompleteReadError which expected 1.
        """
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readexactly(1) + await self.reader.readuntil(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").split("\r\n")[:-2]
            pairs = (field.split(": ", 1) for field in fields)
            headers = {name.lower(): value for name, value in pairs}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return Answered(int(line.split()[1]), headers, body)

    async def ask(self, request: bytes) -> Answered:
        if not self.is_open:
            await self.open()
        self.write(request)
        return await self.read()


async def until(condition: Callable[[], object]) -> None:
    """Poll a condition that no event announces, for at most PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.05)


async def ask_slowly(port: int, requests: Iterable[bytes], dice: random.Random) -> Counter:
    """Send requests in small pieces; return how often each answer came."""
    answers, client = Counter(), Connection(port)
    try:
        await client.open()
        for request in requests:
            await send_slowly(client, request, dice)
            answer = await client.read()
            is_success = answer.status < 300
            answers[answer.status if is_success
                    else f"{answer.status}: {answer.json['detail']}"] += 1
    except (OSError, EOFError) as error:
        answers[repr(error)] += 1
    client.close()
    return answers


async def ask_for(port: int, seconds: float) -> int:
    """Send one request after another on one connection; return how many were answered 200."""
    client, end, count = Connection(port), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        count += (await client.ask(GETS[0])).status == 200
    client.close()
    return count


async def send_slowly(client: Connection, request: bytes, dice: random.Random) -> None:
    while request:
        size = dice.randint(*PIECE)
        if not client.write(request[:size]):
            return
        request = request[size:]
        await asyncio.sleep(dice.uniform(*PAUSE))


async def crowd(port: int, count: int, requests: int, dice: random.Random,
                asks: Sequence[bytes] = (*GETS * 3, PUT)) -> Counter:
    """Let `count` clients come at once, of which four in five send `requests` together, slowly.

    The others send nothing, or half a head, or never read their answers.
    Return how often each answer came.
    """
    unfinished = (LARGE, *(b"", GETS[0][:9], GETS[0][:30]) * 6)
    with contextlib.ExitStack() as stack:
        for start in itertools.islice(itertools.cycle(unfinished), count // 5):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(start)
        slow = count - count // 5
        sizes = [requests * (n + 1) // slow - requests * n // slow for n in range(slow)]
        shares = [dice.choices(asks, k=size) for size in sizes]
        counts = await asyncio.gather(*(ask_slowly(port, share, dice) for share in shares))
        return sum(counts, Counter())


async def drip(port: int, start: bytes, drop: bytes, seconds: float) -> tuple[float, int | None]:
    """Send a start, and then a drop each second, until the server closes or `seconds` are over.

    Return the seconds until it was closed, and the status that was answered: 0 if none was, None if
    the connection is still open.
    """
    client, began = await Connection(port).open(), time.monotonic()
    client.write(start)
    answer = asyncio.ensure_future(client.reader.read())
    while (now := time.monotonic()) < began + seconds and not answer.done():
        await asyncio.wait([answer], timeout=min(1, began + seconds - now))
        client.write(drop)
    took = time.monotonic() - began
    status = int(answer.result()[9:12] or 0) if answer.done() else None
    answer.cancel()
    client.close()
    return took, status


class Load:
    """Clients that use the gateway all the time, half of them on a new connection each time.

    A request is sent once more, on a new connection, if a connection that has served before was
    closed without a byte of an answer, as clients do (RFC 9112 9.3.1): the server may close an idle
    connection just when a request is on its way.
    """

    def __init__(self, port: int):
        self.port, self.count, self.retries, self.is_over = port, 0, 0, False
        self.failed: list[str] = []
        self.keys: set[str] = set()
        self.placed: dict[int, str] = {}  # the keys of the orders that were acknowledged, by id

    async def run(self, pause: float, keeps: bool) -> None:
        client = Connection(self.port)
        for request in itertools.cycle([*GETS, ORDER]):
            if self.is_over:
                break
            key = random.randbytes(8).hex()
            self.keys.add(key)
            answer = await self.ask(client, request.replace(b"%s", key.encode()))
            if answer and request == ORDER:
                self.placed[int(answer.headers["location"].rpartition("/")[2])] = key
            if not keeps:
                client.close()
            await asyncio.sleep(pause)
        client.close()

    async def ask(self, client: Connection, request: bytes) -> Answered | None:
        """Return the answer if it is a success; else note the failure."""
        self.count += 1
        while True:
            was_open = client.is_open
            try:
                answer = await client.ask(request)
            except (OSError, EOFError) as error:
                client.close()
                had_no_byte = getattr(error, "expected", 1) == 1
                if was_open and had_no_byte and not isinstance(error, TimeoutError):
                    self.retries += 1
                    continue
                answer = Answered(0, {}, repr(error).encode())
            if answer.status // 100 == 2:
                return answer
            line = request.partition(b" HTTP")[0].decode()
            self.failed.append(f"{line}: {answer.status} {answer.body.decode()}")
            return None


@contextlib.contextmanager
def started_unread(folder: str) -> Iterator[subprocess.Popen]:
    """Start a shop with an access log, whose output the caller may read or leave unread."""
    with subprocess.Popen(
            [sys.executable, "-m", "microshop.run_all", "--port", "0", "--data", folder],
            cwd=TOP, env=clean_environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as shop:
        try:
            yield shop
        finally:
            shop.kill()


def read_port(shop: subprocess.Popen) -> int:
    """Read what a shop prints until it is ready; return the port of its gateway."""
    for line in shop.stdout:
        if match := re.search(rb"ready in .*:([0-9]+) ", line):
            return int(match[1])
    raise EOFError("the shop ended before it was ready")


def offer(port: int, rate: float, seconds: float) -> tuple[Counter, list[float]]:
    return load.offer(port, rate, seconds, load.requests(port, "/orders", BOUGHT))


# --- the scenes

class Soak:
    """One shop, and its scenes. A scene takes about the given seconds, and returns its figures."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.dice = folder, random.Random(seed)
        self.loads: list[Load] = []
        self.report = Report()
        bench.fill(Products, str(folder), FILL, range(1001, 2001))
        self.shop = chaos.Shop(folder)

    def run(self, seconds: float) -> None:
        try:
            self.shop.wait_for("ready in")
            self.port = self.shop.port("API Gateway")
            self.ports = {name: self.shop.port(service_of(name).title) for name in SERVICES}
            for scene, share in SCENES.items():
                if self.shop.popen.poll() is not None:
                    self.report.wrong.append(
                        f"{scene.__name__}: the shop has ended, {self.shop.lines[-3:]}")
                    break
                self.report.note(scene.__name__, self.play(scene, share * seconds))
        finally:
            self.shop.close()

    def play(self, scene: Callable, seconds: float) -> list[Figure]:
        try:
            return asyncio.run(scene(self, seconds))
        except (AssertionError, OSError, EOFError, LookupError, chaos.Violation,
                ExceptionGroup) as error:
            return [Figure.none("errors that ended the scene", [repr(error)])]

    async def slow(self, seconds: float) -> list[Figure]:
        """Slow clients are served, and nothing is left of them.

        A first crowd fills the pools of connections and threads, and a second one is judged.
        """
        requests = round(SLOW_REQUESTS * min(1, seconds / 60))
        fresh = self.holdings()
        for _ in range(2):
            before, began = self.holdings(), time.monotonic()
            answers = await crowd(self.port, SLOW_CLIENTS, requests, self.dice)
            took = time.monotonic() - began
            await until(lambda: not any(now.threads > fresh[name].threads + MAX_SPARE
                                        for name, now in self.holdings().items()))
        return [Figure(f"{{}} of {requests} requests of {SLOW_CLIENTS} clients answered 200",
                       answers.pop(200, 0), least=requests),
                Figure.none("kinds of other answers", answers.most_common()),
                Figure("in {:.1f} s", took), *find_growth(before, self.holdings())]

    async def idle(self, seconds: float) -> list[Figure]:
        """Idle connections cost little, and are closed for new ones; if all are busy, 503."""
        port, pid = self.ports["users"], self.shop.children()["users"]
        excess = IDLE + NEWCOMERS - MOST
        clients = [Connection(port) for _ in range(IDLE + NEWCOMERS)]
        before = hold_of(pid).memory
        for client in clients[:IDLE]:
            await client.ask(GETS[0])
        each = (hold_of(pid).memory - before) * 1024 / IDLE
        welcome = [(await client.ask(GETS[0])).status for client in clients[IDLE:]]
        await until(lambda: sum(client.reader.at_eof() for client in clients) >= excess)
        closed = [number for number, client in enumerate(clients) if client.reader.at_eof()]
        for client in clients:
            client.write(GETS[0][:9])
        await asyncio.sleep(AT_ONCE)  # no event says that all of that has been read
        began = time.monotonic()
        refusal = await Connection(port).ask(GETS[0])
        took = time.monotonic() - began
        for client in clients:
            client.close()
        wrongly_closed = [number for number in closed if number >= excess]
        return [Figure(f"{{:.1f}} KiB for each of {IDLE} connections", each, most=IDLE_MEMORY),
                Figure(f"{{}} of {NEWCOMERS} more answered 200", welcome.count(200),
                       least=NEWCOMERS),
                Figure("{} closed for them", len(closed), least=excess, most=excess),
                Figure.none("not the longest idle", wrongly_closed),
                Figure("{} when all are busy", refusal.status, least=503, most=503),
                Figure("after {:.3f} s", took, most=AT_ONCE),
                Figure.none("without Retry-After",
                            [refusal] * ("retry-after" not in refusal.headers))]

    async def drips(self, seconds: float) -> list[Figure]:
        """A client that sends a byte per second gets 408 in time; a silent one is closed later."""
        body = b"POST /users HTTP/1.1\r\n" + BODY + b"100\r\n\r\n"
        watched = seconds - 1
        ends = await asyncio.gather(
            *(drip(self.port, start, b"G", WATCH_TIME)
              for start in (b"G", body) for _ in range(DRIPS)),
            *(drip(self.port, b"", b"", watched) for _ in range(SILENT)))
        heads, bodies, silent = ends[:DRIPS], ends[DRIPS:-SILENT], ends[-SILENT:]
        figures = [*judge_ends("heads answered 408", heads, 408, CUT_OFF),
                   *judge_ends("bodies answered 408", bodies, 408, CUT_OFF)]
        if watched > SILENCE[1]:
            return figures + judge_ends("silent ones closed", silent, 0, SILENCE)
        return figures + judge_ends("silent ones open", silent, None, (watched, math.inf))

    async def restarts(self, seconds: float) -> list[Figure]:
        """Every process is replaced by a new one, again and again, and no client notices."""
        end, times, before = time.monotonic() + seconds, 0, self.shop.children()
        async with self.loaded() as clients:
            while time.monotonic() < end and self.count(REPLACED) == times:
                self.shop.popen.send_signal(signal.SIGHUP)
                times += 1
                await until(lambda times=times: self.count(REPLACED) == times)
        old = [pid for pid in self.shop.children().values() if pid in before.values()]
        return [Figure(f"{{}} of {times} rolling restarts done", self.count(REPLACED), least=times),
                Figure.none("old processes", old),
                Figure.none(f"of {clients.count} requests failed", clients.failed),
                Figure("{} sent again", clients.retries)]

    async def kills(self, seconds: float) -> list[Figure]:
        """Processes are killed and stopped: requests may fail, but no order is lost or doubled."""
        end, kills, times = time.monotonic() + seconds, 0, []
        names = self.dice.sample(sorted(chaos.STOP_TIMES), len(chaos.STOP_TIMES))
        async with self.loaded() as clients:
            while not times or time.monotonic() + max(times) < end:
                # The next to be stopped is not killed, or its restart would be delayed.
                stopped, _, *others = names
                stop = asyncio.create_task(self.inject(stopped, signal.SIGSTOP))
                while not stop.done():
                    await self.inject(self.dice.choice(others), signal.SIGKILL)
                    await asyncio.wait([stop], timeout=self.dice.uniform(*KILL_PAUSE))
                    kills += 1
                times.append(stop.result())
                names = [*names[1:], stopped]
        await self.inject("orders", signal.SIGKILL)  # its start resumes all unfinished orders
        unfinished = "SELECT id FROM orders WHERE due IS NOT NULL"
        await until(lambda: not chaos.query(self.folder, "orders", unfinished))
        return [Figure(f"{{}} killed, {len(times)} stopped", kills + 1),
                Figure("which are back after {:.1f} to {:.1f} s", min(times), max(times),
                       least=BACK[0], most=BACK[1]),
                Figure(f"{{}} of {clients.count} requests failed", len(clients.failed)),
                Figure("{} sent again", clients.retries), *self.compare_orders()]

    async def overload(self, seconds: float) -> list[Figure]:
        """Of twice its peak load, it answers as much as its peak in time, and refuses the rest."""
        peak = bench.load(self.port, 64, seconds / 3, "/orders", BOUGHT)["rps"]
        before = self.count(GIVEN_UP)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as generator:
            offered = generator.submit(offer, self.port, OVERLOAD * peak, seconds / 2)
            failures, times = offered.result()
        rate, total = len(times) / (seconds / 2), failures.total() + len(times)
        return [Figure(f"peak {peak:.0f}/s, offered {{:.0f}}/s", total / (seconds / 2)),
                Figure("answered {:.0f}/s", rate),
                Figure("{:.0%} of the peak", rate / peak, least=LEAST_OF_PEAK),
                Figure("p50 {:.3f} s", times[len(times) // 2]),
                Figure("p99 {:.3f} s", times[len(times) * 99 // 100], most=AT_ONCE),
                *(Figure(f"{{:.1%}} {what}", count / total)
                  for what, count in failures.items() if count),
                Figure("{} processes given up by the supervisor", self.count(GIVEN_UP) - before,
                       most=0)]

    async def unread(self, seconds: float) -> list[Figure]:
        """Nothing reads the log of a second shop: no request waits for it, nor does the end."""
        with tempfile.TemporaryDirectory() as folder, started_unread(folder) as shop:
            port = read_port(shop)
            answered = await asyncio.gather(*(ask_for(port, seconds) for _ in range(CLIENTS)))
            health = await Connection(port).ask(b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n")
            began = time.monotonic()
            shop.terminate()
            await until(lambda: shop.poll() is not None)
            took = time.monotonic() - began
        lines = 2 * sum(answered)  # one of the gateway, one of the service
        return [Figure("{} requests answered", sum(answered)),
                Figure("{} lines that nothing read", lines, least=UNREAD * min(1, seconds / 15)),
                Figure("health {}", health.status, least=200, most=200),
                Figure("exit status {}", -1 if shop.returncode is None else shop.returncode,
                       least=0, most=0),
                Figure("after {:.2f} s", took, most=GRACE)]

    async def end(self, seconds: float) -> list[Figure]:
        """After Ctrl-C the shop ends within its grace period, and leaves its databases only."""
        began = time.monotonic()
        self.shop.popen.send_signal(signal.SIGINT)
        await until(lambda: self.shop.popen.poll() is not None)
        took, status = time.monotonic() - began, self.shop.popen.poll()
        return [Figure("exit status {}", -1 if status is None else status, least=0, most=0),
                Figure("after {:.2f} s", took, most=GRACE),
                Figure.none("processes left", list(self.shop.children())),
                Figure.none("-wal files left", [path.name for path in self.folder.glob("*-wal")]),
                *self.compare_orders()]

    # --- what scenes use

    def holdings(self) -> dict[str, Holding]:
        pids = {"run_all": self.shop.popen.pid, **self.shop.children()}
        return {name: hold_of(pid, list(self.ports.values())) for name, pid in pids.items()}

    def count(self, pattern: str) -> int:
        """Count the lines that the shop has printed and that match."""
        return sum(bool(re.search(pattern, line)) for line in self.shop.lines)

    @contextlib.asynccontextmanager
    async def loaded(self) -> AsyncIterator[Load]:
        """Keep the gateway busy meanwhile."""
        self.loads.append(clients := Load(self.port))
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                pause = CLIENT_PAUSES[number % len(CLIENT_PAUSES)]
                tasks.create_task(clients.run(pause, keeps=number % 2 == 0))
            try:
                yield clients
            finally:
                clients.is_over = True

    async def inject(self, name: str, number: signal.Signals) -> float:
        """Kill or stop a process; return the seconds until another listens in its place."""
        listening = rf"^{name} +\|.* listening at "
        began, before = time.monotonic(), self.count(listening)
        await asyncio.to_thread(self.shop.inject, name, number)
        await until(lambda: self.count(listening) > before)
        return time.monotonic() - began

    def compare_orders(self) -> list[Figure]:
        """Compare the stored orders with what clients were answered."""
        stored = chaos.query(self.folder, "orders", "SELECT id, key FROM orders")
        orders = {row["id"]: row["key"] for row in stored
                  if row["id"] not in chaos.SEED_ORDERS and not OFFERED.fullmatch(row["key"] or "")}
        placed = {order: key for clients in self.loads for order, key in clients.placed.items()}
        unanswered = set().union(*(clients.keys for clients in self.loads)) - {*placed.values()}
        lost = [id for id in placed if orders.get(id) != placed[id]]
        doubled = [id for id in orders if id not in placed and orders[id] not in unanswered]
        return [Figure.none(f"of {len(placed)} orders lost", lost),
                Figure.none("doubled", doubled),
                Figure.none("violations", find_violations(self.folder))]


def judge_ends(what: str, ends: Sequence[tuple[float, int | None]], expected: int | None,
               bounds: tuple[float, float]) -> list[Figure]:
    """Return how many ends of drip() are as expected, and when they came."""
    times = [took for took, status in ends if status == expected]
    first, last = min(times, default=math.inf), max(times, default=math.inf)
    return [Figure(f"{{}} of {len(ends)} {what}", len(times), least=len(ends)),
            Figure("after {:.2f} to {:.2f} s", first, last, least=bounds[0], most=bounds[1])]


SCENES = {  # in this order, each with its share of the time
    Soak.slow: 0.2, Soak.idle: 0.06, Soak.drips: 0.24, Soak.restarts: 0.12, Soak.kills: 0.22,
    Soak.overload: 0.11, Soak.unread: 0.05, Soak.end: 0}


def run(seconds: float, seed: int) -> Report:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), seed)
        soak.run(seconds)
    return soak.report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Put a shop through slow clients, restarts, kills and overload.")
    parser.add_argument("--seconds", type=float, default=300.0,
                        help="for all scenes together; at least 60")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000),
                        help="repeats the choice of requests and of processes to kill")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if most == resource.RLIM_INFINITY else min(most, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    limits = "" if HAS_PROC else " (without /proc, threads, descriptors and memory are NOT JUDGED)"
    print(f"seed {options.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores{limits}",
          flush=True)
    report = run(options.seconds, options.seed)
    print("".join(f"WRONG: {line}\n" for line in report.wrong), end="")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
