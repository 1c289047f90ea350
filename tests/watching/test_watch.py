"""What follows from the answers of other processes, round by round, and from their silence."""
import socket
import time
import unittest
from unittest import mock

from microshop.chassis import connections
from microshop.chassis.resolver import Resolver
from microshop.watching import watch as module
from microshop.watching.watch import Node, Silent, Watch, ask, fetch, find_addresses
from tests.chassis.things import stopped_clock
from tests.helpers import PATIENCE, read_request, upstream
from tests.watching.told import Stage, metrics

A, B = "http://a:1", "http://b:1"
LATE = Silent("no answer in time")
BREAKER = '{upstream="users",server="http://127.0.0.1:3001",state="%s"}'


def breakers(opened: int = 0, half_open: int = 0, closed: int = 0, state: str = "closed") -> list:
    """Return lines about a circuit breaker: how often it changed into each state, and the last."""
    counts = {"open": opened, "half-open": half_open, "closed": closed}
    return [*(f"microshop_breaker_changes_total{BREAKER % name} {count}"
              for name, count in counts.items()),
            *(f"microshop_breaker_state{BREAKER % name} {int(name == state)}" for name in counts)]


class WatchTest(unittest.TestCase):
    """A node at one address, or at two; each round is one second after the last."""

    def setUp(self):
        self.stage = Stage()
        self.enterContext(self.stage.patch())
        self.watch_at(A)

    def watch_at(self, *urls):
        self.node = Node("gateway", list(urls))
        self.watch = Watch([self.node])
        self.now = 999.5  # half a second before the processes of told.metrics start

    def hear(self, *answers, url=A, after=1.0, **more):
        """Let a round pass in which the node answers so at its address."""
        self.stage.answer(url, *answers, **more)
        self.now += after
        self.watch.ask_all(self.now)

    def told(self):
        """Return the kinds and the texts of the events, the oldest first."""
        return [(event["kind"], event["text"]) for event in reversed(self.watch.events)]

    def pids(self):
        return [process.pid for process in self.node.processes.values()]


class RateTest(WatchTest):
    def test_nothing_is_known_of_rates_after_the_first_round(self):
        self.hear(metrics(1, "a_total 1000"))
        self.assertEqual(self.node.rates.total("a_total"), 0)

    def test_a_rate_is_the_growth_over_the_time_between_two_rounds(self):
        self.hear(metrics(1, "a_total 1000"))
        self.hear(metrics(1, "a_total 1030"), after=2.0)
        self.assertEqual(self.node.rates.total("a_total"), 15)
        self.hear(metrics(1, "a_total 1030"), after=3.0)
        self.assertEqual(self.node.rates.total("a_total"), 6)

    def test_what_happened_more_than_ten_seconds_ago_no_longer_counts(self):
        self.hear(metrics(1, "a_total 0"))
        for _ in range(10):
            self.hear(metrics(1, "a_total 100"))
        self.assertEqual(self.node.rates.total("a_total"), 10)
        self.hear(metrics(1, "a_total 100"))
        self.assertEqual(self.node.rates.total("a_total"), 0)

    def test_nothing_is_known_of_rates_after_a_pause(self):
        self.hear(metrics(1, "a_total 0"))
        self.hear(metrics(1, "a_total 100"), after=3600.0)
        self.assertEqual(self.node.rates.total("a_total"), 0)

    def test_the_metrics_of_ten_seconds_are_kept_and_no_more(self):
        for _ in range(100):
            self.hear(metrics(1))
        [process] = self.node.processes.values()
        self.assertEqual(len(process.history), 11)

    def test_a_process_that_was_started_since_the_last_round_has_counted_from_zero(self):
        self.hear(metrics(1, "a_total 1000"))
        self.hear(metrics(2, "a_total 20", started=1001.0, restarts=1))
        self.assertEqual(self.node.rates.total("a_total"), 20)
        self.hear(metrics(2, "a_total 24", started=1001.0, restarts=1))
        self.assertEqual(self.node.rates.total("a_total"), 12)

    def test_a_pid_that_comes_again_with_another_start_is_another_process(self):
        self.hear(metrics(1, "a_total 10"))
        self.hear(metrics(1, "a_total 15", started=1001.0, restarts=1))
        self.assertEqual(self.node.rates.total("a_total"), 15)
        self.assertEqual(len(self.node.processes), 1)

    def test_what_an_old_process_counted_before_it_was_first_heard_is_no_growth(self):
        self.hear(metrics(1, started=999.0))
        self.hear(metrics(2, "a_total 1000", started=999.0))
        self.assertEqual(self.node.rates.total("a_total"), 0)

    def test_when_the_clock_moves_back_the_rates_begin_anew(self):
        self.hear(metrics(1, "a_total 0"))
        self.hear(metrics(1, "a_total 10"), after=-3600.0)
        self.assertEqual(self.node.rates.total("a_total"), 0)
        self.hear(metrics(1, "a_total 15"))
        self.assertEqual(self.node.rates.total("a_total"), 5)
        self.assertEqual(self.node.grown.total("a_total"), 5)

    def test_a_node_that_is_silent_when_the_clock_moves_back_is_down(self):
        self.hear(metrics(1))
        self.hear(LATE, after=-3600.0)
        self.assertEqual(self.node.state, "down")

    def test_the_rates_of_a_process_that_is_silent_fade_away(self):
        self.hear(metrics(1, "a_total 0"))
        self.hear(metrics(1, "a_total 100"))
        for expected in (50, 33, 25):
            self.hear(LATE)
            self.assertEqual(int(self.node.rates.total("a_total")), expected)
        self.hear(LATE, after=8.0)
        self.assertEqual(self.node.rates.total("a_total"), 0)


class WorkersTest(WatchTest):
    """Several processes at one address: a round hears one of them, then another one."""

    def test_they_are_told_apart_and_their_rates_and_values_are_added(self):
        self.hear(metrics(1, "a_total 1000", "b 1"))
        self.hear(metrics(2, "a_total 2000", "b 2"))
        self.hear(metrics(1, "a_total 1020", "b 1"), metrics(2, "a_total 2005", "b 2"))
        self.assertEqual(sorted(self.pids()), [1, 2])
        self.assertEqual(self.node.rates.total("a_total"), 20 / 2 + 5 / 1)
        self.assertEqual(self.node.metrics.total("b"), 3)

    def test_if_several_are_known_each_is_likely_to_be_asked_in_a_round(self):
        self.hear(metrics(1))
        self.stage.asked.clear()
        self.hear(metrics(2))
        self.assertEqual(self.stage.asked.count(f"{A}/metrics"), 1)
        self.stage.asked.clear()
        self.hear(metrics(1), metrics(2))
        self.assertEqual(self.stage.asked.count(f"{A}/metrics"), 3)
        for pid in range(3, 50):
            self.hear(metrics(pid))
        self.stage.asked.clear()
        self.hear(metrics(1))
        self.assertEqual(self.stage.asked.count(f"{A}/metrics"), module.MAX_ASKED)

    def test_one_that_was_started_anew_takes_the_place_of_one_not_heard_since(self):
        self.hear(metrics(1))
        self.hear(metrics(2))
        self.hear(metrics(2), metrics(3, started=1001.0, restarts=1))
        self.assertEqual(self.pids(), [2, 3])
        self.assertEqual(self.told(), [("restarted", "gateway was started again (pid 3)")])
        self.assertEqual(self.watch.events[0]["at"], 1001.0, "the time of its start")

    def test_one_that_is_heard_late_takes_nobodys_place(self):
        self.hear(metrics(1))
        self.hear(metrics(2, started=1000.4, restarts=1))
        self.assertEqual(self.pids(), [1, 2], "2 was there when 1 was heard")

    def test_one_that_is_not_heard_for_ten_seconds_although_others_are_has_ended(self):
        self.hear(metrics(1))
        self.hear(metrics(2))
        for _ in range(9):
            self.hear(metrics(2))
        self.assertEqual(self.pids(), [1, 2])
        self.hear(metrics(2))
        self.assertEqual(self.pids(), [2])

    def test_if_some_of_the_answers_of_a_round_fail_the_others_count(self):
        self.hear(metrics(1))
        self.hear(metrics(2))
        for _ in range(3):
            self.hear(Silent("refused"), metrics(1), metrics(2))
        self.assertEqual((self.node.state, self.told()), ("up", []))


class AddressesTest(WatchTest):
    """One name leads to several processes, as that of a headless Service of Kubernetes does."""

    PODS = ("http://10.0.0.1:1", "http://10.0.0.2:1", "http://[fd00::3]:1")

    def setUp(self):
        super().setUp()
        self.stage.addresses["a"] = ["10.0.0.1", "10.0.0.2", "fd00::3"]
        for number, url in enumerate(self.PODS, start=1):
            # In a container of its own, each process has the pid 1.
            self.stage.answer(url, metrics(1, f"a {number}", started=1000.0 + number / 1e6))

    def hear(self):
        self.stage.asked.clear()
        self.now += 1.0
        self.watch.ask_all(self.now)

    def asked(self):
        return [url.removesuffix("/metrics") for url in self.stage.asked if "/metrics" in url]

    def test_each_is_asked_once_in_a_round_and_counts(self):
        for _ in range(2):
            self.hear()
            self.assertCountEqual(self.asked(), self.PODS)
            self.assertEqual(self.node.metrics.total("a"), 1 + 2 + 3)

    def test_an_address_that_is_new_is_asked_in_the_next_round_and_one_that_is_gone_is_not(self):
        self.hear()
        self.stage.addresses["a"] = ["10.0.0.2", "10.0.0.4"]
        self.stage.answer("http://10.0.0.4:1", metrics(1, "a 4", started=1001.5))
        self.hear()
        self.assertCountEqual(self.asked(), ["http://10.0.0.2:1", "http://10.0.0.4:1"])
        self.assertEqual(self.node.metrics.total("a"), 2 + 4)

    def test_a_process_that_answers_at_two_addresses_counts_once(self):
        self.stage.addresses["a"] = ["10.0.0.1", "::1"]
        self.stage.answer("http://[::1]:1", metrics(1, "a 1", started=1000.000001))
        for _ in range(2):
            self.hear()
        self.assertEqual(self.node.metrics.total("a"), 1)

    def test_while_one_of_them_answers_the_node_is_up(self):
        for url in self.PODS[:2]:
            self.stage.answer(url, Silent("refused"))
        for _ in range(3):
            self.hear()
        self.assertEqual((self.node.state, self.node.silence), ("up", ""))

    def test_a_name_that_is_unknown_is_a_silence_until_it_is_known(self):
        known = self.stage.addresses["a"]
        self.stage.addresses["a"] = OSError("the name a cannot be resolved")
        self.hear()
        self.assertEqual((self.node.state, self.node.silence), ("down", "unknown host name"))
        self.assertEqual(self.asked(), [])
        self.stage.addresses["a"] = known
        self.hear()
        self.assertEqual((self.node.state, self.node.silence), ("up", ""))


class TimeTest(WatchTest):
    def test_a_round_lasts_ask_time_and_half_of_it_is_for_looking_names_up(self):
        clock = self.enterContext(stopped_clock(module))
        with (mock.patch.object(self.stage, "find", return_value=["10.0.0.1"]) as find,
              mock.patch.object(module, "fetch", side_effect=LATE) as fetch):
            self.watch.ask_all(self.now)
        self.assertEqual(find.call_args.args, ("a", 0.25), "the name and the seconds to find it")
        self.assertEqual(fetch.call_args.args[1] - clock.now, 0.5, "seconds from the beginning of "
                         "the round to the deadline of its answers")


class StateTest(WatchTest):
    def test_a_node_that_does_not_answer_in_the_first_round_is_down(self):
        self.hear(LATE)
        self.assertEqual((self.node.state, self.node.silence), ("down", "no answer in time"))
        self.assertEqual(self.told(), [], "there is nothing to compare with")

    def test_a_node_that_misses_two_rounds_is_down_until_it_answers(self):
        self.hear(metrics(1))
        self.hear(LATE)
        self.assertEqual(self.node.state, "up", "a process under load may be late")
        self.hear(LATE)
        self.assertEqual((self.node.state, self.pids()), ("down", [1]))
        self.hear(metrics(1))
        self.assertEqual((self.node.state, self.node.silence), ("up", ""))
        self.assertEqual(self.told(), [
            ("died", "gateway cannot be seen: no answer in time"),
            ("up", "gateway answers again")])

    def test_one_round_that_is_missed_now_and_then_is_forgiven(self):
        for _ in range(3):
            self.hear(metrics(1))
            self.hear(LATE)
        self.assertEqual(self.told(), [])

    def test_after_a_silence_none_of_the_processes_before_it_is_taken_to_be_there(self):
        self.hear(metrics(1))
        for _ in range(2):
            self.hear(Silent("refused"))
        self.hear(metrics(2, started=1002.0))  # started by hand: no supervisor counts it
        self.assertEqual(self.pids(), [2])

    def test_a_process_that_drains_is_told_of(self):
        self.hear(metrics(1))
        self.hear(metrics(1, draining=1))
        self.assertEqual((self.node.state, self.told()),
                         ("draining", [("draining", "gateway is draining")]))

    def test_a_node_is_up_while_any_of_its_instances_is(self):
        self.watch_at(A, B)
        self.stage.answer(B, metrics(2))
        self.hear(metrics(1, draining=1))
        self.assertEqual(self.node.state, "up")
        for _ in range(2):
            self.hear(Silent("refused"))
        self.assertEqual(self.node.state, "up")
        self.stage.answer(B, LATE)
        for _ in range(2):
            self.hear(Silent("refused"))
        self.assertEqual((self.node.state, self.node.silence), ("down", "refused"))

    def test_a_process_that_was_started_again_is_told_of_at_the_first_sight_too(self):
        for _ in range(2):
            self.hear(metrics(1, restarts=2))
        self.assertEqual(self.told(), [("restarted", "gateway was started again (pid 1)")])
        self.assertEqual(self.watch.events[0]["at"], 1000.0)

    def test_only_the_newest_hundred_events_are_remembered(self):
        for number in range(150):
            self.watch.tell(float(number), "users", "up", f"event {number}")
        self.watch.tell(1.0, "users", "up", "an old one")
        self.watch.tell(149.0, "users", "up", "event 149")  # the same as before
        self.assertEqual([event["text"] for event in self.watch.events],
                         [f"event {number}" for number in range(149, 49, -1)])


class UnintelligibleTest(WatchTest):
    """Nothing that a process answers may cause more than that it counts as down."""

    def assert_down(self, *answers, **more):
        self.watch_at(A)
        self.hear(metrics(1))
        for _ in range(2):
            self.hear(*answers, **more)
        self.assertEqual(self.watch.memory.traces(), {})
        self.assertEqual((self.node.state, self.node.silence), ("down", "unintelligible"),
                         f"after {answers} {more}")

    def test_a_node_with_unusable_metrics_is_down(self):
        for text in ("<html>", "\ud800", metrics(1) + "a{} x", "a 1",
                     metrics(1).replace('"1"', '"x"'), metrics(1).replace('pid="1"', 'x="1"'),
                     metrics(1) + 'microshop_process_info{service="b",pid="2"} 1\n'):
            with self.subTest(text):
                self.assert_down(text)

    def test_a_node_with_unusable_traces_is_down(self):
        for text in ("", "<html>", '{"a":1}', "[1]", "null", "[{", "[" * 100_000, "9" * 10_000,
                     "\ud800", '[{"traceId":NaN}]'):
            with self.subTest(text[:50]):
                self.assert_down(metrics(1), traces=text)

    def test_traces_that_do_not_come_are_no_reason_to_call_a_node_down(self):
        self.hear(metrics(1))
        for _ in range(3):
            self.hear(metrics(1), traces=LATE)
        self.assertEqual(self.node.state, "up")


class BreakerTest(WatchTest):
    def test_a_breaker_that_opened_and_closed_between_two_rounds_is_told_of(self):
        self.hear(metrics(1, *breakers(2, 2, 2)))
        self.hear(metrics(1, *breakers(3, 4, 3)))
        at = "gateway: the circuit breaker for users at http://127.0.0.1:3001"
        self.assertEqual(self.told(), [
            ("breaker", f"{at} opened"),
            ("breaker", f"{at} is half-open: a request probes the instance (2 times)"),
            ("breaker", f"{at} closed")])
        for answer in (LATE, metrics(1, *breakers(3, 4, 3)), LATE):
            self.hear(answer)
            self.assertEqual(len(self.told()), 3, "each change is told of once")

    def test_its_present_state_is_told_of_last(self):
        self.hear(metrics(1, *breakers()))
        self.hear(metrics(1, *breakers(2, 1, 0, "open")))
        self.assertRegex(self.told()[-1][1], r"opened \(2 times\)$")

    def test_what_it_did_before_the_first_round_or_in_a_pause_has_no_time_and_is_not_told(self):
        self.hear(metrics(1, *breakers(1, 1, 1)))
        self.hear(metrics(1, *breakers(2, 2, 2)), after=3600.0)
        self.assertEqual(self.told(), [])

    def test_what_it_did_in_a_process_that_was_just_started_is_told_of(self):
        self.hear(metrics(1, *breakers()))
        self.hear(metrics(2, *breakers(1, state="open"), started=1001.0, restarts=1))
        self.assertEqual([kind for kind, _ in self.told()], ["restarted", "breaker"])

    def test_a_process_that_answers_twice_in_a_round_does_not_count_twice(self):
        self.hear(metrics(1, *breakers()))
        self.hear(metrics(2, *breakers(), started=999.0))
        self.hear(metrics(1, *breakers(1, state="open")))
        self.hear(metrics(1, *breakers(1, state="open")))
        self.assertEqual(len(self.told()), 1)


class FetchTest(unittest.TestCase):
    """What real connections do."""

    def silence(self, answer, seconds=PATIENCE):
        """Return how a stub that answers so is silent."""
        with upstream(answer) as url, self.assertRaises(Silent) as caught:
            ask(url, time.monotonic() + seconds)
        return str(caught.exception)

    def answering(self, message):
        def answer(connection):
            read_request(connection)
            connection.sendall(message)
        return answer

    def test_the_body_of_an_answer_is_returned(self):
        requests = []

        def answer(connection):
            requests.append(read_request(connection))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na 1")

        with upstream(answer) as url:
            for _ in range(2):
                self.assertEqual(fetch(f"{url}/metrics", time.monotonic() + PATIENCE), b"a 1")
        self.assertEqual(len(requests), 2)
        self.assertRegex(requests[0],
                         rb"(?i)\AGET /metrics HTTP/1\.1\r\n(.*\r\n)*connection: close")

    def test_a_process_that_is_not_there_refuses(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with self.assertRaisesRegex(Silent, "^refused$"):
            fetch(f"http://127.0.0.1:{port}/metrics", time.monotonic() + PATIENCE)

    def test_a_name_stands_for_all_its_addresses(self):
        self.assertIn("http://127.0.0.1:3000", find_addresses("http://localhost:3000", Resolver()))
        for url, address in (("http://127.0.0.2:80", "http://127.0.0.2:80"),
                             ("http://127.0.0.2", "http://127.0.0.2:80"),
                             ("http://[::2]:3000", "http://[::2]:3000")):
            self.assertEqual(find_addresses(url, Resolver()), [address])

    def test_a_process_that_hangs_or_sends_slowly_does_not_answer_in_time(self):
        def drip(connection):
            read_request(connection)
            while connection.send(b"H"):
                time.sleep(0.01)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            with self.assertRaisesRegex(Silent, "^no answer in time$"):
                fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", time.monotonic() + 0.05)
        self.assertEqual(self.silence(drip, 0.1), "no answer in time")

    def test_what_is_not_http_or_too_large_is_unintelligible(self):
        large = b"x" * (connections.MAX_REPLY + 1)
        for message in (b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
                        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(large), large)):
            with self.subTest(message[:50]):
                self.assertEqual(self.silence(self.answering(message)), "unintelligible")

    def test_a_token_is_sent_if_there_is_one(self):
        requests = []

        def answer(connection):
            requests.append(read_request(connection).lower())
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        with upstream(answer) as url:
            for token in ("s3cret", ""):
                fetch(url, time.monotonic() + PATIENCE, token)
        self.assertIn(b"\r\nauthorization: bearer s3cret\r\n", requests[0])
        self.assertNotIn(b"authorization", requests[1])

    def test_metrics_and_traces_are_both_asked_with_the_token(self):
        requests = []

        def answer(connection):
            requests.append(read_request(connection).lower())
            body = b"[]" if b" /traces " in requests[-1] else metrics().encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b"
                               % (len(body), body))

        with upstream(answer) as url:
            ask(url, time.monotonic() + PATIENCE, "s3cret")
        self.assertEqual([request.split()[1] for request in requests], [b"/metrics", b"/traces"])
        for request in requests:
            self.assertIn(b"\r\nauthorization: bearer s3cret\r\n", request)

    def test_a_connection_that_breaks_counts_as_refused(self):
        for message in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"):
            with self.subTest(message):
                self.assertEqual(self.silence(self.answering(message)), "refused")

    def test_any_status_but_200_is_named(self):
        for status, silence in ((b"503 Busy", "answered 503"), (b"403 Forbidden", (
                "answered 403 (set --token-file or MICROSHOP_TOKEN to the shop's token)"))):
            message = b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status
            self.assertEqual(self.silence(self.answering(message)), silence)


if __name__ == "__main__":
    unittest.main()
