"""The shop as a person runs it: one command opens it, shows it, and leaves nothing behind."""
import contextlib
import http.client
import json
import os
import pty
import random
import re
import resource
import secrets
import select
import shlex
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
from unittest import mock

from microshop import SERVICES, run_all
from microshop.chassis import config
from tests.helpers import PATIENCE, TOP, Process, Wire, ask, process
from tests.lanes import LANES

CASES = json.loads((TOP / "tests" / "golden.json").read_text())["cases"]
SEED = {case["path"]: case["body"] for case in CASES
        if case["method"] == "GET" and case["port"] == 3000}
PORTS = 2 + len(SERVICES)  # that a shop needs, in a row: also for the gateway and live
NEVER = "1000"             # seconds for --grace or --timeout that no test waits for
LONG = 100 * PATIENCE      # seconds that no test waits for


def free_ports() -> int:
    """Return the first of PORTS free ports in a row, below those that systems choose from."""
    lane = int(os.environ.get("TEST_LANE", "0"))
    while True:
        first = random.randrange(20000, 30000, PORTS * LANES) + PORTS * lane
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + PORTS):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def port_of(name: str, first: int) -> int:
    """Return the port of a process in a shop whose gateway has the port `first`."""
    return first + ["gateway", *SERVICES, "live"].index(name)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except ConnectionError:
        return True
    return False


def states_of(*pids: int) -> dict[int, tuple[str, str]]:
    """Return the state and the command line of those of the processes that exist."""
    table = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "state=", "-o", "args=", "-p", ",".join(map(str, pids))],
        capture_output=True, text=True).stdout
    rows = re.findall(r"(?m)^ *(\d+) +(\S+) +(.*)$", table)
    return {int(pid): (state, command) for pid, state, command in rows}


def is_running(pid: int) -> bool:
    return any(not state.startswith("Z") for state, _ in states_of(pid).values())


def comes_true(condition: Callable[[], bool]) -> bool:
    """Look again and again until a condition holds; False if it does not hold in PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.02)
    return True


class Shop(Process):
    """The supervisor, with ports from `first` on and a `folder` for its temporary files."""

    module = ("microshop.run_all",)
    own_flags: tuple[str, ...] = ()

    def __init__(self, *flags: str, first: int | None = None, **environment: str):
        self.first, self.folder = first or free_ports(), tempfile.mkdtemp()
        port = ("--port", str(self.first))
        super().__init__(*self.module, *port, *self.own_flags, *flags,
                         TMPDIR=self.folder, **environment)

    def wait_until_ready(self) -> "Shop":
        self.wait_for(r"^run_all +\| ready in ")
        return self

    def started(self, name: str = r"(?!run_all)\w+") -> list[int]:
        """Return the pids of all children that the shop says it has started, or of some."""
        said = re.compile(rf"^run_all .* started {name} \(pid (\d+)\)")
        return [int(match[1]) for line in self.lines if (match := said.search(line))]

    def children(self, name: str = r"(?!run_all)\w+") -> list[int]:
        """Return the pids of those children that still run."""
        states = states_of(*self.started(name), os.getpid())
        return [pid for pid, (state, command) in states.items()
                if not state.startswith("Z") and "--supervised" in command]

    def child(self, name: str) -> int:
        [pid] = self.children(name)
        return pid

    def cores(self) -> dict[str, set[int]]:
        """Return the cores that each process of a shop with two gateways may use, by its name."""
        return {name: os.sched_getaffinity(self.child(name))
                for name in ("gateway", "gateway2", *SERVICES, "live")}

    def has_said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    def kill(self) -> None:
        self.popen.kill()
        self.status()
        self.popen.stdout.close()
        for pid in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        comes_true(lambda: not self.children())
        shutil.rmtree(self.folder)


def after(code: str) -> tuple[str, str]:
    """Return the module and the flag that run some code before a shop with one service."""
    return "tests.after", f"""if True:
        from microshop import run_all
        from microshop.chassis import child, supervisor
        {code}
        run_all.main()"""


class SmallShop(Shop):
    """A shop with one service and without live, which starts sooner.

    For the supervisor it is as good as one with three.
    """

    module = after("run_all.SERVICES = {'users': 3001}")
    own_flags = ("--no-live",)


class QuickShop(SmallShop):
    """A small shop that starts a child again sooner than others do."""

    module = after("run_all.SERVICES, child.RestartPolicy.FIRST_PAUSE = {'users': 3001}, 0.02")


class UnfairShop(SmallShop):
    """A small shop whose gateway gets a hundredth of the grace period, and the service the rest."""

    module = after("run_all.SERVICES, supervisor.KILL_SHARE = {'users': 3001}, 0.01")


class PatientShop(Shop):
    """A shop that never kills a child because it hangs."""

    module = after(f"child.RestartPolicy.HANG_TIME = {LONG}")


class MovedClockShop(SmallShop):
    """A small shop, to which SIGUSR1 and SIGUSR2 say that 11 seconds have passed."""

    module = ("tests.moved_clock",)


class HeadShop(SmallShop):
    """A small shop that prints into `head`: that reads some lines, and then closes the pipe."""

    LINES = 4  # the folder, and one for each process

    def _read(self) -> None:
        for _ in range(self.LINES):
            self.lines.append(self.popen.stdout.readline().decode())
        self.popen.stdout.close()


class UnreadShop(SmallShop):
    """A small shop whose output is read until it is ready, and never again."""

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

        `affliction` is Python. There, `nth` is the number of its processes that began before.
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
        """Send all of a request but five bytes, once the gateway has begun to handle it."""
        wire = Wire(shop.first)
        self.addCleanup(wire.__exit__)
        wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\n"
                  b"Content-Length: 10\r\n\r\n")
        self.assertEqual(wire.read().status, 100, "the interim answer to Expect: 100-continue")
        wire.send(b"12345")
        return wire

    def assert_serves(self, shop: Shop, target: str = "/users") -> None:
        answer = ask(shop.first, target=target)
        self.assertEqual((answer.status, answer.body.decode()), (200, SEED[target]),
                         f"the answer to GET {target} through the gateway")

    def assert_nothing_is_left(self, shop: Shop) -> None:
        self.assertEqual(shop.children(), [], "processes that the shop has left behind")
        self.assertEqual(os.listdir(shop.folder), [], "temporary files that it has left behind")


class OpenShopTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.shop = Shop("--fresh", "--port", "0")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.gateway = cls.shop.port(r"^gateway +\| API Gateway")

    def test_every_process_prints_where_it_listens(self):
        ports = {self.gateway}
        for name in SERVICES:
            port = self.shop.port(rf"^{name} +\| {name.capitalize()} service")
            ports.add(port)
            self.assertEqual(ask(port, target="/health").json["service"], name)
        live = self.shop.port(r"^live +\| Live picture")
        self.assertEqual(ask(live, target="/health").json["service"], "live")
        self.assertEqual(len({*ports, live}), PORTS)

    def test_the_pid_of_every_process_is_printed(self):
        self.assertEqual(self.shop.started("run_all"), [self.shop.popen.pid])
        for name in ("gateway", *SERVICES, "live"):
            with self.subTest(name):
                [pid] = self.shop.started(name)
                self.assertIn(f"-m microshop.{name} ", states_of(pid)[pid][1])

    def test_one_line_says_how_soon_the_shop_was_ready_and_where(self):
        ready = [line for line in self.shop.lines if "ready" in line]
        self.assertEqual(len(ready), 1)
        self.assertRegex(ready[0], rf"ready in [0-9.]+ s\b.* http://localhost:{self.gateway}\b")

    def test_the_gateway_answers_as_the_seed_does(self):
        for path in ("/", "/users", "/products", "/orders"):
            with self.subTest(path):
                self.assertEqual(ask(self.gateway, target=path).body.decode(), SEED[path])

    def test_orders_finds_the_services_that_an_order_needs(self):
        answer = ask(self.gateway, "POST", "/orders", {"Content-Type": "application/json"},
                     b'{"userId":1,"productId":102,"quantity":101}')  # rejected: no list changes
        self.assertEqual((answer.status, answer.json["detail"]),
                         (409, "product 102 has 100 of 101 units left"))
        request_id = answer.headers["x-request-id"]
        for name in ("gateway", "orders", "users", "products"):
            self.shop.wait_for(rf"^{name} +\| .*\b{request_id} ")

    def test_a_request_is_logged_under_one_id_by_the_gateway_and_the_service(self):
        request_id = ask(self.gateway, target="/users/1").headers["x-request-id"]
        for name in ("gateway", "users"):
            self.shop.wait_for(rf"^{name} +\| .*\b{request_id} GET /users/1 200 ")

    def test_names_have_no_colours_in_a_pipe(self):
        for line in self.shop.lines:
            self.assertRegex(line, r"^[a-z_]+ +\| [^\33]+$")

    def test_fresh_data_are_in_a_temporary_folder(self):
        files = [path.name for path in Path(self.shop.folder).glob("*/*.db")]
        self.assertCountEqual(files, [f"{name}.db" for name in SERVICES])

    def test_the_folder_of_fresh_data_is_printed_with_a_command_that_audits_it(self):
        line = self.shop.wait_for(r"^run_all .* the data is in (\S+) .* python -m (.+)$")
        self.assertTrue((Path(line[1]) / "users.db").exists(), f"no users.db in {line[1]}")
        audit = subprocess.run([sys.executable, "-m", *shlex.split(line[2])], cwd=TOP,
                               capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual((audit.returncode, audit.stderr), (0, ""))
        self.assertIn(line[1], audit.stdout)


class EndedShopTest(ShopTestCase):
    """What is left of a quiet shop that was asked for some users and then got SIGTERM."""

    @classmethod
    def setUpClass(cls):
        cls.home = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.shop = Shop("--data", str(cls.home / "kept"), "--quiet", "--workers", "1",
                        "--grace", NEVER, MICROSHOP_PORT="abc", MICROSHOP_QUIET="0",
                        MICROSHOP_DATA=str(cls.home / "other"), MICROSHOP_WORKERS="0")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.asked = ask(cls.shop.first, target="/users")
        cls.began_with = cls.shop.children()
        cls.status = cls.shop.stop(signal.SIGTERM)

    def test_it_ended_with_status_0_long_before_its_grace_period(self):
        self.assertEqual(self.status, 0)

    def test_nothing_is_left_of_its_children(self):
        self.assertEqual(len(self.began_with), PORTS)
        self.assert_nothing_is_left(self.shop)

    def test_a_quiet_shop_logs_no_request(self):
        self.assertEqual(self.asked.status, 200)
        self.assertNotIn("/users", "".join(self.shop.lines))

    def test_a_flag_wins_over_its_environment_variable(self):
        self.assertEqual([path.name for path in self.home.iterdir()], ["kept"])

    def test_the_next_start_finds_the_data(self):
        path = self.home / "kept" / "users.db"
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE users SET name = 'Carol' WHERE id = 1")
        shop = self.open(MICROSHOP_DATA=str(self.home / "kept"))
        self.assertEqual(ask(shop.first, target="/users/1").json["name"], "Carol")


class EndTest(ShopTestCase):
    def test_ctrl_c_lets_a_request_in_flight_be_answered_by_its_service(self):
        shop = self.open("--fresh")
        wire = self.hang_request(shop)
        os.killpg(shop.popen.pid, signal.SIGINT)  # as a terminal does: to the supervisor's group
        shop.wait_for(r"^run_all .*stopping")
        self.assertTrue(comes_true(lambda: is_refused(shop.first)),
                        "the gateway still accepts connections")
        self.assertFalse(is_refused(port_of("users", shop.first)),
                         "users stopped before the gateway had ended")
        wire.send(b"67890")
        self.assertIn(wire.read().status, range(400, 500), "the answer of users")
        self.assertEqual(shop.status(), 0)
        self.assertRegex("\n".join(shop.lines), r"(?m)^users .* POST /users 4")
        self.assert_nothing_is_left(shop)

    def test_more_than_one_ctrl_c_ends_it_at_once(self):
        shop = self.open("--fresh", "--grace", NEVER, kind=SmallShop)
        wire = self.hang_request(shop)
        os.killpg(shop.popen.pid, signal.SIGINT)
        shop.wait_for(r"^run_all .*stopping")
        for _ in range(5):
            os.killpg(shop.popen.pid, signal.SIGINT)
        self.assertEqual(shop.status(), 130)
        self.assertTrue(wire.is_closed(), "the request in flight got an answer")
        self.assertNotIn("Traceback", "".join(shop.lines))
        self.assert_nothing_is_left(shop)

    def test_two_signals_in_quick_succession_announce_no_restart(self):
        shop = self.open("--fresh", "--grace", NEVER, kind=SmallShop)
        self.hang_request(shop)
        shop.popen.send_signal(signal.SIGINT)
        shop.popen.send_signal(signal.SIGTERM)  # another one: two of a kind may arrive as one
        self.assertIn(shop.status(), (128 + signal.SIGINT, 128 + signal.SIGTERM))
        self.assertFalse(shop.has_said("again in"), shop.lines)
        self.assert_nothing_is_left(shop)

    def test_a_terminal_that_is_closed_ends_it(self):
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith("MICROSHOP_")}
        ours, theirs = pty.openpty()
        code = ("import fcntl, termios, sys; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                "sys.argv[1:] = ['--fresh', '--port', '0']; "
                "from microshop.run_all import main; main()")
        child = subprocess.Popen(
            [sys.executable, "-c", code], cwd=TOP, env=clean,
            stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True)
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.kill)
        os.close(theirs)
        while b"ready in" not in (line := child.stdout.readline()):
            self.assertTrue(line, "the shop ended before it was ready")
        os.close(ours)
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_a_gateway_that_hangs_does_not_cost_the_services_their_clean_end(self):
        shop = self.open("--fresh", "--grace", "30", kind=UnfairShop)
        os.kill(shop.child("gateway"), signal.SIGSTOP)
        self.assertEqual(shop.stop(), 0)
        self.assertEqual([line for line in shop.lines if "killing" in line],
                         ["run_all | gateway did not end in time; killing it"])
        self.assert_nothing_is_left(shop)

    def test_the_children_of_a_killed_supervisor_end_by_themselves(self):
        shop = self.open("--fresh", kind=SmallShop)
        self.assertEqual(len(shop.children()), 2)
        shop.popen.kill()
        shop.status()
        self.assertTrue(comes_true(lambda: not shop.children()))

    def test_it_ends_although_its_output_is_not_read(self):
        shop = self.begin("--fresh", "--grace", "0.5", kind=UnreadShop)
        shop.wait_for("ready in")
        for _ in range(100):
            ask(shop.first, target="/" + "x" * 4000)  # whose log lines fill each pipe on the way
        shop.popen.send_signal(signal.SIGTERM)
        self.assertEqual(shop.popen.wait(PATIENCE), 0)
        self.assertTrue(comes_true(lambda: not shop.children()))

    def test_it_ends_when_its_output_is_closed(self):
        shop = self.begin("--fresh", kind=HeadShop)
        self.assertEqual(shop.status(), 0)
        self.assertEqual(len(shop.started()), 2)
        self.assert_nothing_is_left(shop)

    def test_no_temporary_folder_is_made_without_fresh(self):
        data = self.enterContext(tempfile.TemporaryDirectory())
        shop = self.open("--data", data, kind=SmallShop)
        self.assertEqual(os.listdir(shop.folder), [])


class ClosedStreamsTest(unittest.TestCase):
    def test_a_shop_serves_without_standard_streams(self):
        self.check(*SmallShop.module, *SmallShop.own_flags, "--fresh")

    def test_a_service_alone_serves_without_standard_streams(self):
        self.check("microshop.users", "--data", self.enterContext(tempfile.TemporaryDirectory()))

    def check(self, *module: str) -> None:
        first, folder = free_ports(), self.enterContext(tempfile.TemporaryDirectory())
        shop = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", *module,
             "--port", str(first)],
            cwd=TOP, env={**os.environ, "TMPDIR": folder})
        self.addCleanup(shop.wait)
        self.addCleanup(shop.kill)

        def serves() -> bool:
            with contextlib.suppress(OSError):
                return ask(first, target="/users").body.decode() == SEED["/users"]
            return False

        self.assertTrue(comes_true(serves), "users do not answer")
        shop.terminate()
        self.assertEqual(shop.wait(PATIENCE), 0)


class KilledProcessesTest(ShopTestCase):
    """A shop with two gateway processes, where one of them and users are killed and come back."""

    @classmethod
    def setUpClass(cls):
        cls.shop = Shop("--fresh", "--workers", "2")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.gateways = cls.shop.children("gateway") + cls.shop.children("gateway2")
        for pid in (cls.shop.child("users"), cls.gateways[0]):
            os.kill(pid, signal.SIGKILL)
        for name in ("users", "gateway"):
            cls.shop.wait_for(rf"^run_all .*\b{name}\b.*\b137\b")
        cls.meanwhile = ask(cls.shop.first, target="/products")
        listening = r"listening at http://\S+:(\d+)$"
        cls.users_again = cls.shop.wait_for(f"Users service {listening}", times=2)
        cls.gateway_again = cls.shop.wait_for(f"API Gateway {listening}", times=3)

    def test_the_others_serve_meanwhile(self):
        self.assertEqual(self.meanwhile.body.decode(), SEED["/products"])

    def test_a_killed_service_serves_again_on_its_port(self):
        self.assertEqual(int(self.users_again[1]), port_of("users", self.shop.first))
        self.assert_serves(self.shop)

    def test_two_gateways_share_a_port_that_the_system_chose(self):
        shop = self.open("--fresh", "--workers", "2", "--port", "0", kind=SmallShop)
        pattern = r"API Gateway listening at http://\S+:(\d+)$"
        ports = {int(shop.wait_for(pattern, times)[1]) for times in (1, 2)}
        self.assertEqual(len(ports), 1)

    def test_each_of_two_gateways_on_one_port_answers_without_the_other(self):
        self.assertEqual(len(self.gateways), 2)
        self.assertEqual(int(self.gateway_again[1]), self.shop.first)
        os.kill(self.gateways[1], signal.SIGKILL)  # the one that answered meanwhile
        self.shop.wait_for(r"^run_all .*\bgateway2?\b.*\b137\b", times=2)
        self.assert_serves(self.shop, "/")


class HangingServiceTest(ShopTestCase):
    """A shop whose products service hangs while two hundred clients ask for it."""

    CLIENTS, MOST, ROUNDS, REQUESTS = 200, 64, 5, 50
    ROOM = 3  # times as long as usual may a request take; other programs disturb single rounds

    def time_users(self, wire: Wire) -> float:
        """Return the median of the seconds that GET /users takes on one connection."""
        times = []
        for _ in range(self.REQUESTS):
            began = time.perf_counter()
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(wire.read().body.decode(), SEED["/users"])
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def test_a_service_that_hangs_affects_only_requests_that_need_it(self):
        shop = self.open("--fresh", "--quiet", "--timeout", NEVER, kind=PatientShop)
        wire = self.enterContext(Wire(shop.first))
        usual = statistics.median(self.time_users(wire) for _ in range(self.ROUNDS))
        products = shop.child("products")
        os.kill(products, signal.SIGSTOP)
        try:
            clients = [self.enterContext(Wire(shop.first)) for _ in range(self.CLIENTS)]
            for client in clients:
                client.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
            waiting = {client.socket: client for client in clients}
            while len(waiting) > self.MOST:  # the others are rejected
                answered = select.select(waiting, [], [], PATIENCE)[0]
                self.assertTrue(answered, f"{len(waiting)} requests wait for products")
                for each in answered:
                    self.assertEqual(waiting.pop(each).read().status, 503)
            self.assertTrue(comes_true(lambda: self.time_users(wire) < self.ROOM * usual),
                            f"GET /users takes more than {self.ROOM} times {usual:.4f} s")
            self.assertEqual(select.select(waiting, [], [], 0)[0], [],
                             "requests that should wait for products were answered")
        finally:
            os.kill(products, signal.SIGCONT)
        statuses = [client.read().status for client in waiting.values()]
        self.assertEqual(statuses, [200] * self.MOST)


class GuardedShopTest(ShopTestCase):
    def test_the_settings_that_guard_the_gateway_are_passed_on(self):
        token = secrets.token_hex()
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(f"{token}\n")
            file.flush()
            shop = self.open("--fresh", "--token-file", file.name, "--rate", "5/h", "--timeout=2.5",
                             "--max-in-flight=7", "--max-connections=50", "--grace=3",
                             MICROSHOP_TOKEN=secrets.token_hex())
        states = states_of(*shop.children())
        commands = "\n".join(command for _, command in states.values())
        for command in (
            rf"microshop\.gateway .*--port {shop.first} .*--timeout=2.5 .*--max-in-flight=7",
            rf"microshop\.gateway .*--port {shop.first} .*--grace=2.1\d* --max-connections=50\b",
            rf"microshop\.users .*--port {shop.first + 1} .*--max-connections=50\b",
        ):
            self.assertRegex(commands, command)
        shown = {"Authorization": f"Bearer {token}"}
        deleted = [ask(shop.first, "DELETE", "/users/2", headers).status for headers in ({}, shown)]
        self.assertEqual(deleted, [401, 204], "DELETE without and with the token")
        asked = [ask(shop.first).status for _ in range(4)]
        self.assertEqual(asked, [200, 200, 200, 429], "the third to the sixth of five requests")
        self.assertFalse(token in "".join(shop.lines) + commands, "the token was shown")

    @unittest.skipUnless(Path("/proc/self/environ").exists(), "no /proc on this system")
    def test_only_the_gateway_gets_the_token(self):
        token = secrets.token_hex()
        shop = self.open("--fresh", MICROSHOP_TOKEN=token)
        for name in ("gateway", *SERVICES, "live"):
            environment = Path(f"/proc/{shop.child(name)}/environ").read_bytes()
            self.assertEqual(token.encode() in environment, name == "gateway", name)

    def test_a_bad_token_is_refused_without_being_shown(self):
        with process("microshop.run_all", "--token-file", "/nowhere") as file, \
                process("microshop.gateway", MICROSHOP_TOKEN="to ken") as token:
            cases = ((file, "--token-file: '/nowhere' cannot be read"),
                     (token, "MICROSHOP_TOKEN: "))
            for child, named in cases:
                self.assertEqual(child.status(), 2)
                self.assertIn(named, child.lines[0])
                self.assertEqual(len(child.lines), 1)
                self.assertNotIn("to ken", child.lines[0])


class TerminalTest(unittest.TestCase):
    """What a terminal shows of a shop that ends by itself, because one of its settings is bad."""

    @classmethod
    def setUpClass(cls):
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("MICROSHOP_", "NO_COLOR"))}
        clean["TMPDIR"] = cls.enterClassContext(tempfile.TemporaryDirectory())
        clean["MICROSHOP_ORDERS_URL"] = "nowhere"
        terminals = []
        for wish in ({"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
            terminals.append(subprocess.Popen(
                [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])",
                 sys.executable, "-m", "microshop.run_all", "--port", "0", "--fresh"],
                cwd=TOP, env={**clean, **wish}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, text=True))
            cls.addClassCleanup(terminals[-1].kill)
        shown = [terminal.communicate(timeout=PATIENCE)[0] for terminal in terminals]
        cls.coloured, cls.no_color, cls.dumb = shown

    def test_names_have_colours_and_those_of_run_all_and_the_gateway_differ(self):
        labels = re.findall("\33\\[([0-9;]+)m([a-z_]+) +\\| \33\\[0m", self.coloured)
        colours = {name: colour for colour, name in labels}
        self.assertIn("run_all", colours)
        self.assertIn("gateway", colours)
        self.assertNotEqual(colours["run_all"], colours["gateway"])

    def test_no_color_and_a_dumb_terminal_get_no_colours(self):
        for shown in (self.no_color, self.dumb):
            self.assertRegex(shown, r"(?m)^run_all +\| ")
            self.assertNotIn("\33", shown)


class FailingChildTest(ShopTestCase):
    """What the supervisor does about children that fail, each in its own way."""

    def test_a_process_that_hangs_is_killed_and_started_again(self):
        shop = self.open("--fresh", kind=MovedClockShop)
        users = shop.child("users")
        os.kill(users, signal.SIGSTOP)
        self.assertTrue(comes_true(lambda: states_of(users)[users][0].startswith("T")))
        shop.popen.send_signal(signal.SIGUSR1)
        shop.wait_for(r"^run_all .*\| users has sent no heartbeat for 10 s; killing it$")
        shop.wait_for(r"^run_all .*\| users was killed by signal 9 \(exit status 137\); "
                      r"starting it again in 0\.\d s$")
        self.assert_serves(shop)
        self.assertNotEqual(shop.child("users"), users)

    def test_no_process_is_killed_for_a_time_in_which_the_supervisor_was_paused(self):
        shop = self.open("--fresh", kind=MovedClockShop)
        shop.popen.send_signal(signal.SIGUSR2)
        shop.popen.send_signal(signal.SIGHUP)  # which is obeyed after the next look at the clock
        shop.wait_for("^run_all .*every process has been replaced")
        self.assertFalse(shop.has_said("killing it|again in"), shop.lines)
        self.assert_serves(shop)

    def test_a_process_that_hangs_while_it_starts_is_killed(self):
        shop = self.begin("--fresh", kind=MovedClockShop, **self.afflict(
            "users", "if nth == 0: print('sleeps', flush=True); time.sleep(300)"))
        shop.wait_for(r"^users +\| sleeps")
        shop.popen.send_signal(signal.SIGUSR1)
        shop.wait_until_ready()
        self.assertIn("run_all | users has sent no heartbeat for 10 s; killing it", shop.lines)

    def test_a_request_for_a_killed_service_waits_for_the_next_process(self):
        shop = self.open("--fresh", kind=SmallShop)
        for name in ("users", "gateway"):
            os.kill(shop.child(name), signal.SIGKILL)
            self.assert_serves(shop)

    def test_a_child_that_always_fails_is_given_up_and_its_last_output_is_shown(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "users.db").write_bytes(b"no database " * 1000)
            shop = self.begin("--data", folder, kind=QuickShop)
            self.assertEqual(shop.status(), 1)
        text = "\n".join(shop.lines)
        why = shop.wait_for(rf"^users +\| cannot use {folder}/users\.db: .*")[0]
        self.assertEqual(text.count(why), 5 + 1, "once for each start, and once at the end")
        again = "run_all | users ended with exit status 1 before it was ready; starting it again"
        self.assertEqual(text.count(again), 4)
        self.assertIn("run_all | users failed to start 5 times in a row; stopping. "
                      f"Its last output was:\n{why}\n", text)
        self.assert_nothing_is_left(shop)

    def test_a_child_that_starts_at_last_is_not_given_up(self):
        shop = self.open("--fresh", kind=QuickShop,
                         **self.afflict("users", "if nth < 4: os._exit(7)"))
        failed = [line for line in shop.lines if "users ended with exit status 7" in line]
        self.assertEqual(len(failed), 4)

    def test_a_child_that_was_ready_once_is_started_again_whatever_keeps_it_from_starting(self):
        shop = self.open("--fresh", kind=QuickShop, **self.afflict(
            "users", "if 0 < nth < 3: os._exit(2)"))  # as for a token file that is being replaced
        os.kill(shop.child("users"), signal.SIGKILL)
        shop.wait_for("users ended with exit status 2 before it was ready; starting it again", 2)
        self.assert_serves(shop)

    def test_processes_that_a_child_has_started_end_with_it(self):
        for more in ("", ", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"):
            with self.subTest(keeps_output_open=not more):
                shop = self.open("--fresh", kind=QuickShop, **self.afflict(
                    "users", f"sleep = subprocess.Popen(['sleep', '300']{more})\n"
                             "print('grandchild', sleep.pid, flush=True)"))
                first = int(shop.wait_for(r"grandchild (\d+)")[1])
                os.kill(shop.child("users"), signal.SIGKILL)
                second = int(shop.wait_for(r"grandchild (\d+)", times=2)[1])
                self.assertTrue(comes_true(lambda pid=first: not is_running(pid)))
                shop.wait_for("Users service listening", times=2)
                self.assertEqual(shop.stop(), 0)
                self.assertTrue(comes_true(lambda pid=second: not is_running(pid)))

    def test_a_daemon_that_keeps_the_output_of_a_child_open_does_not_delay_its_restart(self):
        shop = self.open("--fresh", kind=QuickShop, **self.afflict(
            "users", "sleep = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
                     "print('daemon', sleep.pid, flush=True)"))
        os.kill(shop.child("users"), signal.SIGKILL)
        for times in (1, 2):
            daemon = int(shop.wait_for(r"daemon (\d+)", times)[1])
            self.addCleanup(os.kill, daemon, signal.SIGKILL)
        shop.wait_for("Users service listening", times=2)
        self.assert_serves(shop)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "no prlimit on this system")
    def test_a_child_that_the_system_has_no_room_for_is_started_later(self):
        shop = self.open("--fresh", kind=SmallShop)
        limits = resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(shop.child("users"), signal.SIGKILL)
        shop.wait_for(r"^run_all .*\| users could not be started: Too many open files; "
                      r"trying again in \d+\.\d s$")
        resource.prlimit(shop.popen.pid, resource.RLIMIT_NOFILE, limits)
        self.assert_serves(shop)

    def test_a_child_that_prints_a_lot_delays_no_other_and_each_of_its_lines_comes_whole(self):
        enough = Path(self.enterContext(tempfile.TemporaryDirectory())) / "enough"
        shop = self.open("--fresh", kind=SmallShop, **self.afflict("users", f"""
            def shout():
                n = 0
                while n % 100 or not os.path.exists({str(enough)!r}):
                    os.write(1, b"%06d%s\\n" % (n, b"x" * 1000))
                    n += 1
                os.write(1, b"that was all\\n")
            threading.Thread(target=shout).start()"""))
        self.assertTrue(comes_true(lambda: shop.has_said("xxx$")))
        self.assertEqual(ask(shop.first, target="/").status, 200)
        self.assertTrue(comes_true(lambda: shop.has_said(r"^gateway .* GET / 200 ")),
                        "a line of the gateway is not shown while users prints")
        enough.touch()
        self.assertTrue(comes_true(lambda: shop.has_said("that was all")))
        shouted = [line for line in shop.lines if line.endswith("xxx")]
        self.assertEqual(shouted, [f"users   | {n:06}{'x' * 1000}" for n in range(len(shouted))])
        self.assertEqual(len(shouted) % 100, 0, "the last lines are missing")

    @unittest.skipUnless(shutil.which("unshare") and os.geteuid() == 0,
                         "only root can make a process the first of a container, on Linux")
    def test_as_the_first_process_of_a_container_it_collects_orphans_and_ends_as_usual(self):
        orphan = "subprocess.Popen(['sh', '-c', 'sleep 0.1 & sleep 0'])"
        affliction = self.afflict("users", orphan)
        container = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", *SmallShop.module,
             *SmallShop.own_flags, "--fresh", "--port", str(free_ports())],
            cwd=TOP, env={**os.environ, **affliction}, stdout=subprocess.PIPE, text=True)
        self.addCleanup(container.stdout.close)
        self.addCleanup(container.wait)
        self.addCleanup(container.kill)
        while "ready in" not in (line := container.stdout.readline()):
            self.assertTrue(line, "the shop ended before it was ready")

        def children_of(parent: int) -> list[int]:
            """Return the pids of a process's children, zombies among them."""
            table = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)],
                                   capture_output=True, text=True).stdout
            return [int(pid) for pid in table.split()]

        [supervisor] = children_of(container.pid)
        self.assertTrue(comes_true(lambda: len(children_of(supervisor)) == 2),
                        "the supervisor has more children than users and the gateway")
        os.kill(supervisor, signal.SIGTERM)
        self.assertEqual(container.wait(PATIENCE), 0)


class OptionalChildTest(ShopTestCase):
    """The shop works without live, whatever is wrong with that."""

    def test_a_bad_setting_of_live_does_not_stop_the_shop(self):
        shop = self.open("--fresh", MICROSHOP_GATEWAY_URL="nowhere")
        shop.wait_for(r"^live +\| .*MICROSHOP_GATEWAY_URL: 'nowhere'")
        shop.wait_for(r"^run_all +\| live ended with exit status 2 before it was ready; "
                      r"starting it again in 0\.\d s$")
        self.assert_serves(shop)

    def test_the_shop_is_ready_without_live_and_does_not_give_it_up(self):
        module = after("run_all.SERVICES, child.RestartPolicy.FIRST_PAUSE = {'users': 3001}, 0.02")
        shop = self.open("--fresh", kind=type("OwnShop", (Shop,), {"module": module}),
                         **self.afflict("live", "if nth < 6: os._exit(1)"))
        shop.wait_for("live ended with exit status 1 before it was ready; starting it again", 6)
        shop.wait_for(r"^live +\| Live picture at ")
        self.assertEqual(len([line for line in shop.lines if "ready in" in line]), 1)

    def test_live_that_is_killed_is_started_again(self):
        shop = self.open("--fresh")
        shop.wait_for(r"^live +\| Live picture at ")
        os.kill(shop.child("live"), signal.SIGKILL)
        shop.wait_for(r"^live +\| Live picture at ", times=2)
        self.assert_serves(shop)

    def test_a_rolling_restart_replaces_the_others_although_live_cannot_be_replaced(self):
        shop = self.open("--fresh", **self.afflict("live", "if nth > 0: os._exit(1)"))
        shop.wait_for(r"^live +\| Live picture at ")
        before = set(shop.children()) - {shop.child("live")}
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("live ended with exit status 1 before it was ready; the old process keeps")
        self.assertTrue(comes_true(lambda: len(shop.children()) == PORTS))
        self.assertFalse(before & set(shop.children()), "processes that were not replaced")

    def test_every_process_knows_how_often_it_was_started_before(self):
        shop = self.open("--fresh", kind=SmallShop)
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("^run_all .* every process has been replaced")
        self.assertTrue(comes_true(lambda: len(shop.children()) == 2))
        os.kill(shop.child("users"), signal.SIGKILL)
        shop.wait_for("Users service listening", times=3)
        for name, restarts in (("users", 2), ("gateway", 1)):
            command = states_of(shop.child(name))[shop.child(name)][1]
            self.assertRegex(command, rf"--supervised \d+,\d+,{restarts} ", name)


class Client(threading.Thread):
    """A client that asks for one target again and again, on one connection or on many."""

    def __init__(self, port: int, target: str, keeps_connection: bool):
        super().__init__()
        self.port, self.target, self.keeps_connection = port, target, keeps_connection
        self.is_over = threading.Event()
        self.answered = 0
        self.failures: list[Any] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        while not self.is_over.is_set():
            try:
                connection.request("GET", self.target)
                response = connection.getresponse()
                answer = (response.status, response.read().decode())
                if answer != (200, SEED[self.target]):
                    self.failures.append(answer)
            except Exception as error:
                self.failures.append(error)
                connection.close()
            self.answered += 1
            if not self.keeps_connection:
                connection.close()
        connection.close()


class RollingRestartTest(ShopTestCase):
    def test_every_process_is_replaced_and_no_request_fails_meanwhile(self):
        shop = self.open("--fresh", "--workers", "2")
        before = set(shop.children())
        clients = [Client(shop.first, target, keeps_connection)
                   for target in ("/users", "/products", "/orders")
                   for keeps_connection in (True, False)]
        for client in clients:
            client.start()
            self.addCleanup(client.join)
            self.addCleanup(client.is_over.set)
        self.assertTrue(comes_true(lambda: all(client.answered > 2 for client in clients)))
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("^run_all .* every process has been replaced")
        answered = [client.answered for client in clients]
        self.assertTrue(comes_true(lambda: all(
            client.answered > first + 2 for client, first in zip(clients, answered, strict=True))))
        for client in clients:
            client.is_over.set()
            client.join()
        self.assertEqual([client.failures for client in clients], [[]] * len(clients))
        self.assertTrue(comes_true(lambda: len(shop.children()) == PORTS + 1))
        self.assertFalse(before & set(shop.children()), "processes that were not replaced")
        self.assertEqual(shop.stop(), 0)
        self.assert_nothing_is_left(shop)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1,
                         "the system has a single core, or does not keep processes on a core")
    def test_every_process_is_kept_on_one_core_and_the_one_that_replaces_it_on_the_same(self):
        shop = self.open("--fresh", "--workers", "2")
        before = shop.cores()
        self.assertEqual([len(cores) for cores in before.values()], [1] * (PORTS + 1),
                         f"how many cores each process may use; they are {before}")
        in_use = set().union(*before.values())
        self.assertEqual(len(in_use), min(PORTS + 1, len(os.sched_getaffinity(0))),
                         f"how many cores the shop uses; its processes have {before}")
        shop.popen.send_signal(signal.SIGHUP)
        shop.wait_for("^run_all .* every process has been replaced")
        self.assertTrue(comes_true(lambda: len(shop.children()) == PORTS + 1))
        self.assertEqual(shop.cores(), before, "the cores of the processes after a rolling restart")

    def test_a_process_that_is_replaced_does_not_tell_a_health_check_that_the_shop_ends(self):
        shop = self.open("--fresh", kind=SmallShop)
        idle, slow = self.enterContext(Wire(shop.first)), self.enterContext(Wire(shop.first))
        idle.send(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
        self.assertEqual(idle.read().status, 200)
        slow.send(b"GET /health HTTP/1.1\r\nHost: shop\r\n")
        shop.popen.send_signal(signal.SIGHUP)
        self.assertTrue(idle.is_closed(), "the old process of the gateway closes idle connections")
        slow.send(b"\r\n")
        answer = slow.read()
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_a_sighup_for_every_process_replaces_them_and_kills_none(self):
        shop = self.open("--fresh", kind=SmallShop)
        for pid in [*shop.children(), shop.popen.pid]:
            os.kill(pid, signal.SIGHUP)
        shop.wait_for("^run_all .* every process has been replaced")
        self.assertFalse(shop.has_said("killed by signal"), shop.lines)
        self.assertEqual(shop.stop(), 0)

    def test_where_a_new_process_fails_the_old_one_goes_on_and_the_others_stay(self):
        shop = self.open("--fresh", kind=SmallShop,
                         **self.afflict("users", "if nth > 0: sys.exit('no more')"))
        before = shop.children()
        for times in (1, 2):  # the second request shows that the first one has ended
            shop.popen.send_signal(signal.SIGHUP)
            end = shop.wait_for(
                "^run_all .*users ended with exit status 1 before it was ready; (.*)", times)
            self.assertEqual(end[1],
                             "the old process keeps running, and no further process is replaced",
                             "what run_all says after the new process of users has failed")
            shop.wait_for("^run_all .*replacing every process", times)
        self.assert_serves(shop)
        self.assertEqual(len(shop.started("users")), 3, "one start, and one try for each request")
        self.assertEqual(len(shop.started("gateway")), 1)
        self.assertEqual(shop.children(), before)


class PlanTest(unittest.TestCase):
    """Which flags and which environment the children get."""

    def plan(self, *flags):
        """Return the children of a shop with these flags, by name."""
        settings = config.read("microshop.run_all", run_all.OPTIONS, arguments=[*flags])
        services, gateways = run_all.plan_children(settings)
        for child in services + gateways:
            self.addCleanup(child.listener.close)
        return {child.name: child for child in services + gateways}

    def test_an_empty_url_in_the_environment_counts_as_not_set(self):
        name = next(iter(SERVICES))
        variable = f"MICROSHOP_{name.upper()}_URL"
        with mock.patch.dict(os.environ, {variable: ""}):
            children = self.plan("--port", "0")
        port = children[name].listener.getsockname()[1]
        self.assertEqual(children["gateway"].environment[variable], f"http://127.0.0.1:{port}")

    def test_live_finds_the_gateway_on_this_machine_at_whatever_address_that_listens(self):
        for flags, host in ((), "127.0.0.1"), (("--host", "0.0.0.0"), "127.0.0.1"):
            with self.subTest(flags):
                children = self.plan("--port", "0", *flags)
                port = children["gateway"].listener.getsockname()[1]
                self.assertEqual(children["live"].environment["MICROSHOP_GATEWAY_URL"],
                                 f"http://{host}:{port}")

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "no IPv6 on this system")
    def test_live_finds_a_gateway_that_listens_at_ipv6_addresses(self):
        for host in ("::", "::1"):
            with self.subTest(host):
                children = self.plan("--port", "0", "--host", host)
                port = children["gateway"].listener.getsockname()[1]
                url = children["live"].environment["MICROSHOP_GATEWAY_URL"]
                self.assertEqual(url, f"http://[::1]:{port}")
                self.assertEqual(config.base_urls(url), [url])

    def test_only_the_gateway_gets_the_file_of_the_token(self):
        with (tempfile.NamedTemporaryFile("w") as file,
              mock.patch.dict(os.environ, MICROSHOP_TOKEN_FILE=file.name)):
            file.write("s3cret")
            file.flush()
            children = self.plan("--port", "0")
        self.assertEqual([name for name, child in children.items()
                          if "MICROSHOP_TOKEN_FILE" in child.environment], ["gateway"])

    def test_the_timeout_goes_to_the_gateway_and_the_services(self):
        children = self.plan("--port", "0", "--timeout", "30", "--no-live")
        self.assertEqual([*children], [*SERVICES, "gateway"], "the children without live")
        for name, child in children.items():
            self.assertIn("--timeout=30", child.flags, name)

    def test_live_writes_no_access_log_since_its_page_asks_every_second(self):
        self.assertIn("--quiet", self.plan("--port", "0")["live"].flags)


class RefusalTest(ShopTestCase):
    def test_a_port_in_use_is_named_with_the_process_that_needs_it_and_nothing_is_started(self):
        for name in ("gateway", "products", "live"):
            with self.subTest(name):
                first = free_ports()
                port = port_of(name, first)
                with socket.create_server(("127.0.0.1", port)):
                    shop = self.begin("--fresh", first=first)
                    self.assertEqual(shop.status(), 1)
                self.assertEqual(len(shop.lines), 1)
                self.assertRegex(shop.lines[0], rf"\b{port}\b.*\b{name}\b")
                self.assertEqual("--no-live" in shop.lines[0], name == "live", shop.lines)
                self.assert_nothing_is_left(shop)

    def test_a_shop_without_live_does_not_need_its_port(self):
        first = free_ports()
        with socket.create_server(("127.0.0.1", port_of("live", first))):
            shop = self.open("--fresh", "--no-live", first=first)
            self.assert_serves(shop)
        self.assertFalse(shop.has_said("started live"), shop.lines)

    def test_a_second_shop_or_a_service_alone_on_the_same_data_is_refused_in_one_line(self):
        data = self.enterContext(tempfile.TemporaryDirectory())
        self.open("--data", data, kind=SmallShop)
        for module in ("run_all", "users"):
            with (self.subTest(module),
                  process(f"microshop.{module}", "--data", data, "--port", "0") as second):
                self.assertEqual(second.status(), 1)
                self.assertEqual(len(second.lines), 1, second.lines)
                self.assertRegex(second.lines[0], f"^{module}: .* uses the folder {data}; ")

    def test_services_that_run_alone_share_their_data_folder(self):
        data = self.enterContext(tempfile.TemporaryDirectory())
        with (process("microshop.users", "--data", data, "--port", "0") as users,
              process("microshop.products", "--data", data, "--port", "0") as products):
            users.port("Users service")
            products.port("Products service")

    def test_fresh_data_without_a_temporary_folder_are_refused_in_one_line(self):
        without = "from microshop import run_all; run_all.tempfile.tempdir = '/nowhere'; run_all."
        with process("tests.after", f"{without}main()", "--fresh", "--port", "0") as shop:
            self.assertEqual(shop.status(), 1)
        self.assertEqual(shop.lines, ["run_all: cannot make a temporary folder for --fresh: "
                                      "No such file or directory"])

    def test_fresh_data_and_a_data_folder_are_refused_together(self):
        with process("microshop.run_all", "--fresh", "--data", "data", "--port", "0") as shop:
            self.assertEqual(shop.status(), 2)
        self.assertEqual(shop.lines, ["python -m microshop.run_all: --fresh and --data contradict "
                                      "each other; choose one (see --help)"])

    def test_a_shop_that_may_open_too_few_files_says_so_in_one_line(self):
        few = ("import resource; from microshop import run_all;"
               "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); run_all.main()")
        folder = self.enterContext(tempfile.TemporaryDirectory())
        with process("tests.after", few, "--data", folder, "--port", "0") as shop:
            self.assertEqual(shop.status(), 1)
        self.assertEqual(len(shop.lines), 1, shop.lines)
        self.assertRegex(shop.lines[0], "^run_all: .*Too many open files$")

    def test_a_shop_without_room_for_a_thread_at_its_start_says_so_in_one_line(self):
        with process("tests.after", """if True:
                import threading
                from microshop import run_all
                def refuse(thread): raise RuntimeError("can't start new thread")
                threading.Thread.start = refuse
                run_all.main()""", "--fresh", "--port", "0") as shop:
            self.assertEqual(shop.status(), 1)
        self.assertEqual(shop.lines, ["run_all: can't start new thread"])

    def test_a_bad_setting_of_a_child_ends_the_shop(self):
        shop = self.begin("--fresh", MICROSHOP_ORDERS_URL="nowhere")
        self.assertEqual(shop.status(), 2)
        self.assertRegex("\n".join(shop.lines), "(?m)^gateway .*MICROSHOP_ORDERS_URL: 'nowhere'")
        self.assert_nothing_is_left(shop)

    def test_a_bad_setting_is_named_in_one_line(self):
        first = str(65535 - PORTS + 2)  # live would need port 65536
        with (process("microshop.run_all", "--prot", "3000") as flag,
              process("microshop.run_all", "--port", "abc") as value,
              process("microshop", "--port", "abc") as short,
              process("microshop.run_all", MICROSHOP_PORT="abc") as variable,
              process("microshop.run_all", "--data", __file__) as data,
              process("microshop.run_all", "--port", first) as port):
            for shop, named in [
                (flag, "--prot"),
                (value, "--port.*abc"),
                (short, "--port.*abc"),
                (variable, "MICROSHOP_PORT.*abc"),
                (data, f"--data: '{__file__}' is not a folder"),
                (port, f"--port: {first} .*{PORTS - 1} ports"),
            ]:
                with self.subTest(named):
                    self.assertEqual(shop.status(), 2)
                    self.assertEqual(len(shop.lines), 1)
                    self.assertRegex(shop.lines[0], named)


if __name__ == "__main__":
    unittest.main()
