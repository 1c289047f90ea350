"""Admitting connections: which are open, which are closed to make room, and which get 503."""
import contextlib
import errno
import io
import os
import select
import socket
import sys
import tempfile
import threading
import time
import unittest
from typing import NamedTuple
from unittest import mock

from microshop.chassis import database, listener, turns, wire
from microshop.chassis.access_log import AT_ONCE
from microshop.chassis.errors import ServiceUnavailable
from microshop.chassis.listener import BodyMemory, Listener, OpenConnections, RejectedConnections
from tests.chassis.things import (
    GET, POST, ConnectionsTest, StoppedClock, StoredThings, Things, ThingsTest, stopped_clock)
from tests.helpers import PATIENCE, Wire, ask, flush, process, running, wait_until


class PairTest(unittest.TestCase):
    """Base of tests with connections that no service accepted."""

    def setUp(self):
        self.clock = self.enterContext(stopped_clock(listener))

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return a client's end of a connection, and the server's."""
        client, served = socket.socketpair()
        for end in (client, served):
            self.enterContext(end)
            end.settimeout(PATIENCE)
        return client, served

    def is_open(self, connection: socket.socket) -> bool:
        """Tell whether the server may still read from a connection; its client has sent nothing."""
        can_read_end, _, _ = select.select([connection], [], [], 0)
        return not can_read_end


class CountingDict(dict):
    """Notes its length after each operation that changes it."""

    def __init__(self, items, counts):
        super().__init__(items)
        self.counts = counts

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.counts.append(len(self))

    def __delitem__(self, key):
        super().__delitem__(key)
        self.counts.append(len(self))

    def pop(self, *arguments):
        try:
            return super().pop(*arguments)
        finally:
            self.counts.append(len(self))


class OpenConnectionsTest(PairTest):
    def setUp(self):
        super().setUp()
        self.connections = OpenConnections()

    def served(self) -> socket.socket:
        """Return the server's end of a new connection."""
        return self.pair()[1]

    def test_a_connection_counts_once_while_it_is_idle_or_busy(self):
        one, other = self.served(), self.served()
        for action, connection, expected in (
                (self.connections.note_idle, one, (1, 0)),
                (self.connections.note_busy, one, (1, 1)),
                (self.connections.note_busy, one, (1, 1)),
                (self.connections.note_busy, other, (2, 2)),
                (self.connections.note_idle, one, (2, 1)),
                (self.connections.note_idle, one, (2, 1)),
                (self.connections.forget, one, (1, 1)),
                (self.connections.forget, other, (0, 0)),
                (self.connections.forget, other, (0, 0))):
            action(connection)
            counted = len(self.connections), self.connections.count_busy()
            self.assertEqual(counted, expected, f"(open, busy) after {action.__name__}()")

    def test_a_connection_that_turns_busy_is_counted_at_every_moment(self):
        connection, counts = self.served(), []
        for change in (self.connections.note_idle, self.connections.note_busy) * 2:
            change(connection)
            with mock.patch.object(self.connections, "_idle_since",
                                   CountingDict(self.connections._idle_since, counts)):
                change(connection)
        self.assertEqual(set(counts), {1}, "a drain that counted 0 would end during a request")

    def test_the_connection_that_has_been_idle_for_longest_is_closed_first(self):
        first, second, third = [self.served() for _ in range(3)]
        for connection in (first, second, third, first):  # first was busy in the meantime
            self.clock.now += 1
            self.connections.note_idle(connection)
        for closed, still_open in ((second, [third, first]), (third, [first]), (first, [])):
            self.assertTrue(self.connections.close_oldest())
            self.assertFalse(self.is_open(closed), "the oldest idle connection is still open")
            self.assertEqual([self.is_open(each) for each in still_open], [True] * len(still_open),
                             "a connection was closed that had been idle for less time")
            self.assertEqual(len(self.connections), len(still_open))
        self.assertFalse(self.connections.close_oldest(), "there was none left to close")

    def test_a_new_connection_is_not_closed_to_make_room_before_its_request_is_late(self):
        new = self.served()
        self.connections.note_new(new)
        self.clock.now += listener.ARRIVAL_TIME * 0.9
        self.assertFalse(self.connections.close_oldest(), "there was only a new connection")
        self.connections.close_idle(0)
        self.assertTrue(self.is_open(new), f"closed before {listener.ARRIVAL_TIME} s had passed: "
                        "its client would get no answer, not even 503")
        self.clock.now += listener.ARRIVAL_TIME * 0.2
        self.assertTrue(self.connections.close_oldest(), "the request on the connection is late")
        self.assertFalse(self.is_open(new), "it has sent nothing, and must make room")

    def test_only_so_many_connections_are_being_closed_to_make_room(self):
        served = [self.served() for _ in range(listener.MAX_CLOSING + 1)]
        for connection in served:
            self.connections.note_idle(connection)
        closed = [self.connections.close_oldest() for _ in served]
        self.assertEqual(closed, [True] * listener.MAX_CLOSING + [False])
        self.connections.forget(served[0])
        self.assertTrue(self.connections.close_oldest(), "there is room to close another")

    def test_a_busy_connection_is_never_closed_to_make_room(self):
        busy = self.served()
        self.connections.note_idle(busy)
        self.connections.note_busy(busy)
        self.clock.now += 1000
        self.assertFalse(self.connections.close_oldest(), "there was no idle connection to close")
        self.connections.close_idle(0)
        self.assertTrue(self.is_open(busy), "a connection was closed during a request")
        self.assertEqual(len(self.connections), 1)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere shutdown() discards what came before")
    def test_a_request_that_came_before_its_connection_was_closed_can_be_read(self):
        client, served = self.pair()
        self.connections.note_idle(served)
        client.sendall(GET)
        self.connections.close_oldest()
        self.assertEqual(served.recv(1000), GET)
        self.assertEqual(served.recv(1000), b"", "after the request, the input should end")

    def test_an_answer_can_be_sent_on_a_connection_that_was_closed_to_make_room(self):
        client, served = self.pair()
        self.connections.note_idle(served)
        self.connections.close_oldest()
        served.sendall(b"answer")
        self.assertEqual(client.recv(1000), b"answer")

    def test_a_connection_that_has_ended_by_itself_can_be_closed_to_make_room(self):
        served = self.served()
        self.connections.note_idle(served)
        served.close()
        self.assertTrue(self.connections.close_oldest())
        self.assertEqual(len(self.connections), 0)

    def test_a_client_may_leave_while_its_connection_is_closed_to_make_room(self):
        served = self.served()
        self.connections.note_idle(served)
        leaving = threading.Thread(target=self.connections.forget, args=[served])

        def look(moment, find=self.connections._idle_at):
            found = find(moment)
            leaving.start()
            leaving.join(0.05)  # it does not wait, unless there is a lock
            return found

        with mock.patch.object(self.connections, "_idle_at", look):
            self.assertTrue(self.connections.close_oldest())
        leaving.join(PATIENCE)
        self.assertEqual((len(self.connections), self.connections.has_closed(served)), (0, False))

    def test_only_connections_that_have_been_idle_for_long_enough_are_closed(self):
        idle_for_three, idle_for_two, idle_for_one = [self.served() for _ in range(3)]
        for connection in (idle_for_three, idle_for_two, idle_for_one):
            self.connections.note_idle(connection)
            self.clock.now += 1
        self.connections.close_idle(1.5)
        self.assertEqual([self.is_open(idle_for_three), self.is_open(idle_for_two)],
                         [False, False], "these were idle for more than 1.5 s")
        self.assertTrue(self.is_open(idle_for_one), "this was idle for less than 1.5 s")
        self.assertEqual(len(self.connections), 3, "they count until their threads forget them")


class BodyMemoryTest(ConnectionsTest):
    def test_what_was_taken_is_not_free_until_it_is_released(self):
        memory = BodyMemory(100)
        memory.take(60)
        self.assertRaises(ServiceUnavailable, memory.take, 41)
        memory.take(40)
        memory.release(60)
        memory.take(60)

    def test_a_body_for_which_there_is_no_memory_gets_503_until_others_are_answered(self):
        service = self.enterContext(running(Things))
        service.body_memory = BodyMemory(100)
        begun = [self.connect(service) for _ in range(2)]
        for connection, pad in zip(begun, (b"x" * 59, b"y" * 39), strict=True):
            connection.send(POST + b'Content-Length: 100\r\n\r\n"' + pad)
        wait_until(lambda: service.body_memory._free == 0, "100 bytes of two bodies to arrive")
        for framing in (b"Content-Length: 1\r\n\r\n1",
                        b"Transfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n"):
            newcomer = self.connect(service)
            newcomer.send(POST + framing)
            answer = self.read(newcomer, "POST without memory for its body")
            self.assertEqual((answer.status, answer.headers.get("retry-after")), (503, "1"))
        self.get_things(self.connect(service), "a client that sends no body")
        begun[0].end()
        self.assertEqual(self.read(begun[0], "POST, of which the end is missing").status, 400)
        self.assertEqual(service.body_memory._free, 60, "bytes that are free without it")
        begun[1].send(b"y" * 59 + b'"')
        self.assertEqual(self.read(begun[1], "POST, all of it").status, 201)
        self.assertEqual(service.body_memory._free, 100, "bytes that are free in the end")


class Echo(NamedTuple):
    """Stands for a handler: its answer is what has arrived of the request."""

    connection: socket.socket

    def answer_unread(self, beginning: bytes) -> bytes:
        return b"answer to " + (beginning or b"nothing")


class RejectedConnectionsTest(PairTest):
    def setUp(self):
        super().setUp()
        self.rejected = RejectedConnections()
        self.addCleanup(self.rejected.close)

    def add(self) -> socket.socket:
        """Reject a connection; return its client's end."""
        client, served = self.pair()
        served.settimeout(None)  # as it is in a service
        self.rejected.add(Echo(served))
        return client

    def test_a_connection_is_answered_when_its_request_arrives(self):
        client = self.add()
        self.rejected.answer_due()
        self.assertTrue(self.is_open(client), "it was answered before it had sent anything")
        client.send(b"GET / HTTP/1.1\r\n")
        self.rejected.answer_due()
        self.assertEqual(client.recv(1000), b"answer to GET / HTTP/1.1\r\n")

    def test_a_request_that_has_arrived_already_is_answered_at_once(self):
        for request in (b"GET / HTTP/1.1\r\n", b"GET /" + b"x" * listener.PEEK_SIZE):
            client, served = self.pair()
            client.send(request)
            self.rejected.add(Echo(served))
            self.assertFalse(self.is_open(client), f"no answer yet to {request!r}")
            self.assertEqual(client.recv(1000), b"answer to " + request[:listener.PEEK_SIZE])

    def test_a_first_line_may_arrive_in_parts(self):
        client, sent = self.add(), b""
        for part in (b"\r\n", b"G", b"ET", b" / HTTP/1.1\r"):
            client.send(part)
            self.rejected.answer_due()
            sent += part
            self.assertTrue(self.is_open(client), f"it was answered after only {sent!r}")
        client.send(b"\n")
        self.rejected.answer_due()
        self.assertEqual(client.recv(1000), b"answer to GET / HTTP/1.1\r\n")

    def test_a_first_line_that_does_not_end_is_answered_after_arrival_time(self):
        client = self.add()
        client.send(b"HEAD /")
        self.clock.now += listener.ARRIVAL_TIME * 1.1
        self.rejected.answer_due()
        self.assertFalse(self.is_open(client), "it has waited for longer than ARRIVAL_TIME")
        self.assertEqual(client.recv(1000), b"answer to HEAD /")

    def test_a_connection_that_sends_nothing_is_answered_after_arrival_time(self):
        client = self.add()
        self.clock.now += listener.ARRIVAL_TIME * 1.1
        self.rejected.answer_due()
        self.assertFalse(self.is_open(client), "it has waited for longer than ARRIVAL_TIME")
        self.assertEqual(client.recv(1000), b"answer to nothing")

    def test_the_oldest_of_too_many_that_send_nothing_is_answered_early(self):
        with mock.patch.object(listener, "MAX_REJECTED", 2):
            clients = [self.add() for _ in range(4)]
        self.assertEqual([self.is_open(client) for client in clients], [False, False, True, True],
                         "which of four still wait for an answer, if at most two may wait")

    def test_closing_closes_those_that_wait_as_well(self):
        client = self.add()
        self.rejected.close()
        self.assertEqual((client.recv(1000), len(self.rejected)), (b"", 0))

    def test_a_rejected_client_gets_its_answer_and_then_the_end_of_input(self):
        client, served = self.pair()
        self.rejected.answer(served, b"503")
        self.assertEqual([client.recv(1000), client.recv(1000)], [b"503", b""])

    def test_a_rejected_connection_is_closed_when_its_client_had_time_to_read(self):
        _, served = self.pair()
        self.rejected.answer(served, b"503")
        self.clock.now += wire.LINGER * 0.9
        self.rejected.close_due()
        self.assertNotEqual(served.fileno(), -1, f"closed before {wire.LINGER} s had passed")
        self.clock.now += wire.LINGER * 0.2
        self.rejected.close_due()
        self.assertEqual(served.fileno(), -1, f"still open after {wire.LINGER} s")
        self.assertEqual(len(self.rejected), 0)

    def test_the_oldest_rejected_connections_are_closed_early_if_there_are_too_many(self):
        served = [self.pair()[1] for _ in range(5)]
        for connection in served:
            self.rejected.answer(connection, b"503")
        with mock.patch.object(listener, "MAX_REJECTED", 2):
            self.rejected.close_due()
        self.assertEqual([connection.fileno() == -1 for connection in served],
                         [True, True, True, False, False], "which of the five are closed")

    def test_a_client_that_is_gone_can_be_rejected(self):
        client, served = self.pair()
        client.close()
        self.rejected.answer(served, b"503")
        self.rejected.close()
        self.assertEqual((served.fileno(), len(self.rejected)), (-1, 0))


class FullServiceTest(ConnectionsTest):
    """A service with as many connections as it may have."""

    def test_the_connection_that_has_been_idle_for_longest_is_closed_to_make_room(self):
        service = self.enterContext(running(Things, max_connections=3))
        busy, (first, second) = self.hold(service), self.keep(service, 2)
        # A client may have its answer before the server has noted that its connection is idle.
        wait_until(lambda: service.connections.count_busy() == 1, "two connections to be idle")
        self.get_things(first, "the first client")  # now the second has been idle for longer
        wait_until(lambda: service.connections.count_busy() == 1, "the first to be idle again")
        self.get_things(self.connect(service), "a newcomer")
        self.assert_closed(second, "the connection that was idle for longest")
        self.get_things(first, "the first client, whose connection should not be closed")
        service.go_on.set()
        self.assertEqual(self.read(busy, "GET /wait").status, 200)

    def test_a_request_that_begins_while_its_idle_connection_is_closed_gets_no_false_400(self):
        service = self.enterContext(running(Things, max_connections=1))
        [client] = self.keep(service, 1)
        wait_until(lambda: not service.connections.count_busy(), "the connection to be idle")
        note_busy = service.connections.note_busy

        def lose_the_race(connection):
            self.assertTrue(service.connections.close_oldest(), "the connection was not idle")
            note_busy(connection)

        with mock.patch.object(service.connections, "note_busy", lose_the_race):
            client.send(POST + b"Content-Length: 5\r\n\r\n1")
            self.assert_closed(client, "POST /things, whose input the service itself has ended")
        wait_until(lambda: not len(service.connections), "the connection to be forgotten")

    def send_more(self, rejected: Wire) -> None:
        """Send requests as a client does that has not read its answer yet: nothing may break."""
        try:
            for _ in range(3):
                rejected.socket.sendall(GET)
        except ConnectionError as error:
            self.fail(f"a connection was reset before its client had read the 503: {error}")

    def test_without_an_idle_connection_a_newcomer_gets_503_at_once_and_no_thread(self):
        service = self.enterContext(running(Things, max_connections=2))
        busy = [self.hold(service) for _ in range(2)]
        wait_until(lambda: not service.turns.was_used(), "both requests to lose their turns")
        threads = set(threading.enumerate())
        with mock.patch.object(wire, "LINGER", 10 * PATIENCE):
            newcomers = [self.connect(service) for _ in range(5)]
            for newcomer in newcomers:
                newcomer.send(GET)  # is not read, but must not reset the connection either
                answer = self.read(newcomer, "GET /things of a newcomer")
                headers = [answer.headers.get(name) for name in ("retry-after", "connection")]
                self.assertEqual((answer.status, headers), (503, ["1", "close"]),
                                 "status, Retry-After and Connection of the answer to a newcomer, "
                                 "while there are as many busy connections as there may be, 2")
                self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
                self.assert_closed(newcomer, "a rejected connection")
                self.send_more(newcomer)
            started = set(threading.enumerate()) - threads
            self.assertEqual(started, set(), "a rejected client must not cost a thread")
        with mock.patch.object(wire, "LINGER", 0):
            wait_until(lambda: not service.rejected, "the rejected connections to be closed")
        service.go_on.set()
        answers = [self.read(connection, "GET /wait") for connection in busy]
        self.assertEqual([answer.status for answer in answers], [200, 200])
        wait_until(lambda: not service.connections.count_busy(), "both connections to be idle")
        self.keep(service, 2)  # idle connections make room for them

    def test_a_service_without_room_says_that_it_is_alive_and_nothing_else(self):
        service = self.enterContext(running(Things, max_connections=2))
        self.hold(service)
        self.connect(service).send(POST + b"Content-Length: 9\r\n\r\n1")
        wait_until(lambda: service.connections.count_busy() == 2, "both connections to be busy")
        for request, status in (
                ("GET /health/live", 200), ("HEAD /health/live", 200), ("GET /health/live/", 200),
                ("GET /health/live?verbose", 200), ("GET /health", 503), ("GET /things", 503),
                ("GET /health/lively", 503), ("POST /health/live", 503), ("HEAD /things", 503)):
            with self.subTest(request):
                method, target = request.split()
                answer = ask(service.server_port, method, target)
                self.assertEqual((answer.status, answer.headers["connection"]), (status, "close"),
                                 f"{request}, while as many connections are busy as may be, 2")
                if status == 200 and method == "GET":
                    self.assertEqual(answer.body, b'{"status":"ok","service":"things"}')
        noted = [(span.method, span.route, span.status) for span in service.telemetry.spans()]
        self.assertEqual([noted[0], noted[4]],
                         [("GET", "/health/live", 200), ("-", "", 503)], "what is recorded")

    def test_a_service_without_room_gives_only_a_valid_liveness_check_200(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        for line, status in (
                (b"GET /health/live HTTP/1.0", 200), (b"\r\nHEAD /health/live/ HTTP/1.1", 200),
                (b"GET /health/live/?a=b&c HTTP/1.1", 200), (b"GET /health/live garbage", 503),
                (b"GET /health/live HTTP/1.1 garbage", 503), (b"GET /health/live HTTP/1.9", 503),
                (b"GET /health/live? a HTTP/1.1", 503), (b"GET /health/live?\0 HTTP/1.1", 503),
                (b"GET  /health/live HTTP/1.1", 503), (b"get /health/live HTTP/1.1", 503),
                (b"GET /health/live", 503), (b"GET /health/live HTTP/1.1\n", 503)):
            with self.subTest(line):
                monitor = self.connect(service)
                monitor.send(line + b"\r\nHost: shop\r\n\r\n")
                answer = self.read(monitor, repr(line))
                self.assertEqual(answer.status, status, f"status of the answer to {line!r}, while "
                                 "as many connections are busy as may be, 1")

    def test_an_answer_to_a_rejected_head_request_has_no_body(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        client = self.connect(service)
        client.send(b"HEAD /things HTTP/1.1\r\nHost: shop\r\n\r\n")
        self.assertEqual(client.read("HEAD").status, 503)
        self.assertEqual(client.file.read(), b"", "the bytes after the head of this 503: a client "
                         "would take them for its next answer")

    def test_the_client_that_got_the_last_place_keeps_it_while_its_request_is_on_its_way(self):
        service = self.enterContext(running(Things, max_connections=2))
        self.hold(service)
        with mock.patch.object(listener, "ARRIVAL_TIME", PATIENCE):
            first, second = self.connect(service), self.connect(service)
            second.send(GET)
            statuses = [self.read(second, "GET /things of the second newcomer").status]
            first.send(GET)
            statuses.append(self.read(first, "GET /things of the first newcomer").status)
        self.assertEqual(statuses, [503, 200], "GET /things of the second newcomer, then of the "
                         "first, which had connected before, and got the last of two places")

    def test_a_service_looks_often_for_the_requests_of_those_it_rejects(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        wait_until(lambda: not service.turns.was_used(), "the request to lose its turn")
        with (mock.patch.object(listener, "ARRIVAL_TIME", PATIENCE),
              mock.patch.object(listener, "select", mock.Mock(wraps=select)) as module):
            client = self.connect(service)
            wait_until(lambda: service.rejected, "the connection to be accepted")
            module.reset_mock()
            wait_until(lambda: module.select.call_count > 2, "rounds of the accept loop")
            pauses = {call.args[3] for call in module.select.call_args_list}
            client.send(GET)
            self.assertEqual(self.read(client, "GET /things").status, 503)
        self.assertEqual(pauses, {turns.TURN_TIME}, "seconds between two looks for the request "
                         "of a client that is to get 503 at once")

    def test_a_liveness_check_may_arrive_later_than_its_connection(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        with mock.patch.object(listener, "ARRIVAL_TIME", PATIENCE):
            monitor = self.connect(service)
            wait_until(lambda: service.rejected, "the connection to be accepted")
            monitor.send(b"GET /health/live HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(self.read(monitor, "GET /health/live").status, 200)

    def test_rejected_connections_hold_a_limited_number_of_descriptors(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        with (mock.patch.object(listener, "MAX_REJECTED", 5),
              mock.patch.object(wire, "LINGER", 10 * PATIENCE)):
            for _ in range(20):
                self.read(self.connect(service), "a newcomer")
            wait_until(lambda: len(service.rejected) <= 5,
                       "no more than MAX_REJECTED connections to be open of 20 rejected")

    def test_a_connection_that_only_waits_to_close_can_be_closed_to_make_room(self):
        service = self.enterContext(running(Things, max_connections=1))
        with mock.patch.object(wire, "LINGER", 10 * PATIENCE):
            lingering = self.connect(service)
            lingering.send(b"nonsense\r\n\r\n")
            self.assertEqual(self.read(lingering, "nonsense").status, 400)
            wait_until(lambda: not service.connections.count_busy(),
                       "the connection to count as idle once its last request was answered")
            self.keep(service, 1)
            served = service.handlers[0].connection
            wait_until(lambda: served.fileno() == -1,
                       "the connection that made room to be closed before LINGER is over")

    def test_connections_cost_no_thread_while_they_are_idle(self):
        service = self.enterContext(running(Things))
        few = threading.active_count() + turns.MAX_SPARE  # started if a request takes long here
        self.keep(service, 100)
        wait_until(lambda: threading.active_count() <= few, "idle connections to have no threads")


class AcceptedClientsTest(ThingsTest):
    def test_two_hundred_clients_that_come_at_once_are_all_served(self):
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(Wire(self.port)) for _ in range(200)]
            for connection in connections:
                connection.send(GET)
            statuses = [self.read(connection, "GET /things").status for connection in connections]
        self.assertEqual(statuses, [200] * 200)
        self.assertGreaterEqual(Listener.request_queue_size, 1024)

    def test_a_client_that_is_gone_before_it_is_served_leaves_no_traceback(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for fault, is_logged in ((OSError, False), (RuntimeError, True)):
                with (self.subTest(fault), mock.patch.object(wire, "Stream", side_effect=fault),
                      Wire(self.port) as connection):
                    self.assert_closed(connection, "a connection whose handler failed")
                    flush(self.service.log)
                    self.assertEqual("Traceback" in log.getvalue(), is_logged, log.getvalue())

    def test_a_client_that_resets_its_connection_leaves_no_traceback(self):
        service = self.enterContext(running(Things))
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for data in (b"", GET[:10], GET * 50, POST + b"Content-Length: 9\r\n\r\n",
                         POST + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"):
                with Wire(service.server_port) as connection:
                    connection.send(data)
                    reset_on_close = b"\1\0\0\0\0\0\0\0"  # struct linger: on, for 0 seconds
                    connection.socket.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            answer = ask(service.server_port, "GET", "/things")
            wait_until(lambda: not service.connections, "all connections to end")
            flush(service.log)
        self.assertEqual(answer.status, 200, "GET /things after the resets")
        self.assertNotIn("Traceback", log.getvalue())

    def test_connections_of_slow_clients_leave_few_threads_and_no_descriptor_behind(self):
        service = self.enterContext(running(StoredThings))
        few = threading.active_count() + turns.MAX_SPARE
        descriptors = len(os.listdir("/dev/fd"))
        request = GET.replace(b"things", b"things/7")
        parts = (request[:9], request[9:], request + request[:20], request[20:] + request[:5])
        for _ in range(3):
            connections = [Wire(service.server_port) for _ in range(100)]
            for part in parts:
                for connection in connections:
                    connection.send(part)
            for connection in connections:
                with connection:
                    answers = [self.read(connection, "GET /things/7") for _ in range(3)]
                    self.assertEqual([answer.status for answer in answers], [200, 200, 200])
            wait_until(lambda: threading.active_count() <= few, "all but spare threads to end")
            wait_until(lambda: not service.connections, "the connections to be forgotten")
        now = len(os.listdir("/dev/fd"))
        self.assertLessEqual(now, descriptors + 2 * database.CONNECTIONS,
                             f"{descriptors} descriptors were open before 300 clients came")


class FullKernel(StoppedClock):
    """A listening socket for which the system has no descriptor, and the clock of its accept loop.

    `events` has each "accept" that failed, and the seconds of each pause.
    """

    def __init__(self, listening: socket.socket):
        super().__init__()
        self.listening = listening
        self.is_full = True
        self.events: list[str | float] = []

    def fileno(self) -> int:
        return self.listening.fileno()

    def gettimeout(self) -> float:
        return 0.0

    def close(self) -> None:
        self.listening.close()

    def accept(self):
        if not self.is_full:
            return self.listening.accept()
        self.events.append("accept")
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def sleep(self, seconds: float) -> None:
        self.events.append(seconds)
        time.sleep(0.001)  # so that the loop leaves the processor to the test


class NoDescriptorsTest(ConnectionsTest):
    """A service that cannot accept, because the system has no descriptor for another connection."""

    def fill(self, service: Things) -> FullKernel:
        kernel = FullKernel(service.socket)
        self.enterContext(mock.patch.object(listener, "time", kernel))
        service.socket = kernel
        return kernel

    def test_an_accept_loop_without_descriptors_pauses_and_goes_on_when_there_are_some(self):
        log = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        service = self.enterContext(running(Things))
        kernel = self.fill(service)
        waiting = self.connect(service)
        wait_until(lambda: len(kernel.events) >= 4 * AT_ONCE, "many attempts to accept")
        kernel.is_full = False
        self.get_things(waiting, "a client that waited for a descriptor")
        flush(service.log)
        failures, pauses = kernel.events[0::2], kernel.events[1::2]
        self.assertEqual((set(failures), set(pauses)), ({"accept"}, {listener.NO_ROOM_PAUSE}),
                         "each accept that fails should be followed by a pause")
        line = "no room for another connection: Too many open files"
        self.assertEqual(log.getvalue().count(line), AT_ONCE,
                         f"lines of the log about {len(failures)} failures in one minute")

    def test_an_idle_connection_gives_its_descriptor_to_a_newcomer(self):
        service = self.enterContext(running(Things))
        [idle] = self.keep(service, 1)
        wait_until(lambda: not service.connections.count_busy(), "the connection to be idle")
        kernel = self.fill(service)
        waiting = self.connect(service)
        self.assert_closed(idle, "the idle connection")
        kernel.is_full = False
        self.get_things(waiting, "a client that waited for a descriptor")
        self.assertEqual(kernel.events[:2], ["accept", listener.NO_ROOM_PAUSE / 10],
                         "the pause is short if a connection was closed")


class LimitedProcessTest(ConnectionsTest):
    """A process with a limit on its descriptors."""

    @contextlib.contextmanager
    def running_users(self, soft: int, hard: int):
        """Yield a users service and its port; it starts with these limits of its descriptors."""
        limited = ("import resource\n"
                   f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
                   "from microshop.users import Users\n"
                   "Users.main()\n")
        with (tempfile.TemporaryDirectory() as folder,
              process("tests.after", limited, "--port", "0", "--data", folder) as users):
            yield users, users.port("Users service")

    def test_a_process_that_ran_out_of_descriptors_serves_again_when_clients_have_left(self):
        with self.running_users(60, 60) as (users, port):
            with contextlib.ExitStack() as stack:
                busy = [stack.enter_context(Wire(port)) for _ in range(60)]
                for connection in busy:
                    connection.send(GET[:20])  # a request that has begun: it may not be closed
                users.wait_for("no room for another connection: Too many open files")
            self.assertEqual(ask(port, target="/users").status, 200, "GET /users afterwards")
            with contextlib.ExitStack() as stack:
                idle = [stack.enter_context(Wire(port)) for _ in range(60)]
                newcomer = stack.enter_context(Wire(port))
                newcomer.send(b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n")  # needs no file
                answer = self.read(newcomer, "GET /health, while 60 clients are idle,")
                self.assertEqual(answer.status, 200)
                self.assert_closed(idle[0], "the connection that was idle for longest")
            self.assertEqual(users.stop(), 0, "exit status after SIGTERM")
        lines = [line for line in users.lines if "no room" in line]
        self.assertLessEqual(len(lines), AT_ONCE + 1, "the last line may sum up further ones")

    def test_a_process_raises_its_soft_limit_of_descriptors_to_the_hard_limit(self):
        with self.running_users(60, 200) as (users, port):
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(Wire(port)) for _ in range(100)]
                for connection in reversed(connections):
                    connection.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
                    answer = self.read(connection, "GET /users on one of 100 connections")
                    self.assertEqual(answer.status, 200)
            self.assertEqual([line for line in users.lines if "no room" in line], [])


if __name__ == "__main__":
    unittest.main()
