"""Which instance is called, what is retried, when a service is not called, and what is logged."""
import contextlib
import errno
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from microshop.chassis import client, connections
from microshop.chassis.client import Client, Upstream
from microshop.chassis.errors import (
    BadGateway, BreakerOpen, Broken, GatewayTimeout, Unreachable, UpstreamUnavailable)
from microshop.chassis.resilience import Bulkhead, CircuitBreaker, Outcome, RetryBudget
from microshop.chassis.tracing import Trace
from tests.chassis.calls import (
    ALICE, BOB, BROKEN, CLOSING, OK, TIMEOUT, ClientTest, Stub, open_breaker, status)
from tests.helpers import NOBODY, PATIENCE, read_request, upstream, wait_until


class RequestTest(ClientTest):
    def test_a_request_is_sent_unchanged_but_for_host_length_time_left_and_trace(self):
        stub, target = Stub(CLOSING), "//users/../%2F?a=%20&b"
        users = self.serve(stub)
        host = f"Host: {users.instances[0].base_url.removeprefix('http://')}"
        added = [host, f"x-request-timeout: {TIMEOUT:.3f}", "x-request-id: order-206"]
        for method, headers, body, fields in [
            ("GET", {"Accept": "*/*"}, None, ["Accept: */*"]),
            ("PUT", {"Etag": "x"}, b"\0\xff", ["Content-Length: 2", "Etag: x"]),
            ("POST", {}, b"", ["Content-Length: 0"]),
            ("POST", {}, None, []),
        ]:
            trace = Trace("order-206")
            self.client.call(users, method, target, trace, headers, body)
            head, _, content = stub.connections[-1][0].partition(b"\r\n\r\n")
            line, *lines = head.decode().split("\r\n")
            self.assertEqual((line, sorted(lines), content),
                             (f"{method} {target} HTTP/1.1", sorted(fields + added + [
                                 f"traceparent: 00-{trace.trace_id}-{self.spans[-1].span_id}-01"]),
                              body or b""))

    def test_a_line_break_in_a_header_is_refused_before_anything_is_sent(self):
        stub = Stub(ALICE)
        for value in ("1\r\nX-Admin: yes", "1\nX-Admin: yes", "1\rX-Admin: yes",
                      "\r\n\r\nGET /users HTTP/1.1", "1\0"):
            with self.subTest(value):
                users = self.serve(stub)
                self.assertRaises(ValueError, self.call, users, headers={"X-Note": value})
                self.assertTrue(stub.ended.acquire(timeout=PATIENCE),
                                "the client did not close the connection")
        self.assertEqual(stub.connections, [[]] * 5, "a request arrived at the service")

    def test_calls_at_the_same_time_get_their_own_responses(self):
        def echo(connection: socket.socket) -> None:
            while request := read_request(connection):
                target = request.split()[1]
                connection.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (OK, len(target), target))

        users, targets = self.serve(echo), [f"/users/{number}" for number in range(200)]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(
                lambda path: self.client.call(users, "GET", path, Trace("-")), targets))
        self.assertEqual([reply.body.decode() for reply in replies], targets)


class RetryTest(ClientTest):
    """What broke is retried if that does no harm. Each pause is as long as it may be."""

    def setUp(self) -> None:
        super().setUp()
        longest = mock.patch.object(client.random, "uniform", lambda least, most: most)
        self.enterContext(longest)

    def test_an_idempotent_request_is_sent_up_to_three_times_each_on_a_new_connection(self):
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
            for end in BROKEN if method == "GET" else BROKEN[:1]:
                with self.subTest(method, end=end):
                    self.time.pauses.clear()
                    self.assertEqual(self.call_in_turn([end], method), ([BadGateway], [1, 1, 1]))
                    self.assertEqual(self.time.pauses, [0.05, 0.1], "seconds before each retry")

    def test_the_reply_to_a_retry_is_returned(self):
        for end in BROKEN:
            with self.subTest(end):
                self.assertEqual(self.call_in_turn([end, ALICE], "GET"), ([b"Alice"], [1, 1]))

    def test_a_pause_is_random_between_zero_and_a_limit_that_doubles(self):
        with mock.patch.object(client.random, "uniform") as draw:
            draw.return_value = 0.01
            self.call_in_turn([BROKEN[0]], "GET")
        self.assertEqual([call.args for call in draw.call_args_list[:2]], [(0, 0.05), (0, 0.1)])
        self.assertEqual(self.time.pauses, [0.01, 0.01])

    def test_a_post_or_patch_that_may_have_been_carried_out_is_not_retried(self):
        for method in ("POST", "PATCH"):
            for end in BROKEN:
                with self.subTest(method, end=end):
                    self.assertEqual(self.call_in_turn([end], method), ([BadGateway], [1]))

    def test_a_post_with_an_idempotency_key_is_retried_at_an_idempotent_receiver_only(self):
        key = {"idempotency-key": "k"}
        for method, is_receiver, headers, times in (
                ("POST", True, key, 3), ("POST", True, {}, 1), ("POST", False, key, 1),
                ("POST", True, {"idempotency-key": ""}, 1), ("PATCH", True, key, 1)):
            with self.subTest(method, is_receiver=is_receiver, headers=headers):
                stub = Stub(BROKEN[0])
                orders = self.serve(stub, idempotent_receiver=is_receiver)
                with self.assertRaises(Broken):
                    self.client.call(orders, method, "/orders", Trace("-"), headers, b"{}")
                what = f"a {method} with {headers or 'no Idempotency-Key'}"
                receiver = "an idempotent receiver" if is_receiver else "another service"
                self.assertEqual(len(stub.connections), times, f"times that {what} was sent to "
                                 f"{receiver}, which closes the connection without an answer")

    def test_any_complete_response_is_final_and_so_is_an_invalid_one(self):
        two_lengths = b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nMallory"
        for what, response in {
            "404": status(404), "500": status(500), "503": status(503),
            "garbage": b"SSH-2.0\r\n\r\n", "two lengths": OK + two_lengths,
            "too long": OK + b"Content-Length: 999999999\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.assertEqual(self.call_in_turn([response], "GET")[1], [1],
                                 "the request must be sent once")

    def test_a_request_that_timed_out_is_not_retried(self):
        stub = Stub(ALICE, b"")  # the second response never comes
        users = self.serve(stub)
        self.call(users)
        self.client.timeout = 0.1
        self.assertRaises(GatewayTimeout, self.call, users)
        self.assertEqual(len(stub.requests()), 2)

    def test_a_post_is_retried_if_none_of_it_was_sent(self):
        stub = Stub(ALICE)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            users = self.serve(f"http://127.0.0.1:{listener.getsockname()[1]}")
            self.assertRaises(Unreachable, self.call, users, "POST")
            self.assertEqual(len(self.time.pauses), 2, "retries")

            def serve_one() -> None:
                with listener.accept()[0] as connection:
                    stub(connection)

            def start_to_listen(_: float) -> None:
                listener.listen()
                threading.Thread(target=serve_one, daemon=True).start()

            with mock.patch.object(self.time, "sleep", start_to_listen):
                self.assertEqual(self.call(users, "POST", body=b"{}").body, b"Alice")
        self.assertEqual([len(requests) for requests in stub.connections], [1])

    def test_the_error_says_broken_if_any_try_may_have_been_carried_out(self):
        with contextlib.ExitStack() as service:
            users = self.serve(service.enter_context(upstream(Stub(BROKEN[0]))))
            with mock.patch.object(self.time, "sleep", lambda _: service.close()):
                self.assertRaises(Broken, self.call, users)  # although the retries are refused

    def test_no_retry_waits_past_the_deadline(self):
        with mock.patch.object(client, "BACKOFF", 3600.0):
            self.assertEqual(self.call_in_turn([BROKEN[0]], "GET"), ([BadGateway], [1]))
        self.assertEqual(self.time.pauses, [])

    def test_what_a_lost_attempt_may_have_caused_is_not_reported_as_the_answer(self):
        key = {"idempotency-key": "k"}
        for method, number, is_broken in (
                ("DELETE", 404, True), ("DELETE", 412, True), ("PUT", 412, True),
                ("POST", 412, True), ("DELETE", 204, False), ("DELETE", 409, False),
                ("PUT", 404, False), ("GET", 404, False), ("GET", 412, False)):
            with self.subTest(method, status=number):
                users = self.serve(Stub(BROKEN[0], status(number)), idempotent_receiver=True)
                if is_broken:
                    with self.assertRaisesRegex(Broken, "closed the connection"):
                        self.call(users, method, headers=key)
                else:
                    self.assertEqual(self.call(users, method, headers=key).status, number)

    def test_a_404_to_a_delete_is_the_answer_if_no_attempt_before_was_sent(self):
        gone = Stub(status(404))
        for users in (self.serve(gone), self.serve(self.refusing_url(), gone)):
            self.assertEqual(self.call(users, "DELETE").status, 404)

    def test_retries_stop_when_their_budget_is_spent(self):
        with mock.patch.multiple(CircuitBreaker, IN_A_ROW=1000, RECENT=1000):
            _, counts = self.call_in_turn([BROKEN[0]], *["GET"] * 20)
            self.assertEqual(len(counts), 20 + 3, "requests sent for 20 calls that all failed: "
                             "the calls, and the least number of retries")
            _, counts = self.call_in_turn([CLOSING] * 80 + [BROKEN[0]], *["GET"] * 100)
        self.assertEqual(len(counts), 100 + 10, "requests sent for 100 calls, of which 20 failed: "
                         "the calls, and a tenth as many retries")

    def test_there_is_no_retry_once_the_circuit_breaker_is_open(self):
        with mock.patch.object(RetryBudget, "AT_LEAST", 100):
            outcomes, counts = self.call_in_turn([BROKEN[0]], "GET", "GET", "GET")
        self.assertEqual(outcomes, [BadGateway, BadGateway, BreakerOpen])
        self.assertEqual(len(counts), 5, "tries, of which the fifth opened the circuit breaker")

    def test_a_circuit_breaker_that_opens_before_the_retry_does_not_hide_that_a_try_was_sent(self):
        users = self.serve(Stub(BROKEN[0]))
        breaker = users.instances[0].breaker
        with mock.patch.object(self.time, "sleep", lambda _: open_breaker(breaker)):
            self.assertRaises(Broken, self.call, users, "PUT")
        self.assertEqual([(span.attempt, span.failure) for span in self.spans],
                         [(1, "broken"), (2, "breaker")], "tries that were recorded")


class LoadBalancingTest(ClientTest):
    def test_instances_are_called_in_turn(self):
        users = self.serve(Stub(ALICE), Stub(BOB))
        bodies = [self.call(users).body for _ in range(4)]
        self.assertEqual(bodies, [b"Alice", b"Bob", b"Alice", b"Bob"])

    def test_the_instance_with_the_fewest_requests_in_flight_is_called(self):
        go_on, hang = self.make_hanging_stub()
        users = self.serve(hang, Stub(BOB))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(self.call, users)
            wait_until(lambda: users.instances[0].in_flight)
            self.assertEqual({self.call(users).body for _ in range(5)}, {b"Bob"},
                             "the first instance has a request in flight, the second has none")
            go_on.set()
            self.assertEqual(first.result(PATIENCE).body, b"Alice")
        self.assertEqual({self.call(users).body for _ in range(2)}, {b"Alice", b"Bob"})
        self.assertEqual([instance.in_flight for instance in users.instances], [0, 0])

    def test_an_instance_that_refuses_is_passed_over_without_a_pause_whatever_the_method(self):
        users = self.serve(self.refusing_url(), self.refusing_url(), Stub(ALICE))
        for _ in range(20):
            self.assertEqual(self.call(users, "POST").body, b"Alice")
        self.assertEqual(self.time.pauses, [])

    def test_an_instance_that_refuses_is_not_called_again_while_its_circuit_breaker_is_open(self):
        users = self.serve(self.refusing_url(), Stub(ALICE))
        for pause in (0.0, 0.5, 1.0, 2.0):
            self.time.now += pause
            for _ in range(20):
                self.call(users)
            states = [instance.breaker.state for instance in users.instances]
            self.assertEqual(states, ["open", "closed"], f"after another {pause} s")
            last_choice = users.instances[0].last_choice
            self.call(users)
            self.assertEqual(users.instances[0].last_choice, last_choice)

    def test_a_failing_instance_gets_its_share_again_once_its_circuit_breaker_closes(self):
        users = self.serve(Stub(*[status(500)] * 5, ALICE), Stub(BOB))

        def bodies() -> list[bytes]:
            return [self.call(users).body for _ in range(10)]

        self.assertCountEqual(bodies(), [b""] * 5 + [b"Bob"] * 5)
        self.assertEqual(bodies(), [b"Bob"] * 10, "the circuit breaker of the first is open")
        self.time.now += 0.5
        self.assertCountEqual(bodies(), [b"Alice"] * 5 + [b"Bob"] * 5)

    def test_a_retry_goes_to_another_instance_even_if_that_is_busier(self):
        broken, well = Stub(BROKEN[0]), Stub(ALICE)
        users = self.serve(broken, well)
        users.instances[1].last_choice = 1  # so that the broken one is called first

        def let_the_other_be_busy(_: float) -> None:
            users.instances[1].in_flight = 7

        with mock.patch.object(self.time, "sleep", side_effect=let_the_other_be_busy) as sleep:
            self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual((len(broken.connections), len(well.connections)), (1, 1))
        sleep.assert_called_once()

    def test_a_post_that_one_instance_may_have_carried_out_is_not_sent_to_another(self):
        broken, well = Stub(BROKEN[0]), Stub(ALICE)
        users = self.serve(broken, well)
        self.assertRaises(Broken, self.call, users, "POST")
        self.assertEqual((len(broken.connections), len(well.connections)), (1, 0))

    def test_an_instance_that_accepts_no_connection_is_passed_over_after_connect_time(self):
        full = self.enterContext(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # the system drops further clients once enough are waiting
            waiting = self.enterContext(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with mock.patch.object(connections, "CONNECT_TIME", 0.1):
            self.assertEqual(self.call(self.serve(url, Stub(ALICE)), "POST").body, b"Alice")
            self.assertRaises(Unreachable, self.call, self.serve(url), deadline=self.time.now + 0.2)


class CircuitBreakerTest(ClientTest):
    def call_times(self, times: int, users: Upstream, **more: object) -> None:
        for _ in range(times):
            self.call(users, "POST", **more)

    def test_a_service_that_fails_is_not_called_until_its_pause_is_over(self):
        stub = Stub(*[status(500)] * 5, ALICE)
        users = self.serve(stub)
        self.call_times(5, users)
        start = self.time.now
        for passed in (0.0, 0.499):
            self.time.now = start + passed
            expected = "^the users service is temporarily unavailable: its circuit breaker is open$"
            with self.assertRaisesRegex(UpstreamUnavailable, expected) as raised:
                self.call(users)
            self.assertEqual(raised.exception.members, {"service": "users"})
            self.assertEqual(raised.exception.headers, [("Retry-After", "1")])
        self.time.now = start + 0.501
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual(users.instances[0].breaker.state, "closed")
        self.assertEqual([len(requests) for requests in stub.connections], [6],
                         "5 requests that failed, and the probe")

    def test_retry_after_says_when_the_pause_is_over(self):
        users = self.serve(Stub(status(500)))
        self.call_times(5, users)
        for pause in (0.5, 1, 2, 4):
            self.time.now += pause + 0.001
            self.call_times(1, users)
        self.time.now += 0.5
        with self.assertRaises(UpstreamUnavailable) as raised:
            self.call(users)
        self.assertEqual(raised.exception.headers, [("Retry-After", "8")])

    def test_500_502_and_504_open_the_circuit_breaker_and_no_other_status_does(self):
        for number, state in (
                (400, "closed"), (404, "closed"), (409, "closed"), (429, "closed"), (501, "closed"),
                (503, "closed"), (500, "open"), (502, "open"), (504, "open")):
            with self.subTest(number):
                users = self.serve(Stub(status(number)))
                self.call_times(5, users)
                self.assertEqual(users.instances[0].breaker.state, state)

    def test_a_broken_connection_or_an_invalid_response_opens_the_circuit_breaker(self):
        too_long = OK + b"Content-Length: 999999999\r\n\r\n"
        for response in (*BROKEN, b"SSH-2.0\r\n\r\n", too_long):
            with self.subTest(response):
                users = self.serve(Stub(response))
                for _ in range(5):
                    self.assertRaises(BadGateway, self.call, users, "POST")
                self.assertEqual(users.instances[0].breaker.state, "open")

    def test_a_timeout_opens_the_circuit_breaker_unless_the_call_had_less_than_half_the_time(self):
        def time_out(request: connections.Request) -> None:
            request.is_sent = True
            raise TimeoutError

        for share, state in ((1.0, "open"), (0.3, "closed")):
            users = self.serve(Stub(ALICE))
            with mock.patch.object(self.client._opener, "open", time_out):
                for _ in range(5):
                    deadline = self.time.now + share * TIMEOUT
                    self.assertRaises(GatewayTimeout, self.call, users, deadline=deadline)
            self.assertEqual(users.instances[0].breaker.state, state,
                             "state of the circuit breaker after 5 calls in a row that timed out, "
                             f"and had {share:.0%} of the client's timeout")

    def test_a_504_to_a_call_with_little_time_does_not_open_the_circuit_breaker(self):
        users = self.serve(Stub(status(504)))
        self.call_times(5, users, deadline=self.time.now + 0.3 * TIMEOUT)
        self.assertEqual(users.instances[0].breaker.state, "closed")

    def test_a_call_waits_for_the_probe_of_another_call_to_end(self):
        for outcome, is_called in ((Outcome.SUCCEEDED, True), (Outcome.UNKNOWN, True),
                                   (Outcome.FAILED, False), (Outcome.BROKE, False)):
            users = self.serve(Stub(ALICE))
            open_breaker(users.instances[0].breaker)
            self.time.now += 1
            probe = users.choose([], 0)
            with (self.subTest(outcome), ThreadPoolExecutor(1) as pool,
                  mock.patch.object(client, "BULKHEAD_TIME", PATIENCE)):
                calling = pool.submit(self.call, users)
                wait_until(lambda users=users, calling=calling:
                           users._probe_ended._waiters or calling.done(), "the call to wait")
                users.note_end(*probe, outcome)
                self.assertFalse(users._probe_ended._waiters, "the call still waits")
                if is_called:
                    self.assertEqual(calling.result(PATIENCE).body, b"Alice")
                else:
                    self.assertRaises(UpstreamUnavailable, calling.result, PATIENCE)

    def test_a_call_waits_for_a_probe_no_longer_than_for_the_bulkhead(self):
        users = self.serve(Stub(ALICE))
        open_breaker(users.instances[0].breaker)
        self.time.now += 1
        users.choose([], 0)  # the probe
        for left, expected in ((TIMEOUT, client.BULKHEAD_TIME), (0.05, 0.05)):
            waiting = mock.patch.object(users._probe_ended, "wait_for")
            with waiting as wait_for, self.assertRaises(UpstreamUnavailable) as raised:
                self.call(users, deadline=self.time.now + left)
            self.assertEqual(raised.exception.headers, [("Retry-After", "1")])
            self.assertAlmostEqual(wait_for.call_args.args[1], expected,
                                   msg=f"seconds to wait, with {left} s left")

    def test_a_burst_of_calls_after_the_pause_waits_for_the_first_to_succeed(self):
        go_on, hang = self.make_hanging_stub()
        users = self.serve(hang)
        open_breaker(users.instances[0].breaker)
        self.time.now += 30
        with (mock.patch.object(client, "BULKHEAD_TIME", PATIENCE),
              ThreadPoolExecutor(16) as pool):
            burst = [pool.submit(self.call, users) for _ in range(16)]
            wait_until(lambda: len(users._probe_ended._waiters) == 15, "15 of 16 calls to wait")
            go_on.set()
            self.assertEqual([call.result(PATIENCE).body for call in burst], [b"Alice"] * 16)

    def test_a_lack_of_file_descriptors_here_says_nothing_about_the_service(self):
        users = self.serve(Stub(ALICE))
        for number in (errno.EMFILE, errno.ENFILE):
            error = OSError(number, "Too many open files")
            with mock.patch.object(socket, "create_connection", side_effect=error):
                for _ in range(CircuitBreaker.RECENT):
                    with self.assertRaises(UpstreamUnavailable) as caught:
                        self.call(users)
            self.assertEqual(
                caught.exception.detail, "the users service cannot be called now: "
                "too many files are open in this process")
            self.assertEqual(dict(caught.exception.headers), {"Retry-After": "1"})
        self.assertEqual(self.call(users).body, b"Alice")

    def test_a_faulty_request_of_the_caller_costs_the_service_nothing(self):
        users = self.serve(Stub(ALICE))
        for _ in range(10):
            self.assertRaises(ValueError, self.call, users, headers={"X-Note": "1\n"})
        self.assertEqual(self.call(users).body, b"Alice")


class BulkheadTest(ClientTest):
    def detail_of_call(self, users: Upstream, **more: object) -> str:
        """Call a service that must be unavailable, at once although BULKHEAD_TIME is an hour."""
        details = []

        def call() -> None:
            try:
                self.call(users, **more)
            except UpstreamUnavailable as error:
                details.append(error.detail)

        with mock.patch.object(client, "BULKHEAD_TIME", 3600.0):
            calling = threading.Thread(target=call, daemon=True)
            calling.start()
            calling.join(PATIENCE)
        self.assertEqual(len(details), 1, "the call has not ended, or was answered")
        return details[0]

    def test_a_service_that_hangs_occupies_a_limited_number_of_calls(self):
        go_on, hang = self.make_hanging_stub()
        users = self.serve(hang, max_in_flight=2)
        with ThreadPoolExecutor(3) as pool:
            hung = [pool.submit(self.call, users) for _ in range(2)]
            wait_until(lambda: users.instances[0].in_flight == 2, "two calls to hang")
            expected = "^the users service is at its limit of 2 concurrent requests$"
            with mock.patch.object(client, "BULKHEAD_TIME", 0.01):
                with self.assertRaisesRegex(
                        UpstreamUnavailable, expected,
                        msg="the third call, while two hang and the limit is 2") as raised:
                    self.call(users)
            self.assertEqual(raised.exception.members, {"service": "users"})
            self.assertEqual(raised.exception.headers, [("Retry-After", "1")])
            with mock.patch.object(client, "BULKHEAD_TIME", PATIENCE):
                hung.append(pool.submit(self.call, users))
                self.assertEqual(
                    users.instances[0].in_flight, 2, "calls in flight, while two hang, a third "
                    "was refused, and a fourth waits: the limit is 2. (A call that was refused "
                    "took no place, so it gives none back.)")
                go_on.set()  # the call that waits gets the place of one that ends
                bodies = [call.result(PATIENCE).body for call in hung]
            self.assertEqual(bodies, [b"Alice"] * 3)
        self.assertEqual(users.instances[0].breaker.state, "closed")

    def test_a_call_that_fails_gives_its_place_in_the_bulkhead_back(self):
        for response, headers, error in (
                (BROKEN[0], {}, Broken), (b"SSH-2.0\r\n\r\n", {}, BadGateway),
                (ALICE, {"X-Note": "1\n"}, ValueError)):
            users = self.serve(Stub(response))
            self.assertRaises(error, self.call, users, "POST", headers=headers)
            self.assertEqual(users.bulkhead.in_use, 0, "calls that still have a place, after the "
                             f"only call has failed ({error.__name__})")

    def test_a_call_that_is_retried_has_one_place_and_gives_it_back_once(self):
        good = self.serve(Stub(ALICE))
        self.call(good)
        self.assertEqual(good.bulkhead.in_use, 0, "calls that have a place, after the only call "
                                                  "has succeeded")
        users = self.serve(NOBODY)
        self.assertRaises(Unreachable, self.call, users)
        self.assertEqual(len(self.time.pauses), 2, "retries")
        self.assertEqual(users.bulkhead.in_use, 0, "calls that have a place, after the only call "
                                                   "was tried three times; below 0, more than the "
                                                   "limit could pass from now on")

    def test_a_call_waits_for_the_bulkhead_no_longer_than_its_limit_and_its_deadline_allow(self):
        users = self.serve(Stub(ALICE))
        for left, expected in ((TIMEOUT, client.BULKHEAD_TIME), (0.05, 0.05)):
            full = mock.patch.object(Bulkhead, "acquire", return_value=False)
            with full as acquire, self.assertRaises(UpstreamUnavailable):
                self.call(users, deadline=self.time.now + left)
            waited = acquire.call_args.kwargs["timeout"]
            self.assertAlmostEqual(waited, expected, msg=f"seconds, with {left} s left")

    def test_a_call_that_finds_the_bulkhead_full_ends_at_its_deadline(self):
        users = self.serve(Stub(ALICE), max_in_flight=1)
        users.enter(0)
        detail = self.detail_of_call(users, deadline=self.time.now + 0.05)
        self.assertRegex(detail, "is at its limit of 1")

    def test_a_call_does_not_wait_for_the_bulkhead_if_the_circuit_breaker_is_open(self):
        users = self.serve(Stub(status(500)), max_in_flight=1)
        for _ in range(5):
            self.call(users)
        users.bulkhead.acquire(0)
        self.assertRegex(self.detail_of_call(users), "its circuit breaker is open")


class DeadlineTest(ClientTest):
    def left(self, stub: Stub) -> list[float]:
        """Return the X-Request-Timeout of each request that came."""
        field = re.compile(rb"(?i)\nx-request-timeout: ([0-9.]+)\r")
        return [float(field.search(request)[1]) for request in stub.requests()]

    def test_each_try_says_how_many_seconds_are_left(self):
        stub = Stub(BROKEN[0], BROKEN[0], ALICE)
        with mock.patch.object(client.random, "uniform", lambda *_: 0.02):
            self.call(self.serve(stub), deadline=self.time.now + 2)
        self.assertEqual(self.left(stub), [2.0, 1.98, 1.96])

    def test_a_wait_for_a_probe_is_not_part_of_the_time_left(self):
        stub = Stub(ALICE)
        users = self.serve(stub)

        def wait_for_probe(candidates: Callable[[], list], _: float) -> list:
            self.time.now += 0.4
            return candidates()

        with (mock.patch.object(users, "admits", side_effect=[False, True]),
              mock.patch.object(users._probe_ended, "wait_for", wait_for_probe)):
            self.call(users, deadline=self.time.now + 2)
        self.assertEqual(self.left(stub), [1.6])

    def test_a_deadline_may_shorten_the_timeout_but_not_extend_it(self):
        stub = Stub(ALICE)
        users = self.serve(stub)
        self.call(users, deadline=self.time.now + 2)
        self.call(users, deadline=self.time.now + 3600)
        self.assertEqual(self.left(stub), [2.0, TIMEOUT])

    def test_nothing_is_sent_after_the_deadline(self):
        stub = Stub(ALICE)
        users = self.serve(stub)
        for _ in range(10):
            self.assertRaises(GatewayTimeout, self.call, users, deadline=self.time.now)
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual(len(stub.requests()), 1)


class LogTest(ClientTest):
    TRACE = Trace("order-206")

    def test_a_circuit_breaker_logs_each_change_of_its_state_in_one_line(self):
        users = self.serve(Stub(*[status(500)] * 6, ALICE))
        breaker = f"order-206 circuit breaker for users at {users.instances[0].base_url}"
        for _ in range(5):
            self.call(users, trace=self.TRACE)
        for _ in range(3):
            self.assertRaises(UpstreamUnavailable, self.call, users, trace=self.TRACE)
        for pause in (0.501, 1.001):
            self.time.now += pause
            self.call(users, trace=self.TRACE)
        self.call(users, trace=self.TRACE)
        self.assertEqual(self.log, [
            f"{breaker} opened for 0.5 s after 5 failures in a row",
            f"{breaker} is half-open: this request probes the instance",
            f"{breaker} opened again for 1 s: another failure",
            f"{breaker} is half-open: this request probes the instance",
            f"{breaker} closed: the probe succeeded"])
        self.assertEqual(self.kinds, {"breaker users"})

    def test_a_retry_is_logged_with_its_reason(self):
        users = self.serve(Stub(BROKEN[0], ALICE))
        self.call(users, trace=self.TRACE)
        self.assertEqual(self.log, [
            f"order-206 retrying GET /users at {users.instances[0].base_url}: "
            "the users service closed the connection before its response was complete"])
        self.assertEqual(self.kinds, {"retry users"})

    def test_a_retry_that_is_not_sent_after_all_is_not_logged(self):
        users = self.serve(Stub(BROKEN[0]))
        breaker = users.instances[0].breaker
        with mock.patch.object(self.time, "sleep", lambda _: open_breaker(breaker)):
            self.assertRaises(Broken, self.call, users, trace=self.TRACE)
        self.assertEqual(self.log, [])

    def test_a_retry_at_another_instance_is_logged_with_its_reason(self):
        users = self.serve(self.refusing_url(), Stub(ALICE))
        self.call(users, "POST")
        self.assertEqual(self.log, [
            f"- retrying POST /users at {users.instances[1].base_url}: "
            "the users service cannot be reached: Connection refused"])

    def test_a_request_that_a_full_bulkhead_rejects_is_logged(self):
        users = self.serve(Stub(ALICE), max_in_flight=1)
        users.enter(0)
        with mock.patch.object(client, "BULKHEAD_TIME", 0):
            self.assertRaises(UpstreamUnavailable, self.call, users, trace=self.TRACE)
        self.assertEqual(self.log, [
            "order-206 bulkhead for users is full: 1 requests are in flight"])
        self.assertEqual(self.kinds, {"bulkhead users"})

    def test_a_client_without_a_log_works_just_as_well(self):
        silent = Client(TIMEOUT)
        self.addCleanup(silent.close)
        users = self.serve(Stub(*[BROKEN[0]] * 4, ALICE))
        for _ in range(2):
            self.assertRaises(BadGateway, silent.call, users, "POST", "/users", Trace("-"))
        self.assertEqual(silent.call(users, "GET", "/users", Trace("-")).body, b"Alice")
