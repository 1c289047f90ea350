"""Chaos: clients place and cancel orders while every process is killed and stopped.

    python -m tests.chaos [--seconds 60] [--seed N] [--clients N]

The shop runs as its users run it. Each client sends an order under a key of its own until it is
answered, as a careful client would. Meanwhile faults are injected: processes are killed, and
stopped for a while; a database is locked while its service is killed; the clock of the orders
service jumps ahead by more than a day, and back. At the end the databases are compared with the
answers: no order may be lost or doubled, and the stock must add up. A run goes on until it has seen
each kind of fault and of answer, since otherwise it would prove little.

It prints what was measured, and each thing that is wrong; then the exit status is 1, and the data
folder is kept. A seed repeats the schedule of faults and what the clients order, but not how the
two interleave: that depends on the machine.
"""
import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import HTTPHandler, OpenerDirector, Request

from microshop import SERVICES
from microshop.audit import find_violations
from microshop.orders import CALL_TIME
from tests.helpers import TOP, Answered, Process

PACE = 0.4                           # seconds from one fault to the next, on average
BRIEF = (0.1, 0.5, 1.0)              # seconds for which a process is stopped
LONG = (0.1, CALL_TIME + 0.5)        # long enough for orders to give up a call that succeeds later
STOP_TIMES = {name: BRIEF for name in ("gateway", *SERVICES)} | {"products": LONG}
LOCK_TIMES = (0.5, 1.0, 2.0)         # seconds for which a database is locked
JUMP_TIMES = (0.1, 1.0, 2.0)         # seconds for which a clock is ahead
CLIENT_TIMES = (0.1, 0.3, 1.0, 3.0)  # seconds that a client waits; short ones make many repeats
CLIENT_PAUSE = 0.05                  # seconds until a client sends a request again
EXTRA_TIME = 120.0                   # seconds beyond --seconds for all to be seen
SETTLE_TIME = 60.0                   # seconds for everything to finish after the last fault
POLL = 0.05                          # seconds
PROGRESS = 5.0                       # seconds between two lines of progress
CANCELS, REPEATS = 0.5, 0.2          # shares of orders that are cancelled, and that are sent again

UNABLE_TO_START = "exit status 1 before it was ready"  # in a line of the supervisor
SEED_ORDERS = {201, 202}
NO_USER, NO_PRODUCT = 999_999, 999_999
MOUSE_STOCK = 1_000_000
SUPPLIED = {101: 101, 102: MOUSE_STOCK + 1}  # laptops run out, mice do not; each has a seed order
TOO_MANY = 2 * MOUSE_STOCK

# The states in which an order may end, by the status of the answer to POST and to its cancellation.
FINAL = {201: {"confirmed"}, 202: {"confirmed", "rejected"}, 409: {"rejected"}, 422: {"rejected"}}
CANCELLED = {200: {"cancelled"}, 202: {"cancelled"}, 409: {"rejected"}}


class Violation(Exception):
    """Something that must never happen, in words."""


# --- what the clients do

@dataclass
class Placed:
    """An order as its client knows it: its key, what was ordered, and the answers."""

    key: str
    wanted: dict[str, int]
    answer: Answered
    cancelled: Answered | None = None

    def __str__(self) -> str:
        text = f"{self.key} {self.wanted} was answered {self.answer.status}, order {self.id}"
        return text + (f", its cancellation {self.cancelled.status}" if self.cancelled else "")

    @property
    def id(self) -> int:
        return int(self.answer.headers["location"].rpartition("/")[2])

    @property
    def may_be_cancelled(self) -> bool:
        return self.answer.status < 300 and not self.cancelled

    @property
    def allowed(self) -> set[str]:
        """The states in which the order may end, after what its client was answered."""
        if self.cancelled:
            return CANCELLED[self.cancelled.status]
        return FINAL[self.answer.status]


opener = OpenerDirector()  # bare: it follows no redirect, and opens a new connection each time
opener.add_handler(HTTPHandler())


def ask(port: int, method: str, target: str, content: Any = None,
        timeout: float = max(CLIENT_TIMES), **headers: str) -> Answered | None:
    """Ask the gateway; None if no answer came, or one that says that the service gave none."""
    body = None if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = Request(f"http://127.0.0.1:{port}{target}", body, headers, method=method)
    try:
        with opener.open(request, timeout=timeout) as response:
            received = {name.lower(): value for name, value in response.headers.items()}
            answered = Answered(response.status, received, response.read())
    except (OSError, HTTPException):
        return None
    return None if answered.status in (502, 503, 504) else answered


class Client(threading.Thread):
    """Places orders until `ending` is set, and sends each until it is answered or `over` is set."""

    def __init__(self, number: int, port: int, seed: int,
                 ending: threading.Event, over: threading.Event):
        super().__init__(name=f"client{number}")
        self.port, self.ending, self.over = port, ending, over
        self.dice = random.Random(f"{seed} {number}")  # decides what is ordered
        self.nerves = random.Random()  # decides how long to wait, so that `dice` can be repeated
        self.placed: list[Placed] = []
        self.retries = self.replays = 0
        self.violation = ""

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self.trade()
        except Violation as violation:
            self.violation = str(violation)
        except Exception as error:
            self.violation = f"{self.name}: {error!r}"
        finally:
            self.ending.set()

    def trade(self) -> None:
        """Place an order; perhaps cancel one; perhaps send an earlier one again."""
        wanted = self.choose_order()
        cancels, repeats = self.dice.random() < CANCELS, self.dice.random() < REPEATS
        key = f"{self.name}-{len(self.placed)}"
        newest = Placed(key, wanted, self.send(key, wanted))
        self.placed.append(newest)
        if cancels and (live := [order for order in self.placed if order.may_be_cancelled]):
            order = self.dice.choice((live[-1], self.dice.choice(live)))  # the last may be pending
            order.cancelled = self.insist(f"/orders/{order.id}/cancel", CANCELLED)
        if repeats:
            self.send_again(self.dice.choice(self.placed))
        if newest.answer.status == 202:  # it says Retry-After; ignoring that floods the shop
            self.over.wait(CLIENT_PAUSE)

    def choose_order(self) -> dict[str, int]:
        order = {"userId": self.dice.choice((1, 2)), "productId": self.dice.choice((101, 102)),
                 "quantity": self.dice.randint(1, 3)}
        faults = [{"quantity": TOO_MANY}, {"userId": NO_USER}, {"productId": NO_PRODUCT}]
        return {**order, **self.dice.choice([{}] * 7 + faults)}

    def send(self, key: str, wanted: dict[str, int]) -> Answered:
        answer = self.insist("/orders", FINAL, wanted, **{"Idempotency-Key": key})
        if "location" not in answer.headers:
            raise Violation(f"{key} was answered without the location of an order: {answer}")
        return answer

    def send_again(self, order: Placed) -> None:
        first, again = order.answer, self.send(order.key, order.wanted)
        self.replays += 1
        is_same = (again.status, again.body) == (first.status, first.body)
        if first.status == 202:  # the order was pending then
            is_same = again.headers["location"] == first.headers["location"]
            order.answer = again
        if not is_same or again.headers.get("idempotency-replayed") != "true":
            raise Violation(f"{order}, first {first}, and then {again}")

    def insist(self, target: str, expected: Container[int], content: Any = None,
               **headers: str) -> Answered:
        """Send a POST until its answer is certain. Raises Violation if that is not `expected`."""
        while not self.over.is_set():
            timeout = self.nerves.choice(CLIENT_TIMES)
            answer = ask(self.port, "POST", target, content, timeout, **headers)
            if answer and not (answer.status == 409 and "retry-after" in answer.headers):
                if answer.status in expected:
                    return answer
                raise Violation(f"POST {target} {headers or self.name} was answered {answer}")
            self.retries += 1
            self.over.wait(CLIENT_PAUSE)
        raise Violation(f"POST {target} {headers or self.name} had no answer {SETTLE_TIME:g} s "
                        "after the last fault")


# --- what is done to the shop

# Faults that are not signals; those of the clock are handled in tests/jumping/sitecustomize.py.
LOCK, UNLOCK = "lock", "unlock"
AHEAD, BACK = signal.SIGUSR1, signal.SIGUSR2

Kind = signal.Signals | str


class Fault(NamedTuple):
    """A fault to inject into the process `name`, `at` seconds of its round."""

    at: float
    name: str
    kind: Kind


def schedule_round(dice: random.Random) -> list[Fault]:
    """Schedule faults in any order: each process is killed once and stopped once, one database is
    locked, and the clock of the orders service jumps.
    """
    faults, at = [], 0.0
    kinds: list[tuple[str, Kind]] = [
        (name, kind) for name in STOP_TIMES for kind in (signal.SIGKILL, signal.SIGSTOP)]
    kinds += [(dice.choice(list(SERVICES)), LOCK), ("orders", AHEAD)]
    for name, kind in dice.sample(kinds, len(kinds)):
        at += dice.uniform(0, 2 * PACE)
        faults.append(Fault(at, name, kind))
        if kind == signal.SIGKILL:
            continue
        ends = {signal.SIGSTOP: (signal.SIGCONT, STOP_TIMES[name]), LOCK: (UNLOCK, LOCK_TIMES),
                AHEAD: (BACK, JUMP_TIMES)}
        end, lengths = ends[kind]
        length = dice.choice(lengths)
        faults.append(Fault(at + length, name, end))
        at += dice.choice((0, length))  # so that half of them do not meet the next fault
    return sorted(faults, key=lambda fault: fault.at)


class Shop(Process):
    """The shop as a person starts it, with faults to inject. No process outlives close()."""

    def __init__(self, folder: Path):
        super().__init__("microshop.run_all", "--port", "0", "--data", str(folder), "--quiet",
                         "--no-live", PYTHONPATH=str(TOP / "tests/jumping"))
        self.folder = folder
        self.known: set[int] = set()
        self.locks: dict[str, sqlite3.Connection] = {}

    def children(self) -> dict[str, int]:
        """Return the pids of its processes by name, without zombies.

        Those that the supervisor left behind when it was killed are there too.
        """
        table = subprocess.check_output(
            ["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="], text=True)
        rows = re.findall(r"(?m)^ *(\d+) +(\d+) .* -m microshop\.([a-z_]+) --supervised ", table)
        found = {name: int(pid) for pid, parent, name in rows
                 if int(parent) == self.popen.pid or int(pid) in self.known}
        self.known.update(found.values())
        return found

    def inject(self, name: str, kind: Kind) -> None:
        if kind == LOCK:
            self.lock(name)
        elif kind == UNLOCK:
            self.locks.pop(name).close()
        else:
            self.send(name, kind)

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process; wait for it if it is just being started again."""
        def is_sent() -> bool:
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(self.children()[name], number)
                return True
            # It was killed meanwhile, so that it is not stopped any more, and its clock is right.
            return number in (signal.SIGCONT, BACK)
        wait_until(is_sent, f"{name} to be started again")

    def lock(self, name: str) -> None:
        """Lock a database against writes, as a backup might, and kill its service meanwhile."""
        lock = sqlite3.connect(
            self.folder / f"{name}.db", timeout=SETTLE_TIME, isolation_level=None)
        self.locks[name] = lock
        lock.execute("BEGIN IMMEDIATE")
        self.send(name, signal.SIGKILL)

    def repair(self) -> None:
        """Undo the faults that last."""
        for name in [*self.locks]:
            self.inject(name, UNLOCK)
        for number in (signal.SIGCONT, BACK):
            self.send_all(number)

    def send_all(self, number: signal.Signals) -> None:
        for pid in self.children().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def count(self, pattern: str) -> Counter[str]:
        """Count the supervisor's lines that match, by the process that they are about."""
        found = (re.match(rf"run_all +\| (\w+) {pattern}", line) for line in self.lines)
        return Counter(match[1] for match in found if match)

    def close(self) -> None:
        self.repair()
        try:
            super().close()
        finally:
            self.send_all(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition that no event announces. Raises Violation if it does not come true."""
    deadline = time.monotonic() + SETTLE_TIME
    while not condition():
        if time.monotonic() > deadline:
            raise Violation(f"waited {SETTLE_TIME:g} s in vain for {what}")
        threading.Event().wait(POLL)


# --- what must hold in the end

def query(folder: Path, name: str, statement: str) -> list[dict]:
    """Read a service's database as the audit does, not through the service."""
    uri = f"{(folder / name).absolute().as_uri()}.db?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(statement)]


def find_losses(placed: list[Placed], orders: dict[int, dict]) -> list[str]:
    """Return a line for each order that is not stored as its client was answered."""
    losses = []
    for order in placed:
        row = orders.get(order.id, {})
        is_wanted = {"key": order.key, **order.wanted}.items() <= row.items()
        if not is_wanted or row["status"] not in order.allowed:
            losses.append(f"lost: {order}, but the database has {row or 'no such order'}")
    return losses


def find_doubles(placed: list[Placed], orders: dict[int, dict]) -> list[str]:
    """Return a line for each order that no client knows, though it has no key or a known one."""
    known = SEED_ORDERS | {order.id for order in placed}
    keys = {None, *(order.key for order in placed)}
    return [f"double: {row}" for row in orders.values()
            if row["id"] not in known and row["key"] in keys]


def find_wrong_stock(orders: dict[int, dict], free: dict[int, int]) -> dict[int, int]:
    """Return by product how many units there are too many (or, below 0, too few)."""
    sold: Counter[int] = Counter()
    for row in orders.values():
        if row["status"] == "confirmed":
            sold[row["productId"]] += row["quantity"]
    excess = {product: free.get(product, 0) + sold[product] - supplied
              for product, supplied in SUPPLIED.items()}
    return {product: units for product, units in excess.items() if units}


# --- a run

@dataclass
class Report:
    """What was measured, and what was wrong."""

    seed: int
    seconds: float = 0.0
    cancels: int = 0
    replays: int = 0
    retries: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    locks: Counter[str] = field(default_factory=Counter)
    jumps: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    wrong_stock: dict[int, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    @property
    def unseen(self) -> list[str]:
        """What has not happened yet, of all that a run must have seen."""
        counts = {"cancelled order": self.cancels, "replayed answer": self.replays,
                  "retried request": self.retries, "locked database": self.locks.total(),
                  "clock that jumps": self.jumps.total()}
        counts |= {f"order answered {status}": self.answers[status] for status in (201, 409, 422)}
        for name in STOP_TIMES:
            counts |= {f"kill of {name}": self.kills[name], f"stop of {name}": self.stops[name],
                       f"restart of {name}": self.restarts[name]}
        return [what for what, count in counts.items() if not count]

    @property
    def wrong(self) -> list[str]:
        stock = [f"product {product} has {units:+} units more than it should"
                 for product, units in self.wrong_stock.items()]
        return [*self.losses, *self.doubles, *stock, *self.violations]

    def progress(self) -> str:
        return (f"{self.seconds:5.0f} s: {self.answers.total()} orders, {self.retries} retries, "
                f"{self.kills.total()} kills, {self.stops.total()} stops")

    def __str__(self) -> str:
        def by_name(counts: Counter) -> str:
            names = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            return f"{counts.total():6}  ({names})"

        return "\n".join([
            f"seconds    {self.seconds:6.1f}", f"seed       {self.seed:6}",
            f"orders     {by_name(self.answers)}", f"cancels    {self.cancels:6}",
            f"kills      {by_name(self.kills)}", f"stops      {by_name(self.stops)}",
            f"locks      {by_name(self.locks)}", f"jumps      {by_name(self.jumps)}",
            f"restarts   {by_name(self.restarts)}",
            f"retries    {self.retries:6}", f"replays    {self.replays:6}",
            f"losses     {len(self.losses):6}", f"doubles    {len(self.doubles):6}",
            f"stock off  {sum(map(abs, self.wrong_stock.values())):6}",
            *(f"WRONG: {line}" for line in self.wrong)])


class Run:
    """One run, in a data folder; `tell` gets a line of progress now and then."""

    def __init__(self, folder: Path, seconds: float, seed: int, clients: int,
                 tell: Callable[[str], object]):
        self.folder, self.seconds, self.tell = folder, seconds, tell
        self.report = Report(seed)
        self.ending, self.over = threading.Event(), threading.Event()
        self.shop = Shop(folder)
        try:
            self.shop.wait_for("ready in")
            self.port = self.shop.port("API Gateway")
        except BaseException:
            self.shop.close()
            raise
        self.clients = [Client(number, self.port, seed, self.ending, self.over)
                        for number in range(clients)]

    def buy_mice(self) -> bool:
        """Set the stock of product 102, and nothing else of it; return whether that was done."""
        found = ask(self.port, "GET", "/products/102")
        if not found or found.status != 200:
            return False
        mice = {**found.json, "stock": MOUSE_STOCK}
        del mice["id"]
        changed = ask(self.port, "PUT", "/products/102", mice)
        return changed is not None and changed.status == 200

    def run(self) -> Report:
        try:
            wait_until(self.buy_mice, "the stock of product 102 to be set")
            for client in self.clients:
                client.start()
            self.inject_faults()
            self.settle()
        except Violation as violation:
            self.report.violations.append(str(violation))
        finally:
            self.end()
        try:
            self.judge()
        except sqlite3.Error as error:
            self.report.violations.append(f"the databases cannot be read: {error}")
        return self.report

    def inject_faults(self) -> None:
        """Inject faults round after round, until all has been seen or a client has ended."""
        dice, began, told = random.Random(self.report.seed), time.monotonic(), time.monotonic()
        while True:
            round_began = time.monotonic()
            for at, name, kind in schedule_round(dice):
                if self.ending.wait(max(0, round_began + at - time.monotonic())):
                    return
                self.shop.inject(name, kind)
                self.report.stops[name] += kind == signal.SIGSTOP
                self.report.locks[name] += kind == LOCK
                self.report.jumps[name] += kind == AHEAD
                now = time.monotonic()
                self.measure(now - began)
                if self.is_done():
                    return
                if now > told + PROGRESS:
                    self.tell(self.report.progress())
                    told = now

    def is_done(self) -> bool:
        """Tell whether the time is over and enough was seen, or is not going to be."""
        unseen, seconds = self.report.unseen, self.report.seconds
        if unseen and seconds > self.seconds + EXTRA_TIME:
            self.report.violations.append(f"not seen in {seconds:.0f} s: {', '.join(unseen)}")
            return True
        return seconds >= self.seconds and not unseen

    def measure(self, seconds: float) -> None:
        """Count what has happened so far."""
        report, placed = self.report, self.placed()
        report.seconds = seconds
        report.answers = Counter(order.answer.status for order in placed)
        report.cancels = sum(order.cancelled is not None and order.cancelled.status != 409
                             for order in placed)
        report.retries = sum(client.retries for client in self.clients)
        report.replays = sum(client.replays for client in self.clients)
        report.kills = self.shop.count("was killed by signal 9 ")
        report.restarts = self.shop.count(".*; starting it again")

    def placed(self) -> list[Placed]:
        return [order for client in self.clients for order in client.placed]

    def settle(self) -> None:
        """Inject no more faults, and wait until every client is answered and no work is left."""
        self.tell("no more faults: waiting until every order is finished")
        self.shop.repair()
        self.ending.set()
        wait_until(lambda: not any(client.is_alive() for client in self.clients),
                   "every client to be answered")
        wait_until(self.is_healthy, "every process to be healthy")
        self.shop.inject("orders", signal.SIGKILL)  # a start resumes all orders, without a backoff
        wait_until(self.is_settled, "every order to be finished")
        wait_until(self.is_healthy, "every process to be healthy again")

    def is_healthy(self) -> bool:
        answered = ask(self.port, "GET", "/health")
        return bool(answered) and answered.json["status"] == "ok"

    def is_settled(self) -> bool:
        """Tell whether the saga has no work left, for rejected orders either: no answer says so."""
        unfinished = "SELECT id FROM orders WHERE due IS NOT NULL LIMIT 1"
        return not query(self.folder, "orders", unfinished)

    def end(self) -> None:
        """Stop the shop, and check that none of its processes is left."""
        self.ending.set()
        self.over.set()
        for client in self.clients:
            if client.ident:  # else it was never started
                client.join()
        self.shop.close()
        self.report.violations += [client.violation for client in self.clients if client.violation]
        with contextlib.suppress(Violation):
            wait_until(lambda: not self.shop.children(), "its processes to end")
        if self.shop.popen.returncode or self.shop.children():
            self.report.violations.append(
                f"the shop ended with exit status {self.shop.popen.returncode}, "
                f"and these processes were left: {self.shop.children()}")

    def judge(self) -> None:
        """Compare what is stored with what was answered."""
        report, placed = self.report, self.placed()
        self.measure(report.seconds)
        orders = {row["id"]: row for row in query(
            self.folder, "orders",
            "SELECT id, key, userId, productId, quantity, status FROM orders")}
        free = {row["id"]: row["stock"] for row in query(
            self.folder, "products", "SELECT id, stock FROM products")}
        report.losses = find_losses(placed, orders)
        report.doubles = find_doubles(placed, orders)
        report.wrong_stock = find_wrong_stock(orders, free)
        report.violations += find_violations(self.folder)
        report.violations += [line for line in self.shop.lines if UNABLE_TO_START in line]


def run(seconds: float, seed: int, clients: int,
        tell: Callable[[str], object] = lambda text: None) -> Report:
    """Run in a temporary folder. If something is wrong it is kept, with the shop's output."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        stack.callback(shutil.rmtree, folder)
        chaos = Run(folder, seconds, seed, clients, tell)
        report = chaos.run()
        if report.wrong:
            stack.pop_all()
            (folder / "shop.log").write_text("\n".join(chaos.shop.lines))
            report.violations.append(f"the databases and the log are kept in {folder}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill and stop processes while clients place orders, and count the losses.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to inject faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000),
                        help="repeats a schedule of faults")
    parser.add_argument("--clients", type=int, default=12, help="how many place orders")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    report = run(options.seconds, options.seed, options.clients, partial(print, flush=True))
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
