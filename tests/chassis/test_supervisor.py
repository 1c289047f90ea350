"""When a child process is started, killed and given up."""
import unittest

from microshop.chassis.supervisor import RestartPolicy
from tests.chassis.test_resilience import Clock


class LifeTest(unittest.TestCase):
    """Histories: a number is so many seconds, and a word what happens to the child. Jitter adds all it may."""

    def setUp(self):
        self.clock = Clock()
        self.life = RestartPolicy(self.clock, jitter=lambda least, most: most)

    def live_through(self, history):
        happen = {"start": self.life.note_start, "ready": self.life.note_ready, "sign": self.life.note_heartbeat,
                  "kill": self.life.note_kill, "end": self.life.note_end, "refuse": lambda: self.life.note_end(True)}
        for event in history:
            if isinstance(event, float):
                self.clock.now += event
            else:
                happen[event]()

    def test_what_is_to_be_done_follows_from_its_history(self):
        fail = ["start", "end", 10.0]
        for history, order in [
            ([], "start"), (["start"], ""), (["start", "ready"], ""),
            # it starts in time, or is killed
            (["start", 10.0], ""), (["start", 10.1], "kill"), (["start", 10.1, "kill"], ""),
            (["start", 10.1, "kill", 99.0], ""), (["start", 9.0, "ready", 9.0], ""),
            # it shows signs of life, or is killed
            (["start", "ready", 10.0], ""), (["start", "ready", 10.1], "kill"), (["start", "ready", 10.1, "sign"], ""),
            (["start", "ready", 9.0, "sign", 9.0, "sign", 10.1], "kill"), (["start", "ready", 10.1, "kill", 99.0], ""),
            # it ends, and is started again after a pause that doubles
            (["start", "ready", "end"], ""), (["start", "ready", "end", 0.19], ""),
            (["start", "ready", "end", 0.2], "start"), (["start", "ready", "end", 0.2, "start", "ready", "end"], ""),
            (["start", "ready", "end", 0.2, "start", "ready", 9.0, "sign", "end", 0.39], ""),
            (["start", "ready", "end", 0.2, "start", "ready", 9.0, "sign", "end", 0.4], "start"),
            ([*["start", "ready", "end"] * 20, 9.9], ""), ([*["start", "ready", "end"] * 20, 10.0], "start"),
            # and which begins anew after ten seconds of health
            ([*["start", "ready", "end"] * 20, "start", "ready", 10.0, "sign", "end", 0.2], "start"),
            ([*["start", "ready", "end"] * 20, "start", "ready", 10.0, "sign", 11.0, "kill", "end", 0.2], "start"),
            ([*["start", "ready", "end"] * 20, "start", "ready", 11.0, "kill", "end", 9.9], ""),  # not a sign of any
            # five failed starts in a row are enough
            (fail * 4, "start"), (fail * 5, "give up"), ([*fail * 4, "start", "ready", "end", 10.0, *fail], "start"),
            (["start", 10.1, "kill", "end", 10.0] * 4, "start"), (["start", 10.1, "kill", "end", 10.0] * 5, "give up"),
            # and one, where the child says that it can only fail
            (["start", "refuse"], "give up"), (["start", "ready", "refuse", 0.2], "start"),
            # one that replaces another, which goes on where that fails
            (["start", "ready", 9.0, "start", 9.0], ""), (["start", "ready", "start", "ready", 10.1], "kill"),
        ]:
            with self.subTest(history=history):
                self.setUp()
                self.live_through(history)
                self.assertEqual(self.life.order(), order)

    def test_pauses_have_jitter_within_their_bounds(self):
        life = RestartPolicy(self.clock)
        for _ in range(20):
            life.note_end()
            self.assertTrue(0.1 <= life.pause <= 10)
        self.assertTrue(5 <= life.pause)
        firsts = {(life := RestartPolicy(self.clock), life.note_end(), life.pause)[2] for _ in range(20)}
        self.assertGreater(len(firsts), 1)
        self.assertTrue(max(firsts) <= 0.2)


if __name__ == "__main__":
    unittest.main()
