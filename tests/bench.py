"""How fast the shop is, side by side with others.

    python -m tests.bench [--seconds S] [--seed FOLDER]

The others (tests/peers.py) are the textbook's version and, if their packages are available, a pair
of aiohttp servers and the Express demo. What is compared is measured in ROUNDS turns, one after
another, and the median counts: so the ratios hold although the machine's speed drifts. While one
system is measured, the others are idle. It prints and does not judge.
"""
import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from microshop import SERVICES
from microshop.chassis.database import Database
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import TOP, ask
from tests.load import LATENCIES, latencies, offer, requests
from tests.peers import Absent, Ports, aiohttp_pair, express, microshop, textbook

ROUNDS = 3
CONNECTIONS = (1, 16, 64)
ORDER = '{"userId":1,"productId":101}'
USER = '{"name":"Carol"}'
PROCESSES = len(SERVICES) + 3  # with the gateway, live and the supervisor
Figures = dict[str, float]


def load(port: int, connections: int, seconds: float, target: str = "/users",
         *content: str) -> Figures:
    """Run the load generator in a process of its own; return what tests.load.measure() does."""
    command = [sys.executable, "-m", "tests.load", str(port), str(connections), str(seconds),
               target, *content]
    done = subprocess.run(command, cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          check=True, start_new_session=True)  # so that Ctrl-C reaches only us
    return json.loads(done.stdout)


def in_turns(seconds: float, loads: dict[str, tuple]) -> dict[str, Figures]:
    """Run each load in ROUNDS turns; return its medians.

    A load is what load() takes, without the seconds.
    """
    results: dict[str, list[Figures]] = {name: [] for name in loads}
    for _ in range(ROUNDS):
        for name, (port, connections, *request) in loads.items():
            results[name].append(load(port, connections, seconds, *request))
    return {name: {key: statistics.median(figures[key] for figures in each) for key in each[0]}
            for name, each in results.items()}


def memory_of(supervisor: int) -> float:
    """Return the resident MiB of a process and its children."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True)
    rows = [tuple(map(int, line.split())) for line in table.stdout.splitlines()]
    return sum(rss for pid, parent, rss in rows if supervisor in (pid, parent)) / 1024


# --- how it is printed

def show(label: str, *columns: str) -> None:
    print(f"{label:24}" + "".join(f"{column:>9}" for column in columns))


def show_pair(label: str, measured: dict[str, Figures]) -> None:
    """Print the requests per second of two loads, and the second's divided by the first's."""
    first, second = (figures["rps"] for figures in measured.values())
    show(label, f"{first:.0f}", f"{second:.0f}", ratio(second, first))


def ratio(one: float, other: float) -> str:
    value = one / other
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


# --- comparisons

def compare_reads(systems: dict[str, Ports], seconds: float) -> None:
    """Print the speed of each system, direct and through the gateway, and the ratios."""
    print("\nREADS: GET /users, from the users service itself (direct) or through the gateway.\n"
          "textbook is http.server and urlopen as they are; aiohttp and Express are pairs of a\n"
          "service and a gateway, written with these packages. Times in ms: 99 of 100 answers\n"
          "take at most p99. Right: microshop's figure divided by that of the line; microshop is\n"
          "better where the ratio of req/s is more than 1, and where that of a time is less.")
    show("connections", "req/s", *LATENCIES, "| req/s", "p99", "p99.9")
    for way, place in (("direct", "users"), ("gateway", "gateway")):
        for connections in CONNECTIONS:
            measured = in_turns(seconds, {name: (ports[place], connections)
                                          for name, ports in systems.items()})
            label, ours = f"{way:8}{connections:3}", measured["microshop"]
            for name, figures in measured.items():
                ratios = [ratio(ours[key], figures[key]) for key in ("rps", "p99", "p99.9")
                          if figures is not ours]
                show(f"{label:12} {name}", f"{figures['rps']:.0f}",
                     *(f"{figures[key]:.2f}" for key in LATENCIES), *ratios)
                label = ""


def compare_workers(seconds: float) -> None:
    """Print the speed of a shop with two gateway processes, beside one.

    Those that are idle must not slow down the services.
    """
    print("\nGATEWAY PROCESSES: GET /users of a shop with --workers 2 beside one without, in\n"
          "req/s. Direct requests leave the gateways idle: 0.80x is the least to expect.")
    show("connections", "one", "two", "ratio")
    with microshop("--fresh") as (one, _, _), microshop("--fresh", "--workers", "2") as (two, *_):
        for way, place, connections in (
                ("direct", "users", 16), ("direct", "users", 64), ("gateway", "gateway", 16)):
            show_pair(f"{way:8}{connections:3}", in_turns(seconds, {
                "one": (one[place], connections), "two": (two[place], connections)}))


def compare_writes(seconds: float) -> None:
    """Print the speed of durable writes, beside that of a read, with 16 connections."""
    print("\nWRITES, which are on disk before they are answered, beside a read: 16 connections,\n"
          "times in ms. The ratio is of req/s.")
    show("", "req/s", *LATENCIES, "ratio")
    with microshop("--fresh") as (ports, _, _):
        fill_stock(ports)
        measured = in_turns(seconds, {  # limit=2, else users that POST adds would be read, too
            "GET  /users  gateway": (ports["gateway"], 16, "/users?limit=2"),
            "POST /orders gateway": (ports["gateway"], 16, "/orders", ORDER),
            "POST /users  gateway": (ports["gateway"], 16, "/users", USER),
            "POST /users  direct": (ports["users"], 16, "/users", USER)})
    read, *_ = measured.values()
    for kind, figures in measured.items():
        show(kind, f"{figures['rps']:.0f}", *(f"{figures[key]:.2f}" for key in LATENCIES),
             *([] if figures is read else [ratio(figures["rps"], read["rps"])]))


def compare_composition(seconds: float) -> None:
    """Print the speed of a page of 100 orders with its users and products, beside without.

    Each order has another user and another product.
    """
    print("\nCOMPOSITION: a page of 100 orders, plain and with ?expand=user,product, in req/s.")
    show("connections", "plain", "expanded", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        ids = range(1001, 1101)
        fill(Users, folder, "INSERT INTO users VALUES (?, 'Carol')", ids)
        fill(Products, folder, "INSERT INTO products VALUES (?, 'Lamp', 0, 0)", ids)
        fill(Orders, folder, "INSERT INTO orders "
             "(id, userId, productId, quantity, status, placed, since) "
             "VALUES (?1, ?1, ?1, 1, 'confirmed', 0, 0)", ids)
        with microshop("--data", folder) as (ports, _, _):
            port, page = ports["gateway"], "/orders?after=1000"
            for connections in (1, 16):
                show_pair(f"gateway {connections:3}", in_turns(seconds, {
                    "plain": (port, connections, page),
                    "expanded": (port, connections, f"{page}&expand=user,product")}))


def compare_overload(seconds: float) -> None:
    """Print how much is answered of twice what 64 connections reach, and how late.

    The load generator needs the cores too, and all the more for requests that cost little.
    """
    print("\nOVERLOAD: twice as many requests through the gateway as 64 connections reach (the\n"
          "peak), sent when they are due. Times in ms, from then on. The ratio is that of what is\n"
          "answered to the peak, both in req/s.")
    show("", "peak", "answered", *LATENCIES, "ratio", "  failures per s")
    for target, *content in (("/users",), ("/orders", ORDER)):
        with microshop("--fresh", "--quiet") as (ports, _, _):
            fill_stock(ports)
            port = ports["gateway"]
            peak = load(port, 64, seconds, target, *content)["rps"]
            length = 4 * seconds
            failures, times = offer(port, 2 * peak, length, requests(port, target, *content))
        answered = len(times) / length
        failed = ", ".join(f"{what} {count / length:.0f}"
                           for what, count in failures.items() if count)
        show(f"{'POST' if content else 'GET '} {target}", f"{peak:.0f}", f"{answered:.0f}",
             *(f"{late:.0f}" for late in latencies(times).values()), ratio(answered, peak),
             f"  {failed}")


def compare_tables(seconds: float) -> None:
    """Print the speed of a page, and of an order, in a table of 100,000 rows beside one of 100."""
    print("\nTABLES of 100 and of 100,000 rows, in req/s.")
    show("connections", "100", "100,000", "ratio")
    with contextlib.ExitStack() as stack:
        shops = {count: shop_with(count, stack) for count in (100, 100_000)}
        show_pair("direct    1  page of 100", in_turns(seconds, {
            f"{count}": (ports["users"], 1, f"/users?after={count - 100}")
            for count, ports in shops.items()}))
        show_pair("gateway  16  order", in_turns(seconds, {
            f"{count}": (ports["gateway"], 16, "/orders", ORDER)
            for count, ports in shops.items()}))


def shop_with(count: int, stack: contextlib.ExitStack) -> Ports:
    """Run a shop with so many users and orders, until the stack ends it; return its ports."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    fill(Users, folder, "INSERT INTO users VALUES (?, 'Carol')", range(3, count + 1))
    fill(Orders, folder, "INSERT INTO orders "
         "(id, userId, productId, quantity, status, key, placed, since) "
         "VALUES (?1, 1, 101, 1, 'confirmed', hex(randomblob(8)), 0, 0)", range(203, count + 1))
    ports, _, _ = stack.enter_context(microshop("--data", folder))
    fill_stock(ports)
    return ports


def fill_stock(ports: Ports) -> None:
    laptop = {**ask(ports["gateway"], target="/products/101").json, "stock": 10**9}
    del laptop["id"]
    json_type = {"Content-Type": "application/json"}
    ask(ports["gateway"], "PUT", "/products/101", json_type, json.dumps(laptop).encode())


def fill(service: type[Service], folder: str, insert: str, ids: range) -> None:
    """Make a service's database with rows of these ids."""
    database = Database(Path(folder) / f"{service.name}.db", service.schema)
    with database.transaction() as transaction:
        for number in ids:
            transaction.write(insert, [number])
    database.close()


# --- the run

def measure_all(seconds: float, seed: Path) -> None:
    print(f"Each figure is the median of {ROUNDS} turns of {seconds:g} s; what is compared takes "
          "turns.")
    with contextlib.ExitStack() as stack:
        ports, supervisor, took = stack.enter_context(microshop("--fresh"))
        print(f"microshop is ready after {took:.2f} s; "
              f"its {PROCESSES} processes hold {memory_of(supervisor):.0f} MiB.")
        systems = {"microshop": ports}
        for name, system in (("textbook", textbook()), ("aiohttp", aiohttp_pair()),
                             ("Express", express(seed))):
            try:
                systems[name] = stack.enter_context(system)
            except Absent as reason:
                print(f"Without {name}: {reason}.")
        compare_reads(systems, seconds)
        print(f"After that the {PROCESSES} processes hold {memory_of(supervisor):.0f} MiB.")
    for compare in (compare_workers, compare_writes, compare_composition, compare_overload,
                    compare_tables):
        compare(seconds)


def end(number: int, _: object) -> None:
    """Leave, so that all that was started is ended first. A second signal changes nothing."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the shop beside a textbook version, an aiohttp pair and Express.")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each measurement")
    parser.add_argument("--seed", type=Path, default=TOP.parent / "shared" / "seed",
                        help="folder of the Express demo; it is copied")
    options = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, end)
    sys.stdout.reconfigure(line_buffering=True)
    measure_all(options.seconds, options.seed)


if __name__ == "__main__":
    main()
