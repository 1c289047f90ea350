"""Soak: five minutes of one shop in a hostile world. Whatever comes, it serves the others, and forgets nothing.

    python -m tests.soak [--seconds 300] [--seed N]

The shop runs as its users run it, but for its access log. Each scene takes its share of the time, measures, and prints
one line; what was out of bounds is told at the end, and then the exit status is 1. In a short run the counts are
smaller. Clients are coroutines on one selector, and speak to 127.0.0.1 alone.

They compete with the shop for the cores, and so does whatever else runs on the machine: on two cores the seconds, the
percentiles and above all the scene "overload" are worse than with clients elsewhere, although its generator is a
process of its own. Counts, and what the product's own limits decide (408, 503, who is closed), do not depend on that.
"""
import argparse
import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from microshop.audit import find_breaches
from microshop.products import Products
from tests import bench, chaos, load
from tests.helpers import Answered

try:
    import resource
except ImportError:  # Windows
    resource = None

PATIENCE = 20.0                           # seconds after which what is waited for does not come
AT_ONCE = 1.0                             # seconds
SLOW_CLIENTS, SLOW_REQUESTS = 500, 10_000
PIECE, PAUSE = (1, 9), (0.01, 0.09)       # bytes that a slow client sends at once, and seconds until the next
# What a second crowd may leave in a process: each of eight connections to a database is opened when first needed.
MORE = {"{:+} threads": 0, "{:+} descriptors": 16, "{:+.1f} MiB": 16}
IDLE, NEWCOMERS, MOST = 1000, 100, 1024   # connections; the last is the default of --max-connections
IDLE_MEMORY = 64                          # KiB for each
DRIPS, SILENT = 20, 10                    # connections of each kind
CUT_OFF, SILENCE = (10, 11.5), (60, 63.5)  # seconds until those are closed: the system's timer adds up to a twentieth
CLIENTS = 16                              # of the constant load
CLIENT_PAUSES = (0.3, 0.01, 0.01, 0.01)   # seconds to the next request: one in four idles for so long that it is closed
KILL_PAUSE = (1.5, 4.0)                   # seconds; who is killed more often is started again later and later
BACK = (10, 21)                          # seconds until a process that was stopped is back, with the longest pause
OVERLOAD, LEAST_OF_PEAK = 2, 0.8          # times what 64 connections reach
GRACE = 10                                # seconds, the default of --grace

BODY = b"Host: shop\r\nContent-Type: application/json\r\nContent-Length: "
GETS = [b"GET /%s HTTP/1.1\r\nHost: shop\r\n\r\n" % target for target in (b"users", b"products/101", b"orders/201")]
PUT = b"PUT /users/2 HTTP/1.1\r\n" + BODY + b'14\r\n\r\n{"name":"Bob"}'
BOUGHT = '{"userId":1,"productId":1001}'
OFFERED = re.compile("[0-9a-f]{16}-[0-9]+")  # a key that load.requests() makes up: nobody keeps the books of those
ORDER = b"POST /orders HTTP/1.1\r\nIdempotency-Key: %s\r\n" + BODY + b'29\r\n\r\n{"userId":1,"productId":1001}'
LARGE = b"GET /products?limit=1000 HTTP/1.1\r\nHost: shop\r\n\r\n" * 40  # 9 MB of answers: no kernel takes so much
FILL = f"INSERT INTO products VALUES (?, '{'Lamp' * 50}', 1000000, 1000000)"


# --- what is reported

class Figure:
    """Numbers and what they are of, like "{} of 5 came": wrong where one is below `least` or above `most`.

    NaN is a number that nobody knows.
    """

    def __init__(self, text: str, *values: float, least: float = -math.inf, most: float = math.inf):
        self.text, self.bounds = text.format(*values), f"{least:g} to {most:g}"
        self.is_wrong = any(value < least or value > most for value in values)

    @classmethod
    def none(cls, text: str, faults: Sequence[object]) -> "Figure":
        """Count what must not be, and show the first."""
        figure = cls("{} " + text, len(faults), most=0)
        figure.text += "".join(f" [{fault}]" for fault in faults[:1])
        return figure


class Report:
    """Prints what each scene has measured, and gathers what was wrong."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def note(self, scene: str, figures: Sequence[Figure]) -> None:
        print(f"{scene:8}  {', '.join(figure.text for figure in figures)}", flush=True)
        self.wrong += [f"{scene}: {figure.text} (bounds: {figure.bounds})" for figure in figures if figure.is_wrong]


# --- what processes hold

class Holding(NamedTuple):
    """Threads and descriptors of a process, without those of pooled connections, and MiB of its memory."""

    threads: int
    files: int
    memory: float


HAS_PROC = Path("/proc/self/task").is_dir() and Path("/proc/net/tcp").exists()


def hold_of(pid: int, ports: Sequence[int] = ()) -> Holding:
    """Return what a process holds. `ports` are the services': where only the shop asks them, that is its pools."""
    if not HAS_PROC:
        return Holding(math.nan, math.nan, math.nan)
    process, files, ends = Path(f"/proc/{pid}"), [], [f"0100007F:{port:04X}" for port in ports]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    serving, asking = [{f"socket:[{row[9]}]" for row in rows if row[end] in ends and row[3] != "0A"}  # that is LISTEN
                       for end in (1, 2)]
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            files.append(os.readlink(link))
    memory = int((process / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return Holding(len(list((process / "task").iterdir())) - len(serving.intersection(files)),
                   len([file for file in files if file not in serving | asking]), memory)


def find_growth(before: dict[str, Holding], after: dict[str, Holding]) -> list[Figure]:
    """Return how much more is held by the process, of those by name, in which it has grown most."""
    return [Figure(f"{text} ({name})", more, most=most) for kind, (text, most) in enumerate(MORE.items())
            for more, name in [max((now[kind] - before[name][kind], name) for name, now in after.items())]]


# --- clients

class Connection:
    """A client's connection; where it is not open, ask() opens it."""

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

    async def read(self) -> Answered:
        """Read an answer. Raises OSError or EOFError; an IncompleteReadError expects 1 where not a byte has come."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readexactly(1) + await self.reader.readuntil(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return Answered(int(line.split()[1]), headers, body)

    async def ask(self, request: bytes) -> Answered:
        if not self.is_open:
            await self.open()
        self.writer.write(request)
        return await self.read()


async def until(condition: Callable[[], object]) -> None:
    """Look again and again, for what nothing tells, but not for ever."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.05)


async def ask_slowly(port: int, requests: Iterable[bytes], dice: random.Random) -> Counter:
    """Send requests in small pieces; return how often each answer came."""
    told, client = Counter(), Connection(port)
    try:
        await client.open()
        for request in requests:
            while request:
                size = dice.randint(*PIECE)
                client.writer.write(request[:size])
                request = request[size:]
                await asyncio.sleep(dice.uniform(*PAUSE))
            answered = await client.read()
            told[answered.status if answered.status < 300 else f"{answered.status}: {answered.json['detail']}"] += 1
    except (OSError, EOFError) as error:
        told[repr(error)] += 1
    client.close()
    return told


async def crowd(port: int, count: int, requests: int, dice: random.Random,
                asks: Sequence[bytes] = (*GETS * 3, PUT)) -> Counter:
    """Let so many clients come at once and send so many requests slowly; each fifth is silent, half-open or deaf.

    Return how often each answer came.
    """
    with contextlib.ExitStack() as stack:
        for said in itertools.islice(itertools.cycle((LARGE, *(b"", GETS[0][:9], GETS[0][:30]) * 6)), count // 5):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(said)
        slow = count - count // 5
        shares = [dice.choices(asks, k=requests * (n + 1) // slow - requests * n // slow) for n in range(slow)]
        return sum(await asyncio.gather(*(ask_slowly(port, share, dice) for share in shares)), Counter())


async def drip(port: int, start: bytes, drop: bytes, seconds: float) -> tuple[float, int | None]:
    """Send a start, and a drop each second. Return the seconds until it was closed, and the status that was told.

    It is 0 if nothing was told, and None if it is still open after so many `seconds`.
    """
    client, began = await Connection(port).open(), time.monotonic()
    client.writer.write(start)
    answer = asyncio.ensure_future(client.reader.read())
    while (now := time.monotonic()) < began + seconds and not answer.done():
        await asyncio.wait([answer], timeout=min(1, began + seconds - now))
        client.writer.write(drop)
    took, status = time.monotonic() - began, int(answer.result()[9:12] or 0) if answer.done() else None
    answer.cancel()
    client.close()
    return took, status


class Load:
    """Clients that ask the gateway all the time and place orders, half of them on a new connection each time.

    What is closed before any byte of an answer, on a connection that has served before, is sent once more on a new
    one, as clients do (RFC 9112 9.3.1): the server may close just when a request is on its way.
    """

    def __init__(self, port: int):
        self.port, self.count, self.retries, self.is_over = port, 0, 0, False
        self.failed: list[str] = []
        self.keys: set[str] = set()
        self.placed: dict[int, str] = {}  # the orders that were acknowledged, by id, with their keys

    async def run(self, pause: float, keeps: bool) -> None:
        client = Connection(self.port)
        for request in itertools.cycle([*GETS, ORDER]):
            if self.is_over:
                break
            key = random.randbytes(8).hex()
            self.keys.add(key)
            answered = await self.ask(client, request.replace(b"%s", key.encode()))
            if answered and request == ORDER:
                self.placed[int(answered.headers["location"].rpartition("/")[2])] = key
            if not keeps:
                client.close()
            await asyncio.sleep(pause)
        client.close()

    async def ask(self, client: Connection, request: bytes) -> Answered | None:
        """Return the answer if it is a success."""
        self.count += 1
        while True:
            was_open = client.is_open
            try:
                answered = await client.ask(request)
            except (OSError, EOFError) as error:
                client.close()
                if was_open and not isinstance(error, TimeoutError) and getattr(error, "expected", 1) == 1:
                    self.retries += 1
                    continue
                answered = Answered(0, {}, repr(error).encode())
            if answered.status // 100 == 2:
                return answered
            self.failed.append(f"{request.partition(b' HTTP')[0].decode()}: {answered.status} {answered.body.decode()}")
            return None


def offer(port: int, rate: float, seconds: float) -> tuple[Counter, list[float]]:
    return load.offer(port, rate, seconds, load.requests(port, "/orders", BOUGHT))


# --- the scenes

class Soak:
    """One shop, and what it is put through. A scene takes about so many seconds, and returns what it has measured."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.dice, self.loads, self.report = folder, random.Random(seed), [], Report()
        bench.fill(Products, str(folder), FILL, range(1001, 2001))
        self.shop = chaos.Shop(folder)

    def run(self, seconds: float) -> None:
        try:
            self.shop.wait_for("ready in")
            self.port, *self.ports = [self.shop.port(title) for title in (
                "API Gateway", "Users service", "Products service", "Orders service")]
            for scene, share in SCENES.items():
                if self.shop.popen.poll() is not None:
                    self.report.wrong.append(f"{scene.__name__}: the shop has ended, {self.shop.lines[-3:]}")
                    break
                try:
                    figures = asyncio.run(scene(self, share * seconds))
                except (AssertionError, OSError, EOFError, LookupError, chaos.Fault, ExceptionGroup) as fault:
                    figures = [Figure.none("time broken off", [repr(fault)])]
                self.report.note(scene.__name__, figures)
        finally:
            self.shop.close()

    async def slow(self, seconds: float) -> list[Figure]:
        """Slow clients are served, and nothing is left of them: one crowd fills the pools, and another is judged."""
        requests, fresh = round(SLOW_REQUESTS * min(1, seconds / 60)), self.holdings()
        for _ in range(2):
            before, began = self.holdings(), time.monotonic()
            told = await crowd(self.port, SLOW_CLIENTS, requests, self.dice)
            took = time.monotonic() - began
            await until(lambda: not any(now.threads > fresh[name].threads for name, now in self.holdings().items()))
        return [Figure(f"{{}} of {requests} requests of {SLOW_CLIENTS} clients answered 200", told.pop(200, 0),
                       least=requests), Figure.none("kinds of other answers", told.most_common()),
                Figure("in {:.1f} s", took), *find_growth(before, self.holdings())]

    async def idle(self, seconds: float) -> list[Figure]:
        """Idle connections cost little and make room for newcomers; busy ones do not, and newcomers are told so."""
        port, pid, excess = self.ports[0], self.shop.children()["users"], IDLE + NEWCOMERS - MOST
        clients = [Connection(port) for _ in range(IDLE + NEWCOMERS)]
        before = hold_of(pid).memory
        for client in clients[:IDLE]:
            await client.ask(GETS[0])
        each = (hold_of(pid).memory - before) * 1024 / IDLE
        welcome = [(await client.ask(GETS[0])).status for client in clients[IDLE:]]
        await until(lambda: sum(client.reader.at_eof() for client in clients) >= excess)
        closed = [number for number, client in enumerate(clients) if client.reader.at_eof()]
        for client in clients:
            client.writer.write(GETS[0][:9])
        await asyncio.sleep(AT_ONCE)  # nothing tells when all of that has been read
        began = time.monotonic()
        refusal = await Connection(port).ask(GETS[0])
        took = time.monotonic() - began
        for client in clients:
            client.close()
        return [Figure(f"{{:.1f}} KiB for each of {IDLE} connections", each, most=IDLE_MEMORY),
                Figure(f"{{}} of {NEWCOMERS} more answered 200", welcome.count(200), least=NEWCOMERS),
                Figure("{} closed for them", len(closed), least=excess, most=excess),
                Figure.none("not the longest idle", [number for number in closed if number >= excess]),
                Figure("when all are busy told {}", refusal.status, least=503, most=503),
                Figure("after {:.3f} s", took, most=AT_ONCE),
                Figure.none("without Retry-After", [refusal] * ("retry-after" not in refusal.headers))]

    async def drips(self, seconds: float) -> list[Figure]:
        """Who sends a byte each second is told when its time is up, and who says nothing is closed later."""
        body, watched = b"POST /users HTTP/1.1\r\n" + BODY + b"100\r\n\r\n", seconds - 1
        ends = await asyncio.gather(
            *(drip(self.port, start, b"G", PATIENCE) for start in (b"G", body) for _ in range(DRIPS)),
            *(drip(self.port, b"", b"", watched) for _ in range(SILENT)))
        figures = []
        for what, status, bounds, some in (
                ("heads told 408", 408, CUT_OFF, ends[:DRIPS]), ("bodies told 408", 408, CUT_OFF, ends[DRIPS:-SILENT]),
                ("silent ones closed", 0, SILENCE, ends[-SILENT:]) if watched > SILENCE[1] else
                ("silent ones open", None, (watched, seconds), ends[-SILENT:])):
            times = [took for took, told in some if told == status] or [math.inf]
            figures += [Figure(f"{{}} of {len(some)} {what}", len(times), least=len(some)),
                        Figure("after {:.2f} to {:.2f} s", min(times), max(times), least=bounds[0], most=bounds[1])]
        return figures

    async def restarts(self, seconds: float) -> list[Figure]:
        """Every process is replaced by a new one, again and again, and no client notices."""
        end, times, before = time.monotonic() + seconds, 0, self.shop.children()
        async with self.loaded() as clients:
            while time.monotonic() < end and self.said("every process has been replaced") == times:
                self.shop.popen.send_signal(signal.SIGHUP)
                times += 1
                await until(lambda times=times: self.said("every process has been replaced") == times)
        return [Figure(f"{{}} of {times} renewals done", self.said("every process has been replaced"), least=times),
                Figure.none("old processes", [pid for pid in self.shop.children().values() if pid in before.values()]),
                Figure.none(f"of {clients.count} requests failed", clients.failed),
                Figure("{} sent again", clients.retries)]

    async def kills(self, seconds: float) -> list[Figure]:
        """Processes are killed and stopped: requests may fail, but what was acknowledged is there, and once."""
        end, names, kills, times = time.monotonic() + seconds, self.dice.sample(sorted(chaos.STOPS), 4), 0, []
        async with self.loaded() as clients:
            while not times or time.monotonic() + max(times) < end:
                stopped, _, *others = names  # the second is spared: who is stopped next must not come back late
                stop = asyncio.create_task(self.hit(stopped, signal.SIGSTOP))
                while not stop.done():
                    await self.hit(self.dice.choice(others), signal.SIGKILL)
                    await asyncio.wait([stop], timeout=self.dice.uniform(*KILL_PAUSE))
                    kills += 1
                times.append(stop.result())
                names = [*names[1:], stopped]
        await self.hit("orders", signal.SIGKILL)  # at its start all that is left undone is due at once
        await until(lambda: not chaos.query(self.folder, "orders", "SELECT id FROM orders WHERE due IS NOT NULL"))
        return [Figure(f"{{}} killed, {len(times)} stopped", kills + 1),
                Figure("which are back after {:.1f} to {:.1f} s", min(times), max(times), least=BACK[0], most=BACK[1]),
                Figure(f"{{}} of {clients.count} requests failed", len(clients.failed)),
                Figure("{} sent again", clients.retries), *self.books()]

    async def overload(self, seconds: float) -> list[Figure]:
        """Twice as much is asked as can be answered: the rest is refused, and what is answered is so in good time."""
        peak = bench.load(self.port, 64, seconds / 3, "/orders", BOUGHT)["rps"]
        before = self.said("killing it|starting it again")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as generator:
            told, times = generator.submit(offer, self.port, OVERLOAD * peak, seconds / 2).result()
        rate, offered = len(times) / (seconds / 2), told.total() + len(times)
        return [Figure(f"peak {peak:.0f}/s, offered {{:.0f}}/s", offered / (seconds / 2)),
                Figure("answered {:.0f}/s", rate), Figure("{:.0%} of the peak", rate / peak, least=LEAST_OF_PEAK),
                Figure("p50 {:.3f} s", times[len(times) // 2]),
                Figure("p99 {:.3f} s", times[len(times) * 99 // 100], most=AT_ONCE),
                *(Figure(f"{{:.1%}} {what}", count / offered) for what, count in told.items() if count),
                Figure("{} processes given up by the supervisor", self.said("killing it|starting it again") - before,
                       most=0)]

    async def end(self, seconds: float) -> list[Figure]:
        """After Ctrl-C the shop ends in its time, and leaves nothing but its files, in which all is as it should be."""
        began = time.monotonic()
        self.shop.popen.send_signal(signal.SIGINT)
        await until(lambda: self.shop.popen.poll() is not None)
        took, status = time.monotonic() - began, self.shop.popen.poll()
        return [Figure("exit status {}", -1 if status is None else status, least=0, most=0),
                Figure("after {:.2f} s", took, most=GRACE),
                Figure.none("processes left", list(self.shop.children())),
                Figure.none("-wal files left", [path.name for path in self.folder.glob("*-wal")]), *self.books()]

    # --- what scenes are made of

    def holdings(self) -> dict[str, Holding]:
        pids = {"run_all": self.shop.popen.pid, **self.shop.children()}
        return {name: hold_of(pid, self.ports) for name, pid in pids.items()}

    def said(self, pattern: str) -> int:
        """Count the lines like this that the shop has printed."""
        return sum(bool(re.search(pattern, line)) for line in self.shop.lines)

    @contextlib.asynccontextmanager
    async def loaded(self) -> AsyncIterator[Load]:
        """Keep the gateway busy meanwhile."""
        self.loads.append(clients := Load(self.port))
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(clients.run(CLIENT_PAUSES[number % 4], keeps=number % 2 == 0))
            try:
                yield clients
            finally:
                clients.is_over = True

    async def hit(self, name: str, number: signal.Signals) -> float:
        """Kill or stop a process; return the seconds until another listens in its place."""
        began, before = time.monotonic(), self.said(f"^{name} .* listening at ")
        await asyncio.to_thread(self.shop.hit, name, number)
        await until(lambda: self.said(f"^{name} .* listening at ") > before)
        return time.monotonic() - began

    def books(self) -> list[Figure]:
        """Compare what is in the books with what clients were told."""
        orders = {row["id"]: row["key"] for row in chaos.query(self.folder, "orders", "SELECT id, key FROM orders")
                  if row["id"] not in chaos.SEED_ORDERS and not OFFERED.fullmatch(row["key"] or "")}
        placed = {order: key for clients in self.loads for order, key in clients.placed.items()}
        sent = set().union(*(clients.keys for clients in self.loads)) - set(placed.values())
        return [Figure.none(f"of {len(placed)} orders lost", [id for id in placed if orders.get(id) != placed[id]]),
                Figure.none("doubled", [id for id in orders if id not in placed and orders[id] not in sent]),
                Figure.none("breaches", find_breaches(self.folder))]


SCENES = {Soak.slow: 0.2, Soak.idle: 0.06, Soak.drips: 0.24, Soak.restarts: 0.12, Soak.kills: 0.26, Soak.overload: 0.12,
          Soak.end: 0}  # in this order, each with its share of the time


def run(seconds: float, seed: int) -> Report:
    with tempfile.TemporaryDirectory(prefix="microshop-soak-") as folder:
        soak = Soak(Path(folder), seed)
        soak.run(seconds)
    return soak.report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all scenes together; at least 60")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of what is asked and who is hit")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # else it tells of each piece that is written too late
    if resource:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if most == resource.RLIM_INFINITY else min(most, 4096), most))
    print(f"seed {options.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
          "" if HAS_PROC else "(without /proc threads, descriptors and memory are NOT JUDGED)", flush=True)
    report = run(options.seconds, options.seed)
    print("".join(f"WRONG: {line}\n" for line in report.wrong), end="")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
