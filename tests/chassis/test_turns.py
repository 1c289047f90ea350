"""Turns: who comes first is served first, and a request that waits holds up nobody."""
import os
import socket
import threading
import unittest
from collections.abc import Callable
from unittest import mock

from microshop.chassis import turns as module
from microshop.chassis import wire
from microshop.chassis.turns import MAX_SPARE, Turns
from microshop.gateway import Gateway
from microshop.products import Products
from tests.chassis.things import (
    GET, GET_WAIT, POST, ConnectionsTest, StoredThings, Things, stopped_clock)
from tests.helpers import PATIENCE, ask, running, upstream, wait_until


class TurnsTest(unittest.TestCase):
    """Turns whose end a test decides: nothing but the test calls end_overdue()."""

    def setUp(self):
        self.clock = self.enterContext(stopped_clock(module))
        self.done: list[str] = []

    def make(self, count: int) -> Turns:
        """Return turns that are closed after the test."""
        turns = Turns(count)
        self.addCleanup(turns.close)
        return turns

    def arrive(self, turns: Turns, action: Callable[[], None]) -> None:
        """Let something arrive on a new descriptor, for which an action waits."""
        ours, theirs = socket.socketpair()
        self.enterContext(ours)
        self.enterContext(theirs)
        turns.when_readable(ours.fileno(), action)
        theirs.send(b"x")

    def note(self, turns: Turns, name: str) -> None:
        """Let something arrive that is done at once, and noted in `done`."""
        self.arrive(turns, lambda: self.done.append(name))

    def hang(self, turns: Turns, before: Callable[[], None] = lambda: None) -> threading.Event:
        """Let something arrive that calls `before`, and then takes until the event is set."""
        has_begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def action() -> None:
            before()
            has_begun.set()
            go_on.wait(PATIENCE)
            self.done.append("what hung")

        self.arrive(turns, action)
        self.assertTrue(has_begun.wait(PATIENCE), "a turn was free, but nobody took it")
        return go_on

    def assert_done(self, *names: str) -> None:
        """Wait until as many actions as names are done, and compare them."""
        wait_until(lambda: len(self.done) >= len(names), f"{names} to be done; done: {self.done}")
        self.assertEqual(self.done, list(names))

    def test_who_comes_first_is_served_first(self):
        turns = self.make(1)
        go_on = self.hang(turns)
        names = [str(number) for number in range(100)]
        for name in names:
            self.note(turns, name)
        go_on.set()
        self.assert_done("what hung", *names)

    def test_no_more_actions_run_at_a_time_than_there_are_turns(self):
        turns = self.make(2)
        first, second = self.hang(turns), self.hang(turns)
        self.note(turns, "third")
        self.clock.now += module.TURN_TIME  # no longer than that
        turns.end_overdue()
        self.assertEqual(self.done, [], "a third action began while both turns were in use")
        first.set()
        self.assert_done("what hung", "third")
        second.set()

    def test_a_turn_that_lasts_too_long_goes_to_another_thread(self):
        turns = self.make(1)
        go_on = self.hang(turns)
        self.note(turns, "next")
        self.clock.now += module.TURN_TIME * 1.1
        turns.end_overdue()
        self.assert_done("next")
        wait_until(lambda: not turns.was_used(), "what hangs to have no turn any more")
        go_on.set()
        self.assert_done("next", "what hung")

    def test_a_turn_that_was_used_and_is_free_again_is_told_once(self):
        turns = self.make(1)
        self.note(turns, "quick")
        self.assert_done("quick")
        wait_until(lambda: not turns._busy, "the turn to be free again")
        self.assertTrue(turns.was_used(), "else the accept loop looks for long actions too rarely")
        self.assertFalse(turns.was_used(), "it was not used since the last call")

    def test_a_thread_that_is_about_to_wait_can_give_up_its_turn(self):
        turns = self.make(1)
        self.hang(turns, before=turns.give_up)
        self.note(turns, "next")
        self.assert_done("next")

    def test_a_turn_is_given_up_only_once(self):
        turns = self.make(1)

        def give_up_twice() -> None:
            turns.give_up()
            turns.give_up()

        self.hang(turns, before=give_up_twice)
        self.clock.now += module.TURN_TIME * 1.1
        turns.end_overdue()
        self.hang(turns)
        self.note(turns, "next")
        self.assertEqual(self.done, [], "there were two turns where there should be one")
        self.assertEqual(len(turns._spare), 0, "a thread was started in vain")

    def test_a_thread_that_was_found_for_a_turn_that_has_just_ended_waits_for_another(self):
        turns = self.make(1)
        go_on, find = self.hang(turns), turns._find_spare

        def find_too_late() -> threading.Lock:
            go_on.set()
            wait_until(lambda: not turns._busy, "the action to end meanwhile")
            return find()

        self.clock.now += module.TURN_TIME * 1.1
        with mock.patch.object(turns, "_find_spare", find_too_late):
            turns.end_overdue()
        self.hang(turns)
        self.note(turns, "next")
        self.assertEqual(self.done, ["what hung"], "there were two turns where there should be one")
        self.assertEqual(len(turns._spare), 1, "the thread that was started in vain is lost")

    def test_a_thread_without_a_turn_takes_nothing_more_until_it_has_one_again(self):
        turns = self.make(1)
        first = self.hang(turns, before=turns.give_up)
        second = self.hang(turns)  # has the only turn
        first.set()
        self.assert_done("what hung")
        self.note(turns, "next")
        wait_until(lambda: turns._spare, "the first thread to wait for a turn")
        self.assertEqual(self.done, ["what hung"], "a thread without a turn took an action")
        second.set()
        self.assert_done("what hung", "what hung", "next")

    def test_where_no_thread_can_be_started_a_turn_is_kept_until_it_ends(self):
        turns = self.make(1)
        refuse = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError)
        with refuse as start:
            go_on = self.hang(turns, before=turns.give_up)
            self.note(turns, "next")
            self.assertTrue(start.called)
            go_on.set()
            self.assert_done("what hung", "next")

    def test_after_many_waits_only_some_threads_are_kept(self):
        before = threading.active_count()
        turns = self.make(1)
        waits = [self.hang(turns, before=turns.give_up) for _ in range(3 * MAX_SPARE)]
        for go_on in waits:
            go_on.set()
        wait_until(lambda: threading.active_count() - before <= 1 + MAX_SPARE,
                   f"all threads to end but {MAX_SPARE} spare ones and that with the turn")
        self.note(turns, "next")
        self.assert_done(*["what hung"] * len(waits), "next")

    def test_an_action_that_fails_costs_no_turn(self):
        turns = self.make(1)
        self.arrive(turns, mock.Mock(side_effect=MemoryError))
        self.note(turns, "next")
        self.assert_done("next")

    def test_closing_ends_every_thread_and_leaves_no_descriptor(self):
        threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
        turns = self.make(3)
        for event in [self.hang(turns, before=turns.give_up) for _ in range(2)]:
            event.set()
        wait_until(lambda: len(turns._spare) == 2, "two threads to wait for a turn")
        go_on = self.hang(turns)
        lost = self.hang(turns, before=turns.give_up)
        for event in (lost, go_on):
            turns.close()  # the second time, it does nothing
            event.set()
        wait_until(lambda: threading.active_count() <= threads, "all threads to end")
        pairs = 4 * 2  # of sockets, which are closed after the test
        self.assertLessEqual(len(os.listdir("/dev/fd")), descriptors + pairs)

    def test_closing_uses_no_queue_that_the_last_thread_may_have_closed_already(self):
        turns = self.make(1)
        go_on = self.hang(turns)  # the only thread: once it sees that all is closed, it ends
        wake, was_closed = turns._wake_next, []

        def note_and_wake():
            was_closed.append(turns._is_closed)
            wake()

        turns._wake_next = note_and_wake
        turns.close()
        go_on.set()
        self.assertEqual(was_closed[:1], [False], "the threads must be woken before they may end")


class WaitingRequestTest(ConnectionsTest):
    """Requests that wait, more of them than there are turns, while others come."""

    def assert_served(self, service: Things, while_what: str) -> None:
        newcomer = self.connect(service)
        self.get_things(newcomer, f"a client, while {while_what},")

    def test_a_request_that_waits_for_a_hung_service_holds_no_turn(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        hung = self.enterContext(upstream(lambda connection: go_on.wait(PATIENCE)))
        products = self.enterContext(running(Products))
        gateway = self.enterContext(running(
            Gateway, users_url=[hung], products_url=[products.url], timeout=PATIENCE))
        waiting = [self.connect(gateway) for _ in range(2 * Gateway.turn_count)]
        for client in waiting:
            client.send(GET.replace(b"things", b"users"))
        answer = ask(gateway.server_port, target="/products")
        self.assertEqual(answer.status, 200, "GET /products while every GET /users hangs")
        answer = ask(gateway.server_port, target="/health/live")
        self.assertEqual(answer.status, 200, "GET /health/live while every GET /users hangs")
        busy = gateway.connections.count_busy()
        self.assertGreaterEqual(busy, len(waiting), "the others should still wait for users")
        go_on.set()

    def test_clients_that_send_slowly_hold_no_turn(self):
        service = self.enterContext(running(Things))
        for _ in range(3):
            self.connect(service).send(GET[:20])
        wait_until(lambda: service.connections.count_busy() == 3, "all three requests to begin")
        self.assert_served(service, "three have sent parts of a head")

    def test_requests_that_are_known_to_wait_give_up_their_turns_at_once(self):
        service = self.enterContext(running(Things))
        with (mock.patch.object(service.turns, "end_overdue"),  # nothing takes their turns away
              mock.patch.object(wire, "LINGER", 10 * PATIENCE)):
            for data in (GET[:20], POST + b"Content-Length: 9\r\n\r\n", b"nonsense\r\n\r\n"):
                slow = self.connect(service)
                slow.send(data)
                if data.startswith(b"nonsense"):
                    self.assertEqual(self.read(slow, "nonsense").status, 400)  # and it lingers
                self.assert_served(service, f"another has sent {data!r}")

    def test_clients_that_do_not_read_their_answers_hold_no_turn(self):
        service = self.enterContext(running(Things))
        for _ in range(3):
            self.connect(service).send(b"GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
        self.assert_served(service, "three do not read their answers")

    def test_requests_that_take_long_for_any_other_reason_hold_no_turn(self):
        service = self.enterContext(running(Things))
        for _ in range(3):
            self.connect(service).send(GET_WAIT)
            self.assertTrue(service.waiting.acquire(timeout=PATIENCE), "GET /wait did not begin")
        self.assert_served(service, "three requests take long")
        service.go_on.set()

    def test_a_write_holds_no_turn_so_that_several_can_share_a_commit(self):
        service = self.enterContext(running(StoredThings))
        with mock.patch.object(service.turns, "give_up", wraps=service.turns.give_up) as give_up:
            ask(service.server_port, "GET", "/things")
            self.assertFalse(give_up.called, "a read keeps its turn")
            ask(service.server_port, "DELETE", "/things/1")
            self.assertTrue(give_up.called, "a write gives up its turn")


if __name__ == "__main__":
    unittest.main()
