"""Circuit breaker, bulkhead and retry budget, tested by replaying histories."""
import random
import threading
import unittest

from microshop.chassis.resilience import Bulkhead, CircuitBreaker, Outcome, RetryBudget
from tests.helpers import PATIENCE, wait_until

OUTCOMES = {"+": Outcome.SUCCEEDED, "-": Outcome.FAILED, "x": Outcome.BROKE, "?": Outcome.UNKNOWN}


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class CircuitBreakerTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.breaker = CircuitBreaker(self.clock)

    def replay(self, history):
        """Replay a history: numbers are seconds that pass, the rest are calls (see OUTCOMES).

        Return what the breaker says of its changes.
        """
        changes = []
        for event in history:
            if isinstance(event, float):
                self.clock.now += event
                continue
            for outcome in event:
                self.assertTrue(self.breaker.admits(), f"it opens too early in {history}")
                changes.append(self.breaker.end(self.breaker.begin(), OUTCOMES[outcome]))
        return [change for change in changes if change]

    def test_the_state_follows_from_the_history(self):
        half_of_twenty = ["++++++++++", "-+-+-+-+-+-+-+-+-+-"]
        closed_once = ["-----", 0.5, "-", 1.0, "+"]  # it failed, and recovered
        doubling = ["-----", 0.5, "-", 1.0, "-", 2.0, "-", 4.0, "-", 8.0, "-"]
        for history, state in [
            ([], "closed"),
            (["----"], "closed"),
            (["-----"], "open"),
            (["----+----"], "closed"),
            (["+++++++----", 100.0, "-"], "open"),  # five in a row, however long that takes
            (["+-" * 9], "closed"),
            (["+-" * 10], "open"),
            (["++-" * 20], "closed"),
            (half_of_twenty, "open"),
            (["-----", 0.49], "open"),
            (["-----", 0.5], "half-open"),
            (["-----", 99.0], "half-open"),
            (["-----", 0.5, "+"], "closed"),
            (["-----", 0.5, "+----"], "closed"),
            (["-----", 0.5, "+-----"], "open"),
            (["-----", 0.5, "-"], "open"),
            (["-----", 0.5, "-", 0.99], "open"),
            (["-----", 0.5, "-", 1.0], "half-open"),
            (closed_once, "closed"),
            (["-----", 0.5, "-", 1.0, "-", 1.99], "open"),
            ([*closed_once, "-----", 0.5], "half-open"),  # the first pause is short again
            ([*doubling, 9.99], "open"),
            ([*doubling, 10.0, "-", 10.0], "half-open"),  # no pause is longer than LAST_PAUSE
        ]:
            with self.subTest(history=history):
                self.setUp()
                self.replay(history)
                self.assertEqual(self.breaker.state, state)
                self.assertEqual(self.breaker.admits(), state != "open")

    def test_a_change_of_state_is_described_once(self):
        changes = self.replay(["-----", 0.5, "-", 1.0, "+", "+-" * 10])
        self.assertEqual(changes, [
            "opened for 0.5 s after 5 failures in a row",
            "opened again for 1 s: another failure",
            "closed: the probe succeeded",
            "opened for 0.5 s after 10 failures in 20 calls"])

    def test_probes_are_counted_from_one_after_each_change_of_state(self):
        for history, expected in ((["++"], 0), (["-----", 0.5, "?"], 1), (["?"], 2), (["+"], 0)):
            self.replay(history)
            self.assertEqual(self.breaker.probes, expected, f"after {history}")

    def test_an_open_breaker_says_how_long_it_stays_open(self):
        self.assertEqual(self.breaker.remaining(), 0)
        self.replay(["-----", 0.25])
        self.assertEqual(self.breaker.remaining(), 0.25)
        self.clock.now += 1
        self.assertEqual(self.breaker.remaining(), 0)

    def test_a_half_open_breaker_lets_one_probe_pass_at_a_time(self):
        self.replay(["-----", 0.5])
        [ticket, *others] = [self.breaker.begin() for _ in range(10) if self.breaker.admits()]
        self.assertEqual(len(others), 0, "calls that were let through beside the probe, when 10 "
                         "came after the pause")
        self.clock.now += 100
        self.assertEqual(self.breaker.admits(), False, "another call is let through, although the "
                         "probe has not ended")
        self.assertEqual(self.breaker.state, "half-open")
        self.breaker.end(ticket, Outcome.UNKNOWN)  # so another call may probe
        self.assertEqual((self.breaker.admits(), self.breaker.state), (True, "half-open"))
        self.replay(["+"])
        self.assertEqual(self.breaker.state, "closed")

    def test_an_outcome_that_says_nothing_does_not_count(self):
        self.replay(["----???"])
        self.assertEqual(self.breaker.state, "closed")
        self.replay(["-"])
        self.assertEqual(self.breaker.state, "open", "five failures in a row, apart from those")

    def test_connections_that_break_together_count_as_one_failure(self):
        for _ in range(4):
            in_flight = [self.breaker.begin() for _ in range(64)]
            for ticket in in_flight:
                self.breaker.end(ticket, Outcome.BROKE)
            self.assertEqual(self.breaker.state, "closed", "a process died; 64 calls noticed")
        self.replay(["x"])
        self.assertEqual(self.breaker.state, "open", "five processes died, one after another")

    def test_calls_that_time_out_together_count_each(self):
        in_flight = [self.breaker.begin() for _ in range(6)]
        self.breaker.end(in_flight.pop(), Outcome.BROKE)
        for ticket in in_flight[:4]:
            self.breaker.end(ticket, Outcome.FAILED)
        self.assertEqual(self.breaker.state, "open")

    def test_a_call_that_began_in_an_earlier_state_does_not_count(self):
        late = [self.breaker.begin() for _ in range(10)]
        self.replay(["-----"])
        self.breaker.end(late.pop(), Outcome.SUCCEEDED)
        self.assertEqual(self.breaker.state, "open")
        self.clock.now += 0.5
        self.breaker.begin()
        for outcome in Outcome:
            self.breaker.end(late.pop(), outcome)
            self.assertFalse(self.breaker.admits(), "its probe has not ended yet")
        self.setUp()
        late = [self.breaker.begin() for _ in range(5)]
        self.replay(["-----", 0.5, "+"])
        for ticket in late:
            self.breaker.end(ticket, Outcome.FAILED)
        self.assertEqual(self.breaker.state, "closed")


class RetryBudgetTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.budget = RetryBudget(self.clock)

    def call(self, times):
        for _ in range(times):
            self.budget.note_call()

    def take_all(self):
        """Take retries until there are none left; return their number."""
        return sum(iter(self.budget.take, False))

    def test_three_retries_in_ten_seconds_are_allowed_even_without_other_calls(self):
        self.assertEqual(self.take_all(), 3)
        self.clock.now += 9.9
        self.assertEqual(self.take_all(), 0)
        self.clock.now += 0.1
        self.assertEqual(self.take_all(), 3)

    def test_retries_are_at_most_a_tenth_of_the_calls_of_the_last_ten_seconds(self):
        self.call(100)
        self.assertEqual(self.take_all(), 10)
        self.clock.now += 5
        self.call(55)
        self.assertEqual(self.take_all(), 5)
        self.clock.now += 5  # the hundred calls and their retries no longer count
        self.assertEqual(self.take_all(), 0)
        self.call(45)
        self.assertEqual(self.take_all(), 5)

    def test_no_ten_seconds_see_more_than_a_tenth_whatever_the_load(self):
        dice, calls, retries = random.Random(7), [], []
        for _ in range(2000):
            self.clock.now += dice.choice((0, 0, 0, 0.01, 0.3, 2)) * dice.random()
            self.call(1)
            calls.append(self.clock.now)
            if dice.random() < 0.5 and self.budget.take():
                retries.append(self.clock.now)

        def count_in_window(moments, end):
            seconds = range(int(end) - 9, int(end) + 1)
            return sum(int(moment) in seconds and moment <= end for moment in moments)

        for number, end in enumerate(retries, start=1):
            allowed = max(3, count_in_window(calls, end) / 10)
            self.assertLessEqual(count_in_window(retries[:number], end), allowed,
                                 f"retries in the ten seconds before {end}")
        self.assertGreater(len(retries), 100, "too few retries to show anything")

    def test_no_more_than_ten_seconds_are_remembered(self):
        for _ in range(1000):
            self.clock.now += 1
            self.budget.note_call()
        self.assertEqual(len(self.budget._seconds), 10)


class BulkheadTest(unittest.TestCase):
    def test_at_most_count_slots_are_taken_at_a_time(self):
        bulkhead = Bulkhead(2)
        self.assertEqual([bulkhead.acquire(0) for _ in range(3)], [True, True, False])
        bulkhead.release()
        self.assertEqual([bulkhead.acquire(0.001) for _ in range(2)], [True, False])

    def test_waiters_are_served_first_come_first_served_and_no_newcomer_overtakes_them(self):
        bulkhead, order = Bulkhead(1), []
        bulkhead.acquire(0)

        def wait(name):
            if bulkhead.acquire(PATIENCE):
                order.append(name)
                bulkhead.release()

        threads = []
        for name in range(20):
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            wait_until(lambda: len(bulkhead._waiters) == len(threads))
        bulkhead.release()
        if bulkhead.acquire(0):
            order.append("newcomer")
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(order[:20], list(range(20)), "the order in which calls were let in")

    def test_a_slot_that_is_released_just_as_a_waiter_gives_up_is_not_lost(self):
        bulkhead = Bulkhead(1)

        def wait_briefly():
            if bulkhead.acquire(0.0005):
                bulkhead.release()

        for _ in range(200):
            self.assertTrue(bulkhead.acquire(0), "a slot was lost in an earlier round")
            waiting = threading.Thread(target=wait_briefly)
            waiting.start()
            threading.Event().wait(0.0005)
            bulkhead.release()
            waiting.join(PATIENCE)
        self.assertTrue(bulkhead.acquire(0), "a slot was lost")


if __name__ == "__main__":
    unittest.main()
