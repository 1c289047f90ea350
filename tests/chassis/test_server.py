"""The life of a process: how it starts, what it does under a supervisor, and how it ends."""
import contextlib
import io
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from types import SimpleNamespace
from unittest import mock

from microshop.chassis import server
from microshop.chassis.server import HEARTBEAT, Heartbeat, Service
from tests.chassis.things import (
    GET, GET_WAIT, ConnectionsTest, Things, stopped_clock)
from tests.helpers import (
    PATIENCE, TOP, Process, Wire, ask, fill, flush, process, running, stop_accepting, wait_until)


class StartTest(unittest.TestCase):
    def test_a_service_that_other_machines_can_write_to_warns_if_it_has_no_token(self):
        for host, token, warnings in (("127.0.0.1", "", 0), ("localhost", "", 0),
                                      ("0.0.0.0", "", 1), ("0.0.0.0", "t", 0)):
            with (self.subTest(host=host, token=token),
                  contextlib.redirect_stderr(io.StringIO()) as log,
                  mock.patch.object(server, "announce") as announce,
                  running(Things, host=host) as things,
                  mock.patch.object(things, "serve_forever"),
                  mock.patch.object(things, "drain"),
                  mock.patch.object(signal, "signal")):
                things.token = token
                things.run()
                flush(things.log)
                warning = f"warning: other machines can reach port {things.server_port}"
                self.assertEqual(log.getvalue().count(warning), warnings, log.getvalue())
                announce.assert_called_once_with(f"Service listening at {things.url}\n")

    def test_a_service_shows_an_address_that_a_browser_can_open(self):
        for name, url in (("127.0.0.1", "http://localhost:3001"),
                          ("0.0.0.0", "http://localhost:3001"),
                          ("::", "http://localhost:3001"),
                          ("192.0.2.7", "http://192.0.2.7:3001"),
                          ("2001:db8::7", "http://[2001:db8::7]:3001")):
            with self.subTest(name):
                service = SimpleNamespace(server_name=name, server_port=3001)
                self.assertEqual(Service.url.fget(service), url)

    def test_a_service_without_room_for_a_thread_at_its_start_says_so_in_one_line(self):
        code = ("import threading\n"
                "from tests.chassis.things import Things\n"
                "def refuse(thread): raise RuntimeError(\"can't start new thread\")\n"
                "threading.Thread.start = refuse\n"
                "Things.main()\n")
        with process("tests.after", code, "--port", "0") as things:
            self.assertEqual(things.status(), 1, things.lines)
        self.assertEqual(things.lines, ["things: can't start new thread"])

    def test_no_name_server_is_asked_about_this_host_or_a_client(self):
        lookup = mock.Mock(side_effect=AssertionError("a name was looked up"))
        with (mock.patch.multiple(socket, getfqdn=lookup, gethostbyaddr=lookup),
              running(Things) as service):
            self.assertEqual(ask(service.server_port, "GET", "/things").status, 200)
        lookup.assert_not_called()


class SignalTest(unittest.TestCase):
    """A service that runs alone and gets signals."""

    def run_users(self, code: str = "") -> Process:
        """Return a running users service; the code runs before it starts."""
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        return self.enterContext(process(
            "tests.after", f"import signal, threading\nfrom microshop.users import Users\n{code}\n"
            "Users.main()", "--port", "0", "--data", self.folder))

    def test_sighup_ends_a_service_as_cleanly_as_sigterm_does(self):
        users = self.run_users()
        users.port("Users service")
        self.assertEqual(users.stop(signal.SIGHUP), 0, "exit status")
        self.assertEqual(os.listdir(self.folder), ["users.db"], "the WAL should be gone")

    def test_a_service_that_was_started_with_nohup_goes_on_after_sighup(self):
        users = self.run_users("""if True:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            class Users(Users):
                def serve_forever(self):
                    signal.raise_signal(signal.SIGHUP)
                    print("stops" if self.is_stopping else "goes on", flush=True)
                    super().serve_forever()""")
        users.wait_for("goes on")
        self.assertEqual(users.stop(), 0, "exit status after SIGTERM")

    def test_a_service_ends_cleanly_although_there_is_no_room_for_another_thread(self):
        users = self.run_users("""if True:
            class Users(Users):
                def serve_forever(self):
                    def refuse(thread): raise RuntimeError("can't start new thread")
                    threading.Thread.start = refuse
                    super().serve_forever()""")
        port = users.port("Users service")
        self.assertEqual(ask(port, target="/users").status, 200, "GET /users needs no new thread")
        self.assertEqual(users.stop(), 0, "exit status after SIGTERM")
        self.assertNotIn("Traceback", "".join(users.lines))


class ClientTest(unittest.TestCase):
    def test_the_connections_of_its_client_are_trimmed_in_silence_and_closed_at_the_end(self):
        with running(Things) as service:
            service.client = mock.Mock()
            wait_until(lambda: service.client.trim.called, "the client to be trimmed")
        service.client.close.assert_called_once_with()


class HeartTest(unittest.TestCase):
    """The heartbeat, with a clock that is moved by hand."""

    def setUp(self):
        self.clock = self.enterContext(stopped_clock(server))
        self.supervisor, ours = socket.socketpair()
        self.enterContext(self.supervisor)
        self.supervisor.setblocking(False)
        self.heartbeat = Heartbeat(ours.detach())
        self.addCleanup(self.heartbeat.close)

    def test_a_heartbeat_is_sent_when_it_is_due_and_not_before(self):
        for seconds, total in ((0, 1), (0, 1), (0.9 * HEARTBEAT, 1), (0.2 * HEARTBEAT, 2),
                               (10 * HEARTBEAT, 3), (0.5 * HEARTBEAT, 3)):
            self.clock.now += seconds
            self.assertTrue(self.heartbeat.beat())
            sent = self.supervisor.recv(100, socket.MSG_PEEK)
            self.assertEqual(sent, b"." * total, f"heartbeats, {seconds:g} s after the last look")

    def test_a_supervisor_that_does_not_read_does_not_block_a_heartbeat(self):
        with self.assertRaises(BlockingIOError):
            while True:
                self.heartbeat._supervisor.send(b"." * 1000)
        self.assertTrue(self.heartbeat.beat(), "a stopped supervisor is not gone")

    def test_a_heart_notices_that_the_supervisor_is_gone(self):
        self.assertTrue(self.heartbeat.beat())
        self.supervisor.close()
        self.assertTrue(self.heartbeat.beat(), "it was not due yet")
        self.clock.now += HEARTBEAT
        self.assertFalse(self.heartbeat.beat())


class SupervisedTest(ConnectionsTest):
    """A service that serves on a listening socket of its supervisor."""

    def setUp(self):
        self.listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        self.port = self.listener.getsockname()[1]
        self.supervisor, self.theirs = socket.socketpair()
        self.enterContext(self.supervisor)
        self.enterContext(self.theirs)
        self.supervisor.settimeout(PATIENCE)

    def handles(self, heart: socket.socket, restarts: int = 0) -> list[int]:
        """Return what the supervisor passes on: the listening socket and one for heartbeats.

        Then it says how many processes had the same role before.
        """
        return [os.dup(self.listener.fileno()), heart.detach(), restarts]

    def test_a_service_knows_how_many_processes_were_there_before_it(self):
        with running(Things, supervised=self.handles(self.theirs, restarts=3)) as supervised:
            self.assertEqual(supervised.restarts, 3)
        with running(Things) as alone:
            self.assertEqual(alone.restarts, 0)

    def test_a_supervised_service_serves_on_the_socket_that_it_was_given(self):
        self.enterContext(running(Things, supervised=self.handles(self.theirs)))
        self.assertEqual(ask(self.port, target="/things").status, 200)

    def test_a_supervised_service_sends_heartbeats_and_stops_when_the_supervisor_is_gone(self):
        self.enterContext(mock.patch.object(server, "HEARTBEAT", 0.01))
        service = self.enterContext(running(Things, supervised=self.handles(self.theirs)))
        with mock.patch.object(service, "shutdown") as shutdown:
            self.assertEqual([self.supervisor.recv(1) for _ in range(3)], [b"."] * 3)
            self.supervisor.close()
            wait_until(lambda: shutdown.called, "the service to stop without a supervisor")

    def test_a_service_that_starts_slowly_sends_heartbeats_meanwhile(self):
        test = self

        class SlowThings(Things):
            def __init__(self, settings):
                super().__init__(settings)
                test.has_sent, _, _ = select.select([test.supervisor], [], [], PATIENCE)

        self.enterContext(mock.patch.object(server, "HEARTBEAT", 0.01))
        self.enterContext(running(SlowThings, supervised=self.handles(self.theirs)))
        self.assertTrue(self.has_sent, "a service that was still starting sent no heartbeat")

    def test_a_service_without_room_for_a_thread_starts_without_such_heartbeats(self):
        start, threads = threading.Thread.start, []

        def refuse_the_first(thread):
            threads.append(thread)
            if len(threads) == 1:
                raise RuntimeError("can't start new thread")
            start(thread)

        with mock.patch.object(threading.Thread, "start", refuse_the_first):
            self.enterContext(running(Things, supervised=self.handles(self.theirs)))
        self.assertEqual(ask(self.port, target="/things").status, 200)

    def test_a_service_knows_while_it_drains_whether_another_process_takes_its_place(self):
        for told, is_replaced in ((b"", False), (b".", True)):
            supervisor, theirs = socket.socketpair()
            with self.subTest(told=told), supervisor:
                service = self.enterContext(running(Things, supervised=self.handles(theirs)))
                supervisor.send(told)
                self.assertFalse(service.is_replaced, "before it drains")
                stop_accepting(service)
                service.drain()
                self.assertEqual(service.is_replaced, is_replaced)

    def test_a_service_goes_on_serving_while_its_supervisor_is_stopped(self):
        self.enterContext(mock.patch.object(server, "HEARTBEAT", 0))
        service = self.enterContext(running(Things, supervised=self.handles(self.theirs)))
        full = mock.Mock(wraps=service.heartbeat._supervisor)
        full.send.side_effect = BlockingIOError
        with mock.patch.object(service.heartbeat, "_supervisor", full):
            wait_until(lambda: full.send.call_count > 3, "more than three heartbeats")
            self.assertEqual(ask(self.port, target="/things").status, 200)

    def test_a_service_that_drains_still_sends_heartbeats(self):
        service = self.enterContext(running(Things, supervised=self.handles(self.theirs)))
        with Wire(self.port) as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertTrue(service.waiting.acquire(timeout=PATIENCE), "GET /wait did not arrive")
            stop_accepting(service)  # so that the accept loop sends no more of them
            with mock.patch.object(service.heartbeat, "beat") as beat:
                draining = threading.Thread(target=service.drain)
                draining.start()
                wait_until(lambda: beat.called, "a heartbeat while it drains")
            service.go_on.set()
            draining.join(PATIENCE)

    def test_the_log_of_a_supervised_service_leaves_its_name_to_the_supervisor(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            with running(Things, supervised=self.handles(self.theirs), quiet=False) as service:
                self.assertEqual(ask(self.port, "GET", "/health").status, 200)
            flush(service.log)
        self.assertRegex(log.getvalue(), r"^\S+Z [0-9a-f]{16} GET /health 200 \d+\.\dms\n$")

    def test_a_process_whose_output_nothing_reads_starts_and_serves_and_ends(self):
        code = ("from microshop.chassis import access_log, server\n"
                "access_log.MAX_WAITING, access_log.CLOSE_TIME = 5, 0.01\n"
                "server.ROOM_TIME = 0.01\n"
                "from tests.chassis.things import Things\n"
                "Things.main()\n")
        reader, output = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, output)
        fill(output)
        handles = [self.listener.fileno(), self.enterContext(self.theirs).fileno()]
        supervised = ",".join(map(str, [*handles, 0]))
        things = self.enterContext(subprocess.Popen(
            [sys.executable, "-m", "tests.after", code, "--supervised", supervised],
            cwd=TOP, pass_fds=handles, stdout=output, stderr=output))
        self.addCleanup(things.kill)
        for _ in range(20):
            self.assertEqual(ask(self.port, target="/things").status, 200)
        things.terminate()
        self.assertEqual(things.wait(PATIENCE), 0, "exit status after SIGTERM")

    def test_a_client_that_comes_between_two_services_on_one_socket_is_served_by_the_second(self):
        with running(Things, supervised=self.handles(self.theirs)) as first:
            stop_accepting(first)
            first.drain()
            with Wire(self.port) as waiting:
                waiting.send(GET)
                second = self.handles(self.supervisor)
                self.enterContext(running(Things, supervised=second))
                answer = self.read(waiting, "GET /things")
                self.assertEqual(answer.status, 200)

    def test_two_services_on_one_socket_do_not_block_each_other(self):
        first, second = self.handles(self.theirs), self.handles(self.supervisor)
        with running(Things, supervised=first), running(Things, supervised=second):
            statuses = [ask(self.port, target="/things").status for _ in range(50)]
        self.assertEqual(statuses, [200] * 50)


class DrainTest(ConnectionsTest):
    """The end of a service: no new clients, and those that are there get their answers."""

    def start_draining(self, service: Things) -> threading.Thread:
        """Stop accepting, and start to drain; return when that waits for connections, or ends."""
        close_idle = self.enterContext(mock.patch.object(
            service.connections, "close_idle", wraps=service.connections.close_idle))
        stop_accepting(service)
        draining = threading.Thread(target=service.drain)
        draining.start()
        # As long as it waits, it looks for idle connections again and again.
        wait_until(lambda: close_idle.call_count > 1 or not draining.is_alive(),
                   "the drain to begin")
        return draining

    def finish(self, draining: threading.Thread) -> None:
        draining.join(PATIENCE)
        self.assertFalse(draining.is_alive(), "it still drains, although all clients have left")

    def test_requests_in_flight_are_finished_and_idle_connections_are_closed(self):
        self.enterContext(mock.patch.object(server, "LAST_LOOK", 0.01))
        service = self.enterContext(running(Things, grace=PATIENCE))
        [idle], busy = self.keep(service, 1), self.hold(service)
        draining = self.start_draining(service)
        if not draining.is_alive():
            self.fail("drain() has returned although GET /wait is in flight, and only a moment of "
                      f"the grace period of {PATIENCE:g} s is over")
        self.assert_closed(idle, "the idle connection")
        service.go_on.set()
        answer = self.read(busy, "GET /wait")
        self.assertEqual(answer.json, "waited")
        self.assertEqual(answer.headers.get("connection"), "close", "Connection of the answer")
        self.assert_closed(busy, "a connection after its Connection: close")
        busy.__exit__()
        self.finish(draining)

    def test_a_client_that_asks_while_a_service_drains_gets_an_answer_and_connection_close(self):
        self.enterContext(mock.patch.object(server, "LAST_LOOK", PATIENCE))
        service = self.enterContext(running(Things, grace=PATIENCE))
        [connection] = self.keep(service, 1)
        draining = self.start_draining(service)
        connection.send(GET)
        answer = self.read(connection, "GET /things on a connection that had just become idle")
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.headers.get("connection"), "close", "Connection of the answer")
        connection.__exit__()
        self.finish(draining)

    def test_clients_that_the_kernel_has_accepted_are_served_before_the_end(self):
        self.enterContext(mock.patch.object(server, "LAST_LOOK", PATIENCE))
        service = self.enterContext(running(Things, grace=PATIENCE))
        stop_accepting(service)  # from here on, nothing accepts
        waiting = [self.connect(service) for _ in range(20)]
        for connection in waiting:
            connection.send(GET)
        draining = self.start_draining(service)
        for connection in waiting:
            with connection:
                answer = self.read(connection, "GET /things of a client in the kernel's queue")
                self.assertEqual(answer.status, 200)
        self.finish(draining)

    def test_a_client_that_has_not_had_its_turn_yet_is_served_before_the_end(self):
        self.enterContext(mock.patch.object(server, "LAST_LOOK", PATIENCE))
        service = self.enterContext(running(Things, grace=PATIENCE))
        with mock.patch.object(service.turns, "when_readable") as wait:
            connection = self.connect(service)
            connection.send(GET)
            wait_until(lambda: wait.called, "the client to be accepted")
            draining = self.start_draining(service)
        self.assertTrue(draining.is_alive(), "it did not wait for a client that has sent a request")
        service.turns.when_readable(*wait.call_args.args)
        self.assertEqual(self.read(connection, "GET /things").status, 200)
        connection.__exit__()
        self.finish(draining)

    def test_a_request_that_takes_long_does_not_hold_up_another_one_before_the_end(self):
        service = self.enterContext(running(Things, grace=PATIENCE))
        slow, quick = self.connect(service), self.connect(service)
        with mock.patch.object(service.turns, "end_overdue"):  # so that /wait keeps the only turn
            slow.send(GET_WAIT)
            self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
            quick.send(GET)
            wait_until(lambda: len(service.connections) == 2, "both clients to be accepted")
            stop_accepting(service)
        draining = self.start_draining(service)
        answer = self.read(quick, "GET /things, while another request takes long,")
        self.assertEqual(answer.status, 200)
        service.go_on.set()
        self.assertEqual(self.read(slow, "GET /wait").status, 200)
        self.finish(draining)

    def test_a_request_that_never_ends_does_not_keep_a_service_from_ending(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            with running(Things, grace=0.01) as service, Wire(service.server_port) as connection:
                self.addCleanup(service.go_on.set)
                connection.send(GET_WAIT)
                self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
            # Here the service has ended, while its request is still unfinished.
        self.assertFalse(service.go_on.is_set())
        self.assertIn("shutting down with 1 request unfinished: the 0.01 s grace period is over",
                      log.getvalue())


if __name__ == "__main__":
    unittest.main()
