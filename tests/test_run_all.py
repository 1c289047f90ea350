"""The supervisor as a person meets it: a process that opens the shop, shows it, and leaves nothing behind."""
import contextlib
import http.client
import json
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import LANES
from tests.helpers import PATIENCE, TOP, Process, Wire, ask, process

SEED = {case["path"]: case["body"] for case in json.loads((TOP / "tests" / "golden.json").read_text())["cases"]
        if case["method"] == "GET" and case["port"] == 3000}
MOMENT = 0.2  # seconds in which whoever was told to end has closed its port: two looks of an accept loop
SOON = 2.0    # seconds: less than a child or the supervisor waits for what is in flight


def free_ports() -> int:
    """Return the first of four free ports in a row, below those that systems give to who asks for any."""
    lane = int(os.environ.get("TEST_LANE", "0"))
    while True:
        first = random.randrange(20000, 30000, 4 * LANES) + 4 * lane
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + 4):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except ConnectionError:
        return True
    return False


def children_of(parent: int) -> list[int]:
    """Return the pids of a process's children, zombies among them."""
    table = subprocess.check_output(["ps", "-A", "-o", "pid=", "-o", "ppid="], text=True)
    return [int(pid) for pid, its_parent in map(str.split, table.splitlines()) if int(its_parent) == parent]


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state[:1] not in ("", "Z")


def comes_true(condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Look again and again, for what nothing tells."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.02)
    return True


class Shop(Process):
    """The supervisor on four free ports, from `first` on, with a `folder` for its temporary files."""

    module = ("microshop.run_all",)

    def __init__(self, *flags: str, first: int | None = None, **environment: str):
        self.first, self.folder = first or free_ports(), tempfile.mkdtemp()
        super().__init__(*self.module, "--port", str(self.first), *flags, TMPDIR=self.folder, **environment)

    def wait_until_ready(self) -> "Shop":
        self.wait_for(r"^run_all +\| ready in ")
        return self

    def children(self, module: str = r"(?!run_all)\w+") -> list[int]:
        """Return the pids that the system lists for this shop, all but the supervisor's; a zombie has no arguments."""
        table = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="], text=True)
        ports = "|".join(map(str, range(self.first, self.first + 4)))
        ours = rf"{self.popen.pid} |.*{re.escape(self.folder)}|.* --port (?:{ports})\b"
        return [int(pid) for pid in re.findall(rf"(?m)^ *(\d+) +(?={ours}).* -m microshop\.{module} ", table)]

    def kill(self) -> None:
        known = self.children()  # on a port that was free for any, only their parent tells whose they are
        self.popen.kill()
        self.status()
        self.popen.stdout.close()
        for pid in {*known, *self.children()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        comes_true(lambda: not self.children())
        shutil.rmtree(self.folder)


class SmallShop(Shop):
    """A shop with one service alone: it is as good as three where only the supervisor counts, and starts sooner."""

    code = "from microshop import run_all; run_all.SERVICES = ('users',); run_all.main()"
    module = ("tests.after", code)


class HastyShop(SmallShop):
    """A small shop whose supervisor is less patient than others are."""

    module = ("tests.after", "from microshop.chassis.supervisor import RestartPolicy\n"
              "RestartPolicy.HANG_TIME, RestartPolicy.START_TIME, RestartPolicy.FIRST_PAUSE = 0.6, 1.0, 0.02\n" + SmallShop.code)


class HeadShop(SmallShop):
    """A shop that shows what it does to `head -n 1`: one line is read, then the pipe is closed."""

    def _read(self) -> None:
        self.lines.append(self.popen.stdout.readline().decode())
        self.popen.stdout.close()


class DeafShop(SmallShop):
    """A shop that nobody listens to any more when it is ready."""

    def _read(self) -> None:
        while not self.lines or "ready in" not in self.lines[-1]:
            with self._news:
                self.lines.append(self.popen.stdout.readline().decode())
                self._news.notify_all()


class ShopTestCase(unittest.TestCase):
    def begin(self, *flags: str, kind: type[Shop] = Shop, **more: Any) -> Shop:
        shop = kind(*flags, **more)
        self.addCleanup(shop.kill)
        return shop

    def open(self, *flags: str, **more: Any) -> Shop:
        return self.begin(*flags, **more).wait_until_ready()

    def afflict(self, service: str, affliction: str) -> dict[str, str]:
        """Return an environment in which each process of a service does something else first.

        `affliction` is Python, for which `nth` is how many of them have begun before.
        """
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "sitecustomize.py").write_text(
            "import os, subprocess, sys, threading, time\n"
            f"if 'microshop.{service}' in sys.orig_argv:\n"
            f"    nth = len(os.listdir({str(folder)!r} + '/begun'))\n"
            f"    open({str(folder)!r} + f'/begun/{{nth}}', 'x').close()\n"
            + textwrap.indent(textwrap.dedent(affliction), "    "))
        (folder / "begun").mkdir()
        return {"PYTHONPATH": str(folder)}

    def hang_request(self, shop: Shop) -> Wire:
        """Send all of a request but five bytes. The interim answer tells that the gateway has it in hand."""
        wire = Wire(shop.first)
        self.addCleanup(wire.__exit__)
        wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        self.assertEqual(wire.read().status, 100)
        wire.send(b"12345")
        return wire

    def assert_nothing_is_left(self, shop: Shop) -> None:
        self.assertEqual(shop.children(), [])
        self.assertEqual(os.listdir(shop.folder), [])


class OpenShopTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.shop = Shop("--fresh", "--port", "0")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.gateway = cls.shop.port(r"^gateway  \| API Gateway")

    def test_every_process_tells_where_it_listens(self):
        ports = {self.gateway}
        for title in ("Users", "Products", "Orders"):
            ports.add(port := self.shop.port(rf"^{title.lower():<8} \| {title} service"))
            self.assertEqual(ask(port, target="/health").json["service"], title.lower())
        self.assertEqual(len(ports), 4)

    def test_one_line_tells_how_soon_the_shop_was_ready_and_where(self):
        ready = [line for line in self.shop.lines if "ready" in line]
        self.assertEqual(len(ready), 1)
        self.assertRegex(ready[0], rf"ready in [0-9.]+ s\b.* http://localhost:{self.gateway}\b")

    def test_the_gateway_answers_as_the_seed_does(self):
        for path in ("/", "/users", "/products", "/orders"):
            with self.subTest(path):
                self.assertEqual(ask(self.gateway, target=path).body.decode(), SEED[path])

    def test_orders_finds_the_services_that_an_order_needs(self):
        answer = ask(self.gateway, "POST", "/orders", {"Content-Type": "application/json"},
                     b'{"userId":1,"productId":102,"quantity":101}')  # rejected, so that no list changes
        self.assertEqual((answer.status, answer.json["detail"]), (409, "product 102 has 100 of 101 units left"))
        for name in ("gateway", "orders", "users", "products"):  # and all of it is logged under one id
            self.shop.wait_for(rf"^{name:<8} \| .*\b{answer.headers['x-request-id']} ")

    def test_a_request_is_logged_under_one_id_by_the_gateway_and_the_service(self):
        request_id = ask(self.gateway, target="/users/1").headers["x-request-id"]
        for name in ("gateway", "users"):
            self.shop.wait_for(rf"^{name:<8} \| .*\b{request_id} GET /users/1 200 ")

    def test_a_pipe_gets_names_without_colours(self):
        for line in self.shop.lines:
            self.assertRegex(line, r"^[a-z_]+ +\| [^\33]+$")

    def test_fresh_data_lie_in_a_temporary_folder(self):
        files = [path.name for path in Path(self.shop.folder).glob("*/*.db")]
        self.assertCountEqual(files, ["users.db", "products.db", "orders.db"])


class EndedShopTest(ShopTestCase):
    """What is left of a quiet shop that was asked for some users and then got SIGTERM."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.shop = Shop("--data", str(cls.home / "kept"), "--quiet", "--workers", "1", MICROSHOP_PORT="abc",
                        MICROSHOP_DATA=str(cls.home / "other"), MICROSHOP_QUIET="0", MICROSHOP_WORKERS="0")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.asked = ask(cls.shop.first, target="/users")
        cls.began_with = cls.shop.children()
        began = time.monotonic()
        cls.status = cls.shop.stop(signal.SIGTERM)
        cls.took = time.monotonic() - began

    def test_it_ended_in_time_with_status_0(self):
        self.assertEqual(self.status, 0)
        self.assertLess(self.took, 5)

    def test_nothing_is_left_of_its_four_children(self):
        self.assertEqual(len(self.began_with), 4)
        self.assert_nothing_is_left(self.shop)

    def test_a_quiet_shop_logs_no_request(self):
        self.assertEqual(self.asked.status, 200)
        self.assertNotIn("/users", "".join(self.shop.lines))

    def test_a_flag_wins_over_its_environment_twin(self):
        self.assertEqual([path.name for path in self.home.iterdir()], ["kept"])

    def test_the_next_start_finds_the_data(self):
        with contextlib.closing(sqlite3.connect(self.home / "kept" / "users.db")) as database, database:
            database.execute("UPDATE users SET name = 'Carol' WHERE id = 1")
        shop = self.open(MICROSHOP_DATA=str(self.home / "kept"))
        self.assertEqual(ask(shop.first, target="/users/1").json["name"], "Carol")


class EndTest(ShopTestCase):
    def test_ctrl_c_lets_a_request_in_flight_be_answered_by_its_service(self):
        shop = self.open("--fresh")
        wire = self.hang_request(shop)
        os.killpg(shop.popen.pid, signal.SIGINT)  # as a terminal does: to all in the supervisor's group
        shop.wait_for(r"^run_all .*stopping")
        self.assertTrue(comes_true(lambda: is_refused(shop.first)), "the gateway takes no more requests")
        self.assertFalse(comes_true(lambda: is_refused(shop.first + 1), MOMENT), "users stays until the gateway ended")
        wire.send(b"67890")
        self.assertIn(wire.read().status, range(400, 500))
        self.assertEqual(shop.status(), 0)
        self.assertRegex("\n".join(shop.lines), r"(?m)^users .* POST /users 4")
        self.assert_nothing_is_left(shop)

    def test_more_than_one_ctrl_c_ends_it_at_once(self):
        shop = self.open("--fresh", kind=SmallShop)
        self.hang_request(shop)
        os.killpg(shop.popen.pid, signal.SIGINT)
        shop.wait_for(r"^run_all .*stopping")
        began = time.monotonic()
        for _ in range(5):
            os.killpg(shop.popen.pid, signal.SIGINT)
        self.assertEqual(shop.status(), 130)
        self.assertLess(time.monotonic() - began, SOON)
        self.assertNotIn("Traceback", "".join(shop.lines))
        self.assert_nothing_is_left(shop)

    def test_a_terminal_that_is_closed_ends_it(self):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MICROSHOP_")}
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, termios, sys; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
             "sys.argv[1:] = ['--fresh', '--port', '0']; from microshop.run_all import main; main()"],
            cwd=TOP, env=clean, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.kill)
        os.close(theirs)
        while b"ready in" not in (line := child.stdout.readline()):
            self.assertTrue(line)
        os.close(ours)
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_a_gateway_that_hangs_does_not_cost_the_services_their_clean_end(self):
        shop = self.open("--fresh", "--grace", "1.2", kind=SmallShop)
        [gateway] = shop.children("gateway")
        os.kill(gateway, signal.SIGSTOP)
        began = time.monotonic()
        self.assertEqual(shop.stop(), 0)
        self.assertLess(time.monotonic() - began, SOON)
        self.assertEqual([line for line in shop.lines if "killing" in line],
                         ["run_all  | gateway did not end in time; killing it"])
        self.assert_nothing_is_left(shop)

    def test_the_children_of_a_killed_supervisor_end_by_themselves(self):
        shop = self.open("--fresh", kind=SmallShop)
        self.assertEqual(len(shop.children()), 2)
        shop.popen.kill()
        shop.status()
        self.assertTrue(comes_true(lambda: not shop.children()))

    def test_it_ends_although_who_reads_what_it_shows_stands_still(self):
        shop = self.begin("--fresh", "--grace", "2", kind=DeafShop)
        shop.wait_for("ready in")
        for _ in range(100):
            ask(shop.first, target="/" + "x" * 4000)  # whose log lines fill each pipe on the way
        shop.popen.send_signal(signal.SIGTERM)
        self.assertEqual(shop.popen.wait(PATIENCE), 0)
        self.assertTrue(comes_true(lambda: not shop.children()))

    def test_a_temporary_folder_is_made_only_to_be_used(self):
        shop = self.open("--data", self.enterContext(tempfile.TemporaryDirectory()), kind=SmallShop)
        self.assertEqual(os.listdir(shop.folder), [])

    def test_it_ends_when_nobody_reads_what_it_shows(self):
        shop = HeadShop("--fresh")
        self.addCleanup(shop.kill)
        self.assertEqual(shop.status(), 0)
        self.assertEqual(len(shop.lines), 1)
        self.assert_nothing_is_left(shop)


@unittest.skipUnless(hasattr(socket, "SO_REUSEPORT"), "this system cannot share a port among processes")
class MendedShopTest(ShopTestCase):
    """A shop with two gateway processes, where one of them and users are killed and come back."""

    @classmethod
    def setUpClass(cls):
        cls.shop = Shop("--fresh", "--workers", "2")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.gateways, [users] = cls.shop.children("gateway"), cls.shop.children("users")
        for pid in (users, cls.gateways[0]):
            os.kill(pid, signal.SIGKILL)
        for name in ("users", "gateway2?"):
            cls.shop.wait_for(rf"^run_all .*\b{name}\b.*\b137\b")
        cls.meanwhile = ask(cls.shop.first, target="/products")
        cls.users_again = cls.shop.wait_for(r"Users service listening at http://\S+:(\d+)$", times=2)
        cls.gateway_again = cls.shop.wait_for(r"API Gateway listening at http://\S+:(\d+)$", times=3)

    def test_the_others_serve_meanwhile(self):
        self.assertEqual(self.meanwhile.body.decode(), SEED["/products"])

    def test_a_killed_service_serves_again_on_its_port(self):
        self.assertEqual(int(self.users_again[1]), self.shop.first + 1)
        self.assertEqual(ask(self.shop.first, target="/users").body.decode(), SEED["/users"])

    def test_they_share_a_port_that_the_system_chose_too(self):
        shop = Shop("--fresh", "--workers", "2", "--port", "0")
        self.addCleanup(shop.kill)
        shop.wait_until_ready()
        gateways = {int(shop.wait_for(r"API Gateway listening at http://\S+:(\d+)$", times)[1]) for times in (1, 2)}
        self.assertEqual(len(gateways), 1)

    def test_each_of_two_gateways_on_one_port_answers_without_the_other(self):
        self.assertEqual(len(self.gateways), 2)
        self.assertEqual(int(self.gateway_again[1]), self.shop.first)
        os.kill(self.gateways[1], signal.SIGKILL)  # the one that answered meanwhile
        self.shop.wait_for(r"^run_all .*\bgateway2?\b.*\b137\b", times=2)
        self.assertEqual(ask(self.shop.first).body.decode(), SEED["/"])


@unittest.skipUnless(hasattr(signal, "SIGSTOP"), "this system cannot stop a process")
class HangingServiceTest(ShopTestCase):
    """A shop whose products service hangs while two hundred clients want something of it.

    What else runs on the machine disturbs single rounds, but not every one.
    """

    CLIENTS, MOST, ROUNDS, REQUESTS = 200, 64, 5, 200

    def time_users(self, wire: Wire) -> float:
        """Return the 99th percentile of the seconds that GET /users takes, on one connection."""
        times = []
        for _ in range(self.REQUESTS):
            began = time.perf_counter()
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(wire.read().body.decode(), SEED["/users"])
            times.append(time.perf_counter() - began)
        return sorted(times)[self.REQUESTS * 99 // 100]

    def test_it_takes_only_those_down_who_need_it(self):
        shop = self.open("--fresh", "--quiet", "--timeout", "30")
        [products] = shop.children("products")
        wire = self.enterContext(Wire(shop.first))
        quiet = statistics.median(self.time_users(wire) for _ in range(self.ROUNDS))
        os.kill(products, signal.SIGSTOP)
        try:
            clients = [self.enterContext(Wire(shop.first)) for _ in range(self.CLIENTS)]
            for client in clients:
                client.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
            hung = {client.socket: client for client in clients}
            while len(hung) > self.MOST:  # these wait for an answer, and the others are told that they need not
                for told in select.select(hung, [], [], PATIENCE)[0]:
                    self.assertEqual(hung.pop(told).read().status, 503)
            self.assertTrue(comes_true(lambda: self.time_users(wire) < 2 * quiet), "users suffers")
            self.assertEqual(select.select(hung, [], [], 0)[0], [])
        finally:
            os.kill(products, signal.SIGCONT)
        self.assertEqual([client.read().status for client in hung.values()], [200] * self.MOST)


class GuardedShopTest(ShopTestCase):
    def test_what_guards_the_gateway_is_handed_on_by_run_all(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("s3cret\n")
            file.flush()
            shop = self.open("--fresh", "--token-file", file.name, "--rate", "5/h", "--timeout=2.5",
                             "--max-in-flight=7", "--max-connections=50", "--grace=3", MICROSHOP_TOKEN="other")
        table = subprocess.check_output(["ps", "-A", "-ww", "-o", "args="], text=True)
        self.assertRegex(table, rf"microshop\.gateway .*--port {shop.first} .*--timeout=2.5 .*--max-in-flight=7")
        self.assertRegex(table, rf"microshop\.gateway .*--port {shop.first} .*--grace=2.1\d* --max-connections=50\b")
        self.assertRegex(table, rf"microshop\.users .*--port {shop.first + 1} .*--max-connections=50\b")
        shown = {"Authorization": "Bearer s3cret"}
        self.assertEqual([ask(shop.first, "DELETE", "/users/2", headers).status for headers in ({}, shown)], [401, 204])
        self.assertEqual([ask(shop.first).status for _ in range(4)], [200, 200, 200, 429])
        self.assertNotIn("s3cret", "".join(shop.lines) + table)

    @unittest.skipUnless(Path("/proc/self/environ").exists(), "this system does not show a process's environment")
    def test_no_process_but_the_gateway_gets_the_token(self):
        shop = self.open("--fresh", MICROSHOP_TOKEN="s3cret")
        for name in ("gateway", "users", "products", "orders"):
            [pid] = shop.children(name)
            self.assertEqual(b"s3cret" in Path(f"/proc/{pid}/environ").read_bytes(), name == "gateway")

    def test_a_bad_token_is_told_without_being_shown(self):
        with process("microshop.run_all", "--token-file", "/nowhere") as file, \
                process("microshop.gateway", MICROSHOP_TOKEN="to ken") as token:
            for child, told in ((file, "--token-file: '/nowhere' cannot be read"), (token, "MICROSHOP_TOKEN: ")):
                self.assertEqual(child.status(), 2)
                self.assertIn(told, child.lines[0])
                self.assertEqual(len(child.lines), 1)
                self.assertNotIn("to ken", child.lines[0])


class TerminalTest(unittest.TestCase):
    """What a terminal shows of a shop one of whose settings is bad: so it ends by itself."""

    @classmethod
    def setUpClass(cls):
        spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MICROSHOP_", "NO_COLOR"))}
        clean["TMPDIR"] = cls.enterClassContext(tempfile.TemporaryDirectory())
        terminals = [subprocess.Popen(
            [sys.executable, "-c", spawn, sys.executable, "-m", "microshop.run_all", "--port", "0", "--fresh"],
            cwd=TOP, env={**clean, **wish, "MICROSHOP_ORDERS_URL": "nowhere"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True)
            for wish in ({}, {"NO_COLOR": "1"})]
        for terminal in terminals:
            cls.addClassCleanup(terminal.kill)
        cls.coloured, cls.plain = [terminal.communicate(timeout=PATIENCE)[0] for terminal in terminals]

    def test_names_have_colours(self):
        self.assertRegex(self.coloured, "\33\\[[0-9;]+mrun_all +\\| \33\\[0m")

    def test_who_wants_no_colours_gets_none(self):
        self.assertRegex(self.plain, r"(?m)^run_all +\| ")
        self.assertNotIn("\33", self.plain)


class CareTest(ShopTestCase):
    """What the supervisor does about children that fail, each in its own way."""

    def test_one_that_hangs_is_killed_and_started_again(self):
        shop = self.open("--fresh", kind=HastyShop)
        [users] = shop.children("users")
        os.kill(users, signal.SIGSTOP)
        shop.wait_for("^run_all .*users has shown no sign of life for 1 s; killing it")
        shop.wait_for(r"^run_all .*users was killed by signal 9 \(exit status 137\); starting it again in 0\.\d s")
        self.assertEqual(ask(shop.first, target="/users").body.decode(), SEED["/users"])
        self.assertNotEqual(shop.children("users"), [users])

    def test_nobody_is_killed_for_a_time_in_which_all_stood_still(self):
        shop = self.open("--fresh", kind=HastyShop)
        before = shop.children()
        for pid in (shop.popen.pid, *before):
            os.kill(pid, signal.SIGSTOP)
        threading.Event().wait(1.1)  # more than the supervisor takes for a delay
        for pid in (shop.popen.pid, *before):
            os.kill(pid, signal.SIGCONT)
            threading.Event().wait(MOMENT)
        self.assertEqual(ask(shop.first, target="/users").status, 200)
        self.assertEqual(shop.children(), before)

    def test_who_asks_a_killed_service_waits_for_the_next_one(self):
        shop = self.open("--fresh", kind=SmallShop)
        for name in ("users", "gateway"):
            [pid] = shop.children(name)
            os.kill(pid, signal.SIGKILL)
            self.assertEqual(ask(shop.first, target="/users").body.decode(), SEED["/users"])

    def test_one_that_cannot_be_started_is_given_up_and_its_last_words_are_shown(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "users.db").write_bytes(b"no database " * 1000)
            shop = self.begin("--data", folder, kind=HastyShop)
            self.assertEqual(shop.status(), 1)
        why = f"users: cannot use {folder}/users.db: file is not a database; mend or move it, or choose another --data"
        text = "\n".join(shop.lines)
        self.assertEqual(text.count(f"users    | {why}"), 5 + 1)
        self.assertEqual(text.count("run_all  | users ended with exit status 1 before it listened; starting it ag"), 4)
        self.assertIn(f"run_all  | users failed to start 5 times in a row: stopping. It said last:\n"
                      f"users    | {why}\n", text)
        self.assert_nothing_is_left(shop)

    def test_one_that_starts_at_last_is_not_given_up(self):
        shop = self.open("--fresh", kind=HastyShop, **self.afflict("users", "if nth < 4: os._exit(7)"))
        self.assertEqual(sum("users ended with exit status 7" in line for line in shop.lines), 4)

    def test_one_that_does_not_get_ready_is_killed(self):
        shop = self.open("--fresh", kind=HastyShop, **self.afflict("users", "if nth == 0: time.sleep(60)"))
        self.assertIn("run_all  | users was not ready in 1 s; killing it", shop.lines)

    def test_what_a_child_has_started_ends_with_it(self):
        for more in ("", ", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"):  # one may keep the output open
            shop = self.open("--fresh", kind=HastyShop, **self.afflict(
                "users", f"print('grandchild', subprocess.Popen(['sleep', '60']{more}).pid, flush=True)"))
            [users], grandchild = shop.children("users"), int(shop.wait_for(r"grandchild (\d+)")[1])
            os.kill(users, signal.SIGKILL)
            second = int(shop.wait_for(r"grandchild (\d+)", times=2)[1])
            self.assertTrue(comes_true(lambda pid=grandchild: not is_running(pid)))
            shop.wait_for("Users service listening", times=2)
            self.assertEqual(shop.stop(), 0)
            self.assertTrue(comes_true(lambda pid=second: not is_running(pid)))

    def test_a_process_that_has_left_the_group_and_keeps_the_output_open_is_not_waited_for(self):
        shop = self.open("--fresh", kind=HastyShop, **self.afflict(
            "users", "print('daemon', subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"))
        [users] = shop.children("users")
        os.kill(users, signal.SIGKILL)
        for times in (1, 2):
            self.addCleanup(os.kill, int(shop.wait_for(r"daemon (\d+)", times)[1]), signal.SIGKILL)
        shop.wait_for("Users service listening", times=2)
        self.assertEqual(ask(shop.first, target="/users").status, 200)

    def test_one_that_cannot_be_started_for_lack_of_something_is_tried_again(self):
        shop = self.open("--fresh", kind=HastyShop)
        [users] = shop.children("users")
        limits = resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(users, signal.SIGKILL)
        shop.wait_for("^run_all .*users cannot be started now: Too many open files")
        resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE, limits)
        self.assertEqual(ask(shop.first, target="/users").status, 200)

    def test_one_that_prints_a_lot_slows_only_itself_and_each_line_comes_whole(self):
        lines = 30_000
        shop = self.open("--fresh", kind=SmallShop, **self.afflict("users", f"""
            def shout():
                for n in range({lines}): os.write(1, b"%06d%s\\n" % (n, b"x" * 1000))
            threading.Thread(target=shout).start()"""))
        times = []
        while f"users    | {lines - 1:06}" + "x" * 1000 not in shop.lines[-100:]:
            began = time.monotonic()
            self.assertEqual(ask(shop.first, target="/").status, 200)
            times.append(time.monotonic() - began)
        self.assertLess(statistics.median(times), 0.2)
        shouted = [line for line in shop.lines if line.endswith("xxx")]
        self.assertEqual(shouted, [f"users    | {n:06}{'x' * 1000}" for n in range(lines)])
        shop.wait_for(" GET / 200 ", times=len(times))

    @unittest.skipUnless(shutil.which("unshare") and hasattr(os, "geteuid") and os.geteuid() == 0,
                         "only root can make a process the first of a container, and only on Linux")
    def test_as_the_first_process_of_a_container_it_collects_orphans_and_ends_as_ever(self):
        environment = {**os.environ, **self.afflict("users", "subprocess.Popen(['sh', '-c', 'sleep 0.1 & sleep 0'])")}
        first = free_ports()
        container = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", *SmallShop.module, "--fresh",
             "--port", str(first)], cwd=TOP, env=environment, stdout=subprocess.PIPE, text=True)
        self.addCleanup(container.stdout.close)
        self.addCleanup(container.wait)
        self.addCleanup(container.kill)
        while "ready in" not in (line := container.stdout.readline()):
            self.assertTrue(line)
        [supervisor] = children_of(container.pid)
        self.assertTrue(comes_true(lambda: len(children_of(supervisor)) == 2))  # a zombie counts
        os.kill(supervisor, signal.SIGTERM)
        self.assertEqual(container.wait(PATIENCE), 0)


@unittest.skipUnless(hasattr(signal, "SIGHUP"), "this system has no SIGHUP")
class RenewedShopTest(ShopTestCase):
    def test_every_process_is_replaced_and_no_request_fails_meanwhile(self):
        shop = self.open("--fresh", "--workers", "2")
        before, over, failures, answered = set(shop.children()), threading.Event(), [], []

        def keep_asking(target: str, keeps: bool) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", shop.first, timeout=PATIENCE)
            while not over.is_set():
                try:
                    connection.request("GET", target)
                    response = connection.getresponse()
                    body = response.read().decode()
                    answered.append(response.status)
                    if (response.status, body) != (200, SEED[target]):
                        failures.append((response.status, body))
                except Exception as error:
                    failures.append(error)
                    connection.close()
                if not keeps:
                    connection.close()
            connection.close()

        threads = [threading.Thread(target=keep_asking, args=(target, keeps))
                   for target in ("/users", "/products", "/orders") for keeps in (True, False)]
        for thread in threads:
            thread.start()
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("^run_all .* every process is a new one")
        over.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        self.assertGreater(len(answered), 50)
        self.assertTrue(comes_true(lambda: len(shop.children()) == 5))
        self.assertFalse(before & set(shop.children()))
        self.assertEqual(shop.stop(), 0)
        self.assert_nothing_is_left(shop)

    def test_one_whose_successor_fails_goes_on(self):
        shop = self.open("--fresh", kind=SmallShop, **self.afflict("users", "if nth > 0: sys.exit('no more')"))
        before = shop.children()
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("^run_all .*users ended with exit status 1 before it listened; the one that it was to replace go")
        self.assertEqual(ask(shop.first, target="/users").body.decode(), SEED["/users"])
        self.assertFalse(comes_true(lambda: sum("the one that it was" in line for line in shop.lines) > 1, 2 * MOMENT))
        self.assertEqual(shop.children(), before)


class RefusalTest(ShopTestCase):
    def test_a_taken_port_is_named_with_who_needs_it_and_nothing_is_started(self):
        for n, name in ((0, "gateway"), (2, "products")):
            with self.subTest(name):
                first = free_ports()
                with socket.create_server(("127.0.0.1", first + n)):
                    shop = Shop("--fresh", first=first)
                    self.addCleanup(shop.kill)
                    self.assertEqual(shop.status(), 1)
                self.assertEqual(len(shop.lines), 1)
                self.assertRegex(shop.lines[0], rf"\b{first + n}\b.*\b{name}\b")
                self.assert_nothing_is_left(shop)

    def test_a_bad_setting_of_a_child_is_the_shops(self):
        shop = Shop("--fresh", MICROSHOP_ORDERS_URL="nowhere")
        self.addCleanup(shop.kill)
        self.assertEqual(shop.status(), 2)
        self.assertRegex("\n".join(shop.lines), "(?m)^gateway .*MICROSHOP_ORDERS_URL: 'nowhere'")
        self.assert_nothing_is_left(shop)

    def test_a_bad_setting_is_named_in_one_line(self):
        with (process("microshop.run_all", "--prot", "3000") as flag,
              process("microshop.run_all", "--port", "abc") as value,
              process("microshop.run_all", MICROSHOP_PORT="abc") as twin,
              process("microshop.run_all", "--data", __file__) as data,
              process("microshop.run_all", "--port", "65533") as port):  # the services' would end at 65536
            for shop, named in [
                    (flag, "--prot"), (value, "--port.*abc"), (twin, "MICROSHOP_PORT.*abc"), (port, "65533"),
                    (data, "--data.*is not a folder")]:
                with self.subTest(named):
                    self.assertEqual(shop.status(), 2)
                    self.assertEqual(len(shop.lines), 1)
                    self.assertRegex(shop.lines[0], named)


if __name__ == "__main__":
    unittest.main()
