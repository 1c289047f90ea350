"""Chaos: clients place and cancel orders while every process is killed and stopped. What they were told must hold.

    python -m tests.chaos [--seconds 60] [--seed N] [--clients N]

The shop runs as its users run it. Each client sends an order under a key of its own until it has an answer, as a
careful one would; at the end the books are opened. It prints what was measured, and each thing that is wrong; then
the exit status is 1, and the data folder is kept. A seed repeats what is wanted and which process is hit when, not
how the two interleave: that is the machine's, and another each time.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import HTTPHandler, OpenerDirector, Request

from microshop.audit import find_breaches
from microshop.orders import CALL_TIME
from tests.helpers import Answered, Process

PACE = 0.4                           # seconds from one blow to the next, on average
BRIEF = (0.1, 0.5, 1.0)              # seconds that a process stands still
LONG = (0.1, CALL_TIME + 0.5)        # then orders has given up its call, which goes on all the same
STOPS = {"gateway": BRIEF, "users": BRIEF, "products": LONG, "orders": BRIEF}
CLIENT_TIMES = (0.1, 0.3, 1.0, 3.0)  # seconds that a client waits for an answer: the short ones make many twins
CLIENT_PAUSE = 0.05                  # seconds until it asks again
SETTLE_TIME = 60.0                   # seconds for all to come to its end, once there is peace
LOOK = 0.05                          # seconds between looks for that
CANCELS, RESENDS = 0.5, 0.2          # for each order placed, how many are cancelled, and are asked for again

SEED_ORDERS = {201, 202}
NOBODY, NOTHING = 999_999, 999_999           # a user and a product that are not there
MOUSE_STOCK = 1_000_000
SUPPLIED = {101: 101, 102: MOUSE_STOCK + 1}  # laptops run out, mice do not; the seed's orders hold one of each
TOO_MANY = 2 * MOUSE_STOCK

FINAL = {201: {"confirmed"}, 202: {"confirmed", "rejected"}, 409: {"rejected"}, 422: {"rejected"}}
CANCELLED = {200: {"cancelled"}, 202: {"cancelled"}, 409: {"rejected"}}


class Fault(Exception):
    """Something that must never happen, in words."""


# --- what the clients do

@dataclass
class Placed:
    """An order as its client knows it: what was wanted under which key, and what was answered."""

    key: str
    wanted: dict[str, int]
    told: Answered
    cancelled: Answered | None = None

    def __str__(self) -> str:
        cancelled = f", and {self.cancelled.status} when it was cancelled" if self.cancelled else ""
        return f"{self.key} {self.wanted} was told {self.told.status}, order {self.id}{cancelled}"

    @property
    def id(self) -> int:
        return int(self.told.headers["location"].rpartition("/")[2])

    @property
    def is_live(self) -> bool:
        """Whether there may be something to cancel."""
        return self.told.status < 300 and not self.cancelled

    @property
    def allowed(self) -> set[str]:
        """The states in which the order may end after what its client was told."""
        return CANCELLED[self.cancelled.status] if self.cancelled else FINAL[self.told.status]


opener = OpenerDirector()  # bare: it raises for no status, follows nothing, and opens a new connection each time
opener.add_handler(HTTPHandler())


def ask(port: int, method: str, target: str, content: Any = None, timeout: float = max(CLIENT_TIMES),
        **headers: str) -> Answered | None:
    """Ask the gateway; None where no answer came, or only its word that it got none."""
    body = None if content is None else json.dumps(content).encode()
    request = Request(f"http://127.0.0.1:{port}{target}", body, {"Content-Type": "application/json", **headers},
                      method=method)
    try:
        with opener.open(request, timeout=timeout) as response:
            answered = Answered(response.status, {name.lower(): value for name, value in response.headers.items()},
                                response.read())
    except (OSError, HTTPException):
        return None
    return None if answered.status in (502, 503, 504) else answered


class Client(threading.Thread):
    """Places orders until the run is `ending`, each until it is answered, or until it is `over`."""

    def __init__(self, number: int, port: int, seed: int, ending: threading.Event, over: threading.Event):
        super().__init__(name=f"client{number}")
        self.port, self.dice, self.ending, self.over = port, random.Random(f"{seed} {number}"), ending, over
        self.nerves = random.Random()  # how long it waits; of its own, so that its wishes repeat
        self.placed: list[Placed] = []
        self.retries = self.resent = 0
        self.fault = ""

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self.trade()
        except Exception as fault:
            self.fault = f"{self.name}: {fault!r}" if not isinstance(fault, Fault) else str(fault)
            self.ending.set()

    def trade(self) -> None:
        """Place an order; perhaps cancel it; perhaps ask again what became of an earlier one."""
        wanted, cancels, resends = self.wish(), self.dice.random() < CANCELS, self.dice.random() < RESENDS
        key = f"{self.name}-{len(self.placed)}"
        order = Placed(key, wanted, self.send(key, wanted))
        self.placed.append(order)
        if cancels and (live := [order for order in self.placed if order.is_live]):
            order = self.dice.choice((live[-1], self.dice.choice(live)))  # the newest may still be worked on
            order.cancelled = self.insist(f"/orders/{order.id}/cancel", CANCELLED)
        if resends:
            self.resend(self.dice.choice(self.placed))
        if self.placed[-1].told.status == 202:  # it said Retry-After, and who does not heed that floods the shop
            self.over.wait(CLIENT_PAUSE)

    def wish(self) -> dict[str, int]:
        fine = {"userId": self.dice.choice((1, 2)), "productId": self.dice.choice((101, 102)),
                "quantity": self.dice.randint(1, 3)}
        return {**fine, **self.dice.choice([{}] * 7 + [{"quantity": TOO_MANY}, {"userId": NOBODY},
                                                       {"productId": NOTHING}])}

    def send(self, key: str, wanted: dict[str, int]) -> Answered:
        told = self.insist("/orders", FINAL, wanted, **{"Idempotency-Key": key})
        if "location" not in told.headers:
            raise Fault(f"{key} was answered without an order: {told}")
        return told

    def resend(self, order: Placed) -> None:
        again = self.send(order.key, order.wanted)
        self.resent += 1
        if again[::2] != order.told[::2] or again.headers.get("idempotency-replayed") != "true":
            raise Fault(f"{order}, first {order.told}, and then {again}")

    def insist(self, target: str, certain: Iterable[int], content: Any = None, **headers: str) -> Answered:
        """Send a POST until it is answered for certain. Raises Fault where it is not, or otherwise."""
        while not self.over.is_set():
            answered = ask(self.port, "POST", target, content, self.nerves.choice(CLIENT_TIMES), **headers)
            if answered and not (answered.status == 409 and "retry-after" in answered.headers):  # not decided yet
                if answered.status in certain:
                    return answered
                raise Fault(f"{headers or self.name} was answered at {target}: {answered}")
            self.retries += 1
            self.over.wait(CLIENT_PAUSE)
        raise Fault(f"{headers or self.name} has no answer at {target} after {SETTLE_TIME} s of peace")


# --- what is done to the shop

class Blow(NamedTuple):
    """At `at` seconds, the process `name` gets a signal."""

    at: float
    name: str
    number: signal.Signals


def plan_blows(seed: int, seconds: float) -> list[Blow]:
    """Plan rounds in which each process is killed once and stopped once, in any order; the first round is whole."""
    dice, blows, at, end = random.Random(seed), [], 0.0, seconds
    while not blows or at < seconds:
        hits = [(name, number) for name in STOPS for number in (signal.SIGKILL, signal.SIGSTOP)]
        for name, number in dice.sample(hits, len(hits)):
            at += dice.uniform(0, 2 * PACE)
            blows.append(Blow(at, name, number))
            if number == signal.SIGSTOP:
                length = dice.choice(STOPS[name])
                blows.append(Blow(at + length, name, signal.SIGCONT))
                at += dice.choice((0, length))  # so that half of them are not cut short by what comes next
        if len(blows) == 3 * len(STOPS):
            end = max(at, seconds)
    return sorted(blow for blow in blows if blow.at <= end)


class Shop(Process):
    """The shop as a person starts it, whose processes can be hit. None outlives close()."""

    def __init__(self, folder: Path):
        super().__init__("microshop.run_all", "--port", "0", "--data", str(folder), "--quiet")
        self.known: set[int] = set()

    def children(self) -> dict[str, int]:
        """Return the pids of its processes by name, also of those that its supervisor left behind; none of zombies."""
        table = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="], text=True)
        found = {name: int(pid) for pid, parent, name in re.findall(
            r"(?m)^ *(\d+) +(\d+) .* -m microshop\.([a-z]+) --supervised ", table)
            if int(parent) == self.popen.pid or int(pid) in self.known}
        self.known.update(found.values())
        return found

    def hit(self, name: str, number: signal.Signals) -> None:
        """Send a process a signal; one that is just being started again is waited for."""
        def is_hit() -> bool:
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(self.children()[name], number)
                return True
            return number == signal.SIGCONT  # who was killed meanwhile stands still no more
        wait_until(is_hit, f"{name} was not started again")

    def hit_all(self, number: signal.Signals) -> None:
        for pid in self.children().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def count(self, pattern: str) -> Counter[str]:
        """Count what the supervisor said, by whom it was about."""
        found = (re.match(rf"run_all +\| (\w+) {pattern}", line) for line in self.lines)
        return Counter(match[1] for match in found if match)

    def close(self) -> None:
        self.hit_all(signal.SIGCONT)
        try:
            super().close()
        finally:
            self.hit_all(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    """Look again and again, for what nothing tells. Raises Fault."""
    deadline = time.monotonic() + SETTLE_TIME
    while not condition():
        if time.monotonic() > deadline:
            raise Fault(f"{otherwise} in {SETTLE_TIME} s")
        threading.Event().wait(LOOK)


# --- what must hold in the end

def query(folder: Path, name: str, statement: str) -> list[dict]:
    """Read a service's file, as the audit does: what is in it counts, not what the service says of it."""
    with contextlib.closing(sqlite3.connect(f"{(folder / name).absolute().as_uri()}.db?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(statement)]


def find_losses(placed: list[Placed], orders: dict[int, dict]) -> list[str]:
    """Return a line for each order that is not there as its client was told."""
    losses = []
    for order in placed:
        row = orders.get(order.id, {})
        is_wanted = {"key": order.key, **order.wanted}.items() <= row.items()
        if not is_wanted or row["status"] not in order.allowed:
            losses.append(f"lost: {order}, but there is {row or 'none'}")
    return losses


def find_doubles(placed: list[Placed], orders: dict[int, dict]) -> list[str]:
    """Return a line for each order that nobody was told of, under no key or one that is answered with another."""
    known, answered = SEED_ORDERS | {order.id for order in placed}, {None, *(order.key for order in placed)}
    return [f"double: {row}" for row in orders.values() if row["id"] not in known and row["key"] in answered]


def find_stock_off(orders: dict[int, dict], free: dict[int, int]) -> dict[int, int]:
    """Return by product how many units are there too many, or too few."""
    sold: Counter[int] = Counter()
    for row in orders.values():
        if row["status"] == "confirmed":
            sold[row["productId"]] += row["quantity"]
    off = {product: free.get(product, 0) + sold[product] - supplied for product, supplied in SUPPLIED.items()}
    return {product: units for product, units in off.items() if units}


# --- a run

@dataclass
class Report:
    """What was measured, and what was wrong."""

    seed: int
    seconds: float = 0.0
    cancels: int = 0
    resent: int = 0
    retries: int = 0
    told: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    doubles: list[str] = field(default_factory=list)
    stock_off: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [*self.losses, *self.doubles, *(f"product {product} is {units:+} units off"
                                               for product, units in self.stock_off.items()), *self.faults]

    def __str__(self) -> str:
        def by(counts: Counter) -> str:
            return f"{counts.total():6}  ({', '.join(f'{name} {count}' for name, count in sorted(counts.items()))})"
        return "\n".join([
            f"seconds    {self.seconds:6.1f}", f"seed       {self.seed:6}",
            f"orders     {by(self.told)}", f"cancels    {self.cancels:6}",
            f"kills      {by(self.kills)}", f"stops      {by(self.stops)}", f"restarts   {by(self.restarts)}",
            f"retries    {self.retries:6}", f"resent     {self.resent:6}",
            f"losses     {len(self.losses):6}", f"doubles    {len(self.doubles):6}",
            f"stock off  {sum(map(abs, self.stock_off.values())):6}", *(f"WRONG: {line}" for line in self.wrong)])


class Run:
    """One run of it, in a data folder."""

    def __init__(self, folder: Path, seconds: float, seed: int, clients: int):
        self.folder, self.seconds, self.report = folder, seconds, Report(seed)
        self.ending, self.over = threading.Event(), threading.Event()
        self.shop = Shop(folder)
        try:
            self.shop.wait_for("ready in")
            port = self.port = self.shop.port("API Gateway")
            self.clients = [Client(number, port, seed, self.ending, self.over) for number in range(clients)]
        except BaseException:
            self.shop.close()
            raise

    def run(self) -> Report:
        try:
            wait_until(lambda: bool(ask(self.port, "PUT", "/products/102", {"name": "Mouse", "stock": MOUSE_STOCK})),
                       "no mice were supplied")
            for client in self.clients:
                client.start()
            self.strike()
            self.settle()
        except Fault as fault:
            self.report.faults.append(str(fault))
        finally:
            self.end()
        try:
            self.judge()
        except sqlite3.Error as error:
            self.report.faults.append(f"the books cannot be read: {error}")
        return self.report

    def strike(self) -> None:
        """Let the blows fall, until there are no more, or a client meets a fault."""
        began = time.monotonic()
        for at, name, number in plan_blows(self.report.seed, self.seconds):
            if self.ending.wait(max(0, began + at - time.monotonic())):
                break
            self.shop.hit(name, number)
            self.report.stops[name] += number == signal.SIGSTOP
        self.ending.wait(max(0, began + self.seconds - time.monotonic()))
        self.report.seconds = time.monotonic() - began

    def settle(self) -> None:
        """Make peace, and wait until every client is answered and nothing is left to do."""
        self.shop.hit_all(signal.SIGCONT)
        self.ending.set()
        wait_until(lambda: not any(client.is_alive() for client in self.clients), "not every client had its answer")
        wait_until(self.is_healthy, "not every process was well again")
        self.shop.hit("orders", signal.SIGKILL)  # at its start all is due at once: else a retry may be 10 s away
        wait_until(self.is_settled, "not every order came to its end")
        wait_until(self.is_healthy, "not every process was well again")

    def is_healthy(self) -> bool:
        answered = ask(self.port, "GET", "/health")
        return bool(answered) and answered.json["status"] == "ok"

    def is_settled(self) -> bool:
        """Tell whether the saga has nothing left to do, for rejected orders either: no answer tells that."""
        return not query(self.folder, "orders", "SELECT id FROM orders WHERE due IS NOT NULL LIMIT 1")

    def end(self) -> None:
        """Close the shop, and see that nothing of it is left."""
        self.ending.set()
        self.over.set()
        for client in self.clients:
            if client.ident:  # else it was never started
                client.join()
        self.shop.close()
        self.report.faults += [client.fault for client in self.clients if client.fault]
        with contextlib.suppress(Fault):
            wait_until(lambda: not self.shop.children(), "")
        if self.shop.popen.returncode or self.shop.children():
            self.report.faults.append(f"the shop ended with exit status {self.shop.popen.returncode}, "
                                      f"and left {self.shop.children()} behind")

    def judge(self) -> None:
        """Compare what is in the books with what was told."""
        report, placed = self.report, [order for client in self.clients for order in client.placed]
        report.told = Counter(order.told.status for order in placed)
        report.cancels = sum(order.cancelled is not None and order.cancelled.status != 409 for order in placed)
        report.retries = sum(client.retries for client in self.clients)
        report.resent = sum(client.resent for client in self.clients)
        report.kills = self.shop.count("was killed by signal 9 ")
        report.restarts = self.shop.count(".*; starting it again")
        orders = {row["id"]: row for row in query(
            self.folder, "orders", "SELECT id, key, userId, productId, quantity, status FROM orders")}
        free = {row["id"]: row["stock"] for row in query(self.folder, "products", "SELECT id, stock FROM products")}
        report.losses, report.doubles = find_losses(placed, orders), find_doubles(placed, orders)
        report.stock_off = find_stock_off(orders, free)
        report.faults += find_breaches(self.folder)


def run(seconds: float, seed: int, clients: int) -> Report:
    """Run it in a temporary folder. That is kept where something is wrong, with what the shop printed."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="microshop-chaos-"))
        stack.callback(shutil.rmtree, folder)
        chaos = Run(folder, seconds, seed, clients)
        report = chaos.run()
        if report.wrong:
            stack.pop_all()
            (folder / "shop.log").write_text("\n".join(chaos.shop.lines))
            report.faults.append(f"look into {folder}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60.0, help="of chaos, or until each was hit")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the schedule")
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    report = run(options.seconds, options.seed, options.clients)
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
