"""How fast the shop is, side by side with others.

    python -m tests.bench [--seconds S] [--seed FOLDER]

The others are the textbook's version (tests/textbook.py) and the Express demo, if node is installed
and FOLDER holds the demo with its node_modules. Each measurement is taken in ROUNDS turns, one
system after another, and the median counts: so the ratios hold although the machine's speed drifts.
It prints and does not judge.
"""
import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from microshop import GATEWAY_PORT, SERVICES
from microshop.chassis.database import Database
from microshop.chassis.server import Service
from microshop.gateway import Gateway
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import TOP, ask, process
from tests.load import offer, requests

ROUNDS = 3
CONNECTIONS = (1, 16, 64)
ORDER = '{"userId":1,"productId":101}'
USER = '{"name":"Carol"}'
EXPRESS = {"users": Users.port, "gateway": GATEWAY_PORT}
PROCESSES = len(SERVICES) + 2  # with the gateway and the supervisor
Ports = dict[str, int]
Figures = dict[str, float]


def load(port: int, connections: int, seconds: float, target: str = "/users",
         *content: str) -> Figures:
    """Run the load generator in a process of its own; return what tests.load.measure() does."""
    command = [sys.executable, "-m", "tests.load", str(port), str(connections), str(seconds),
               target, *content]
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


# --- the systems

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
def express(folder: Path) -> Iterator[Ports | None]:
    if not shutil.which("node") or not (folder / "node_modules").is_dir():
        print(f"without Express: it needs node, and {folder} with node_modules (npm install)\n")
        yield None
        return
    nodes = [subprocess.Popen(["node", f"{name}.js"], cwd=folder, stdout=subprocess.PIPE)
             for name in ("users", "products", "orders", "api-gateway")]  # the demo's own files
    try:
        for node in nodes:
            node.stdout.readline()
        yield EXPRESS
    finally:
        for node in nodes:
            node.kill()
            node.communicate()


def memory_of(supervisor: int) -> float:
    """Return the resident MiB of a process and its children."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True)
    rows = [tuple(map(int, line.split())) for line in table.stdout.splitlines()]
    return sum(rss for pid, parent, rss in rows if supervisor in (pid, parent)) / 1024


# --- comparisons

def compare(systems: dict[str, Ports], connections: int, seconds: float) -> None:
    """Print the speed of each system, direct and through the gateway, and the ratios."""
    for way, place in (("direct", "users"), ("gateway", "gateway")):
        results: dict[str, list[Figures]] = {name: [] for name in systems}
        for _ in range(ROUNDS):
            for name, ports in systems.items():
                results[name].append(load(ports[place], connections, seconds))
        medians = {name: median_of(each) for name, each in results.items()}
        for name, figures in medians.items():
            ratio = medians["microshop"]["rps"] / figures["rps"]
            print(f"{way:8} {connections:3} connections  {name:10} {figures['rps']:7.0f}/s  "
                  f"p50 {figures['p50']:6.2f} ms  p99 {figures['p99']:6.2f} ms"
                  + (f"  microshop is {ratio:.2f}x" if name != "microshop" else ""))


def median_of(results: list[Figures]) -> Figures:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def compare_workers(systems: dict[str, Ports], seconds: float) -> None:
    """Print the speed of two gateway processes, beside that of Express."""
    with microshop("--fresh", "--workers", "2") as (ports, _, _):
        two, other = [], []
        for _ in range(ROUNDS):
            two.append(load(ports["gateway"], 16, seconds)["rps"])
            if "express" in systems:
                other.append(load(systems["express"]["gateway"], 16, seconds)["rps"])
    rate = statistics.median(two)
    print(f"gateway   16 connections  --workers 2 {rate:6.0f}/s"
          + (f"  {rate / statistics.median(other):.2f}x express" if other else ""))


def compare_writes(seconds: float) -> None:
    """Print the speed of durable writes, beside that of a read, with 16 connections."""
    with microshop("--fresh") as (ports, _, _):
        fill_stock(ports)
        kinds = {  # limit=2, since the users that POST adds would make the page longer
            "GET  /users  gateway": (ports["gateway"], "/users?limit=2"),
            "POST /orders gateway": (ports["gateway"], "/orders", ORDER),
            "POST /users  gateway": (ports["gateway"], "/users", USER),
            "POST /users  direct": (ports["users"], "/users", USER)}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(ROUNDS):
            for kind, (port, *request) in kinds.items():
                rates[kind].append(load(port, 16, seconds, *request)["rps"])
    medians = {kind: statistics.median(each) for kind, each in rates.items()}
    read, *_ = medians.values()
    for kind, rate in medians.items():
        print(f"{kind:20}  {rate:7.0f}/s  {rate / read:.2f}x")


def compare_composition(seconds: float) -> None:
    """Print what a page of 100 orders costs with its users and products, beside without.

    Each order has another user and another product.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids = range(1001, 1101)
        fill(Users, folder, "INSERT INTO users VALUES (?, 'Carol')", ids)
        fill(Products, folder, "INSERT INTO products VALUES (?, 'Lamp', 0, 0)", ids)
        fill(Orders, folder, "INSERT INTO orders "
             "(id, userId, productId, quantity, status, placed, since) "
             "VALUES (?1, ?1, ?1, 1, 'confirmed', 0, 0)", ids)
        with microshop("--data", folder) as (ports, _, _):
            for connections in (1, 16):
                compare_pages(ports["gateway"], connections, seconds)


def compare_pages(port: int, connections: int, seconds: float) -> None:
    rates: dict[str, list[float]] = {"": [], "&expand=user,product": []}
    for _ in range(ROUNDS):
        for query, results in rates.items():
            target = f"/orders?after=1000{query}"
            results.append(load(port, connections, seconds, target)["rps"])
    plain, composed = (statistics.median(each) for each in rates.values())
    print(f"a page of 100 orders with users and products costs {plain / composed:.2f}x the plain "
          f"page ({composed:.0f}/s of {plain:.0f}/s, {connections} connections)")


def compare_overload(seconds: float) -> None:
    """Print how much is answered of twice what 64 connections reach, and how late.

    The load generator needs the cores too, and all the more for requests that cost little.
    """
    for target, *content in (("/orders", ORDER), ("/users",)):
        with microshop("--fresh", "--quiet") as (ports, _, _):
            fill_stock(ports)
            port = ports["gateway"]
            peak = load(port, 64, seconds, target, *content)["rps"]
            length = 4 * seconds
            failures, times = offer(port, 2 * peak, length, requests(port, target, *content))
        method, p99 = "POST" if content else "GET ", times[len(times) * 99 // 100]
        print(f"overload  {method} {target}: of twice the peak ({peak:.0f}/s), "
              f"{len(times) / length / peak:.2f}x the peak is answered, p99 {p99:.2f} s; "
              + ", ".join(f"{what} {count / length:.0f}/s"
                          for what, count in failures.items() if count))


def compare_tables(seconds: float) -> None:
    """Print what a page, and an order, cost in a table of 100,000 rows beside one of 100."""
    pages, orders = {}, {}
    for count in (100, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            fill(Users, folder, "INSERT INTO users VALUES (?, 'Carol')", range(3, count + 1))
            fill(Orders, folder, "INSERT INTO orders "
                 "(id, userId, productId, quantity, status, key, placed, since) "
                 "VALUES (?1, 1, 101, 1, 'confirmed', hex(randomblob(8)), 0, 0)",
                 range(203, count + 1))
            with microshop("--data", folder) as (ports, _, _):
                fill_stock(ports)
                page = (ports["users"], 1, seconds, f"/users?after={count - 100}")
                order = (ports["gateway"], 16, seconds, "/orders", ORDER)
                pages[count] = statistics.median(load(*page)["rps"] for _ in range(ROUNDS))
                orders[count] = statistics.median(load(*order)["rps"] for _ in range(ROUNDS))
    for what, rates in (("a page of 100", pages), ("an order", orders)):
        print(f"{what} costs {rates[100] / rates[100_000]:.2f}x with 100,000 rows as with 100")


def fill_stock(ports: Ports) -> None:
    content = json.dumps({"name": "Laptop", "stock": 10**9}).encode()
    json_type = {"Content-Type": "application/json"}
    ask(ports["gateway"], "PUT", "/products/101", json_type, content)


def fill(service: type[Service], folder: str, insert: str, ids: range) -> None:
    """Make a service's database with rows of these ids."""
    database = Database(Path(folder) / f"{service.name}.db", service.schema)
    with database.transaction() as transaction:
        for number in ids:
            transaction.write(insert, [number])
    database.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure the shop beside a textbook version and, if it is there, Express.")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--seed", type=Path, default=TOP.parent / "shared" / "seed",
                        help="folder of the Express demo")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    with contextlib.ExitStack() as stack:
        ports, supervisor, took = stack.enter_context(microshop("--fresh"))
        print(f"microshop is ready after {took:.2f} s; "
              f"its {PROCESSES} processes hold {memory_of(supervisor):.0f} MiB\n")
        systems = {"microshop": ports, "textbook": stack.enter_context(textbook())}
        if other := stack.enter_context(express(options.seed)):
            systems["express"] = other
        for connections in CONNECTIONS:
            compare(systems, connections, options.seconds)
            print()
        compare_workers(systems, options.seconds)
        print(f"after all that the {PROCESSES} processes hold {memory_of(supervisor):.0f} MiB")
    compare_writes(options.seconds)
    compare_composition(options.seconds)
    compare_overload(options.seconds)
    compare_tables(options.seconds)


if __name__ == "__main__":
    main()
