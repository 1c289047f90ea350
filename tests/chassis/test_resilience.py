"""Circuit breaker, bulkhead and retry budget, tested by replaying histories."""
import random
import threading
import unittest

from microshop.chassis.resilience import Bulkhead, CircuitBreaker, RetryBudget
from tests.helpers import PATIENCE, wait_until


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class BreakerTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.breaker = CircuitBreaker(self.clock)

    def live_through(self, history):
        """Replay a history: a number is so many seconds, "+" and "-" are calls that succeed and fail."""
        for event in history:
            if isinstance(event, float):
                self.clock.now += event
                continue
            for outcome in event:
                self.assertTrue(self.breaker.admits(), history)
                self.breaker.end(self.breaker.begin(), outcome == "+")

    def test_its_state_follows_from_its_history(self):
        for history, state in [
            ([], "closed"), (["----"], "closed"), (["-----"], "open"),
            (["----+----"], "closed"), (["+++++++----", 100.0, "-"], "open"),  # in a row, however long it takes
            (["+-" * 9], "closed"), (["+-" * 10], "open"), (["++-" * 20], "closed"),
            (["++++++++++", "-+-+-+-+-+-+-+-+-+-"], "open"),  # half of the last twenty
            (["-----", 0.49], "open"), (["-----", 0.5], "half-open"), (["-----", 99.0], "half-open"),
            (["-----", 0.5, "+"], "closed"), (["-----", 0.5, "+----"], "closed"), (["-----", 0.5, "+-----"], "open"),
            (["-----", 0.5, "-"], "open"), (["-----", 0.5, "-", 0.99], "open"), (["-----", 0.5, "-", 1.0], "half-open"),
            (["-----", 0.5, "-", 1.0, "+"], "closed"), (["-----", 0.5, "-", 1.0, "-", 1.99], "open"),
            (["-----", 0.5, "-", 1.0, "+", "-----", 0.5], "half-open"),  # the pauses begin anew
            (["-----", 0.5, "-", 1.0, "-", 2.0, "-", 4.0, "-", 8.0, "-", 9.99], "open"),
            (["-----", 0.5, "-", 1.0, "-", 2.0, "-", 4.0, "-", 8.0, "-", 10.0, "-", 10.0], "half-open"),
        ]:
            with self.subTest(history=history):
                self.setUp()
                self.live_through(history)
                self.assertEqual(self.breaker.state, state)
                self.assertEqual(self.breaker.admits(), state != "open")

    def test_while_open_it_tells_how_long_it_will_be(self):
        self.assertEqual(self.breaker.remaining(), 0)
        self.live_through(["-----", 0.25])
        self.assertEqual(self.breaker.remaining(), 0.25)
        self.clock.now += 1
        self.assertEqual(self.breaker.remaining(), 0)

    def test_one_probe_passes_at_a_time(self):
        self.live_through(["-----", 0.5])
        ticket = self.breaker.begin()
        self.clock.now += 100
        self.assertFalse(self.breaker.admits())
        self.assertEqual(self.breaker.state, "half-open")
        self.breaker.end(ticket, None)  # it showed nothing: another may
        self.assertEqual((self.breaker.admits(), self.breaker.state), (True, "half-open"))
        self.breaker.end(self.breaker.begin(), True)
        self.assertEqual(self.breaker.state, "closed")

    def test_what_shows_nothing_counts_for_nothing(self):
        for outcome in (False, False, False, False, None, False):
            self.assertEqual(self.breaker.state, "closed")
            self.breaker.end(self.breaker.begin(), outcome)
        self.assertEqual(self.breaker.state, "open")

    def test_a_call_that_began_in_another_state_counts_for_nothing(self):
        late = [self.breaker.begin() for _ in range(10)]
        self.live_through(["-----"])
        self.breaker.end(late.pop(), True)
        self.assertEqual(self.breaker.state, "open")
        self.clock.now += 0.5
        self.breaker.begin()
        for outcome in (True, False, None):
            self.breaker.end(late.pop(), outcome)
            self.assertFalse(self.breaker.admits())
        self.setUp()
        late = [self.breaker.begin() for _ in range(5)]
        self.live_through(["-----", 0.5, "+"])
        for ticket in late:
            self.breaker.end(ticket, False)
        self.assertEqual(self.breaker.state, "closed")


class RetryBudgetTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.budget = RetryBudget(self.clock)

    def call(self, times):
        for _ in range(times):
            self.budget.note_call()

    def take_all(self):
        return sum(iter(self.budget.take, False))

    def test_a_quiet_shop_may_retry_a_little(self):
        self.assertEqual(self.take_all(), 3)
        self.clock.now += 9.9
        self.assertEqual(self.take_all(), 0)
        self.clock.now += 0.1
        self.assertEqual(self.take_all(), 3)

    def test_retries_are_a_tenth_of_the_calls_of_the_last_ten_seconds(self):
        self.call(100)
        self.assertEqual(self.take_all(), 10)
        self.clock.now += 5
        self.call(55)
        self.assertEqual(self.take_all(), 5)
        self.clock.now += 5  # the hundred are forgotten, and the retries then
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
        for number, end in enumerate(retries, start=1):
            within = [sum(int(moment) in range(int(end) - 9, int(end) + 1) and moment <= end for moment in moments)
                      for moments in (calls, retries[:number])]
            self.assertLessEqual(within[1], max(3, within[0] / 10))
        self.assertGreater(len(retries), 100)

    def test_it_remembers_ten_seconds_and_no_more(self):
        for _ in range(1000):
            self.clock.now += 1
            self.budget.note_call()
        self.assertEqual(len(self.budget._seconds), 10)


class SlotsTest(unittest.TestCase):
    def test_so_many_may_be_taken_and_one_that_is_given_back_may_be_taken_again(self):
        slots = Bulkhead(2)
        self.assertEqual([slots.acquire(0) for _ in range(3)], [True, True, False])
        slots.release()
        self.assertEqual([slots.acquire(0.001) for _ in range(2)], [True, False])

    def test_who_waits_for_longest_is_next_and_no_newcomer_passes_it(self):
        slots, order = Bulkhead(1), []
        slots.acquire(0)

        def wait(name):
            if slots.acquire(PATIENCE):
                order.append(name)
                slots.release()

        threads = []
        for name in range(20):
            threads.append(threading.Thread(target=wait, args=(name,)))
            threads[-1].start()
            wait_until(lambda: len(slots._line) == len(threads))
        slots.release()
        order.append("newcomer" if slots.acquire(0) else "nobody")
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual([name for name in order if name != "nobody"][:20], list(range(20)))

    def test_a_slot_that_comes_just_as_the_wait_ends_is_not_lost(self):
        slots = Bulkhead(1)
        for _ in range(200):
            self.assertTrue(slots.acquire(0))
            waiting = threading.Thread(target=lambda: slots.acquire(0.0005) and slots.release())
            waiting.start()
            threading.Event().wait(0.0005)
            slots.release()
            waiting.join(PATIENCE)
        self.assertTrue(slots.acquire(0))


if __name__ == "__main__":
    unittest.main()
