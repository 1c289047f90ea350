"""When a child is started, killed and given up, and how its output is read."""
import math
import queue
import socket
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis import child as module
from microshop.chassis.child import Child, Event, RestartPolicy
from tests.chassis.test_resilience import Clock
from tests.helpers import PATIENCE


class RestartPolicyTest(unittest.TestCase):
    """Each history is a list: a number lets seconds pass, and a word is what happens to the child.

    Pauses are as long as jitter can make them.
    """

    def setUp(self):
        self.clock = Clock()
        self.policy = RestartPolicy(self.clock, jitter=lambda least, most: most)

    def replay(self, *history):
        """Return what the policy asks for after a history."""
        self.setUp()
        policy = self.policy
        happen = {
            "start": policy.note_start,
            "ready": policy.note_ready,
            "heartbeat": policy.note_heartbeat,
            "kill": policy.note_kill,
            "end": policy.note_end,
            "final end": lambda: policy.note_end(is_final=True),
        }
        for event in history:
            if isinstance(event, float):
                self.clock.now += event
            else:
                happen[event]()
        return policy.next_action()

    def assert_actions(self, *cases):
        """Check cases of (history, action)."""
        for history, action in cases:
            with self.subTest(history=history):
                self.assertEqual(self.replay(*history), action, f"after {history}")

    def test_a_child_is_started_once(self):
        self.assert_actions(
            ([], "start"),
            (["start"], ""),
            (["start", "ready"], ""))

    def test_a_child_that_sends_no_heartbeat_while_it_starts_is_killed_once(self):
        self.assert_actions(
            (["start", 10.0], ""),
            (["start", 10.1], "kill"),
            (["start", 10.1, "kill"], ""),
            (["start", 10.1, "kill", 99.0], ""),
            (["start", 9.0, "ready", 9.0], ""))

    def test_a_child_that_starts_slowly_is_not_killed_while_it_sends_heartbeats(self):
        slow = ["start", *[9.0, "heartbeat"] * 100]
        self.assert_actions(
            ([*slow, 10.0], ""),
            ([*slow, 10.1], "kill"))

    def test_a_child_that_sends_no_heartbeat_for_too_long_is_killed_once(self):
        self.assert_actions(
            (["start", "ready", 10.0], ""),
            (["start", "ready", 10.1], "kill"),
            (["start", "ready", 10.1, "heartbeat"], ""),
            (["start", "ready", 9.0, "heartbeat", 9.0, "heartbeat", 10.1], "kill"),
            (["start", "ready", 10.1, "kill", 99.0], ""))

    def test_a_child_that_ends_is_started_again_after_a_pause_that_doubles(self):
        twice = ["start", "ready", "end", 0.2, "start", "ready", 9.0, "heartbeat", "end"]
        often = ["start", "ready", "end"] * 20
        self.assert_actions(
            (["start", "ready", "end"], ""),
            (["start", "ready", "end", 0.19], ""),
            (["start", "ready", "end", 0.2], "start"),
            (["start", "ready", "end", 0.2, "start", "ready", "end"], ""),
            ([*twice, 0.39], ""),
            ([*twice, 0.4], "start"),
            ([*often, 9.9], ""),
            ([*often, 10.0], "start"))

    def test_the_pauses_of_a_child_that_crashes_as_soon_as_it_is_ready_double(self):
        pauses = []
        for _ in range(8):
            self.policy.note_start()
            self.policy.note_ready()
            self.policy.note_end()
            pauses.append(self.policy.pause)
        self.assertEqual(pauses, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0], "seconds that a child "
                         "stays down each time it crashes, as soon as it is ready")

    def test_the_pause_is_short_again_after_a_healthy_time(self):
        often = ["start", "ready", "end"] * 20
        self.assert_actions(
            ([*often, "start", "ready", 10.0, "heartbeat", "end", 0.2], "start"),
            ([*often, "start", "ready", 10.0, "heartbeat", 11.0, "kill", "end", 0.2], "start"))

    def test_time_without_a_heartbeat_is_not_healthy(self):
        often = ["start", "ready", "end"] * 20
        self.assert_actions(([*often, "start", "ready", 11.0, "kill", "end", 9.9], ""))

    def test_a_child_is_given_up_after_five_failed_starts_in_a_row(self):
        failed = ["start", "end", 10.0]
        killed = ["start", 10.1, "kill", "end", 10.0]
        self.assert_actions(
            (failed * 4, "start"),
            (failed * 5, "give up"),
            (killed * 4, "start"),
            (killed * 5, "give up"))

    def test_a_child_is_given_up_at_once_if_its_first_end_is_final(self):
        self.assert_actions(
            (["start", "final end"], "give up"),
            (["start", "ready", "final end", 0.2], "start"))

    def test_a_child_that_has_once_been_ready_is_never_given_up(self):
        was_ready = ["start", "ready", "end", 10.0]
        self.assert_actions(
            ([*was_ready, *["start", "end", 10.0] * 20], "start"),
            ([*was_ready, *["start", 10.1, "kill", "end", 10.0] * 20], "start"),
            ([*was_ready, "start", "final end", 10.0], "start"))

    def test_a_child_that_is_optional_is_never_given_up(self):
        self.policy = RestartPolicy(self.clock, lambda least, most: most, is_optional=True)
        for is_final in [False] * 5 + [True] * 5:
            self.policy.note_start()
            self.policy.note_end(is_final)
            self.assertEqual(self.policy.next_action(), "", "in the pause after a failed start")
            self.clock.now += 10.0
            self.assertEqual(self.policy.next_action(), "start", "after the pause")

    def test_a_new_process_has_its_own_time_to_start_and_its_own_heartbeats(self):
        self.assert_actions(
            (["start", "ready", 9.0, "start", 9.0], ""),
            (["start", "ready", "start", "ready", 10.1], "kill"))

    def test_pauses_have_jitter_within_their_bounds(self):
        policy = RestartPolicy(self.clock)
        for _ in range(20):
            policy.note_end()
            self.assertGreaterEqual(policy.pause, 0.1)
            self.assertLessEqual(policy.pause, 10)
        self.assertGreaterEqual(policy.pause, 5, "the pause after 20 ends in a row")

    def test_a_child_that_never_stays_up_can_be_started_again_forever(self):
        self.replay(*["start", "ready", "end"] * 2000)
        self.assertEqual(self.policy.pause, 10.0, "seconds before the next start")

    def test_first_pauses_differ(self):
        pauses = set()
        for _ in range(20):
            policy = RestartPolicy(self.clock)
            policy.note_end()
            pauses.add(policy.pause)
        self.assertGreater(len(pauses), 1, "20 first pauses are all the same: there is no jitter")
        self.assertLessEqual(max(pauses), 0.2)


class ProcessTest(unittest.TestCase):
    """Processes of a module that is written here, and finds its sockets in its flags."""

    def start(self, code: str, **environment: str) -> Child:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        (Path(folder) / "stub.py").write_text(code)
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        child = Child("stub", "stub", listener, ["--flag"], {"PYTHONPATH": folder, **environment})
        self.events, self.has_ended = queue.Queue(), False
        self.sentence = child.start(self.events.put)
        self.addCleanup(child.current.close)
        self.addCleanup(self.events_until_end, child)
        self.addCleanup(child.current.kill)
        return child

    def next_event(self) -> Event:
        event = self.events.get(timeout=PATIENCE)
        self.has_ended = event.status is not None
        return event

    def events_until_end(self, child: Child) -> list[Event]:
        """Return the events of a child; its output counts as shown."""
        events = []
        while not self.has_ended:
            child.current.unshown.release()
            events.append(self.next_event())
        return events

    def test_its_pid_is_told(self):
        child = self.start("")
        self.assertEqual(self.sentence, f"started stub (pid {child.current.popen.pid})")

    def test_its_output_comes_in_whole_lines_and_then_its_exit_status(self):
        child = self.start("print('one')\nprint('two', end='', flush=True)\nraise SystemExit(7)")
        *outputs, end = self.events_until_end(child)
        self.assertEqual(b"\n".join(event.output for event in outputs), b"one\ntwo")
        self.assertEqual(end, Event(child, child.current, status=7))

    def test_a_line_that_is_too_long_comes_in_pieces(self):
        with mock.patch.object(module, "MAX_LINE", 100_000):
            child = self.start("print('x' * 250_000)")
            *outputs, _ = self.events_until_end(child)
        self.assertGreater(len(outputs), 1, "the line came in one piece")
        self.assertEqual(b"".join(event.output for event in outputs), b"x" * 250_000)

    def test_a_process_waits_while_its_output_is_not_shown(self):
        child = self.start("while True: print('x' * 70_000)")
        for _ in range(module.MAX_UNSHOWN):
            self.next_event()
        self.assertFalse(child.current.unshown.acquire(blocking=False))
        child.current.unshown.release()
        self.next_event()  # as soon as a block is shown, the next one comes

    def test_a_heartbeat_is_seen_once(self):
        child = self.start("import socket, sys\n"
                           "sockets = sys.argv[sys.argv.index('--supervised') + 1]\n"
                           "heartbeats = socket.socket(fileno=int(sockets.split(',')[1]))\n"
                           "heartbeats.send(b'.')\n"
                           "print('sent')\n"
                           "heartbeats.recv(1)")
        process = child.current
        self.assertEqual(self.next_event().output, b"sent")
        self.assertTrue(process.has_sent_heartbeat())
        self.assertFalse(process.has_sent_heartbeat(), "the same heartbeat was seen again")

    def test_it_is_the_first_of_a_session_of_its_own(self):
        child = self.start("import os; print(os.getsid(0))")
        self.assertEqual(int(self.next_event().output), child.current.popen.pid)

    def test_a_process_that_is_replaced_is_told_so_before_it_is_asked_to_end(self):
        child = self.start("import signal, socket, sys\n"
                           "sockets = sys.argv[sys.argv.index('--supervised') + 1]\n"
                           "supervisor = socket.socket(fileno=int(sockets.split(',')[1]))\n"
                           "def end(*_):\n"
                           "    supervisor.setblocking(False)\n"
                           "    sys.exit(6 + len(supervisor.recv(10)))\n"
                           "signal.signal(signal.SIGTERM, end)\n"
                           "print('started')\n"
                           "signal.pause()")
        self.next_event()
        child.current.replace(math.inf)
        *_, end = self.events_until_end(child)
        self.assertEqual(end.status, 7, "it should find one byte when SIGTERM comes")

    def test_a_process_ignores_sighup_from_its_first_moment(self):
        self.start("import os, signal\n"
                   "from microshop.chassis import surroundings\n"
                   "os.kill(os.getpid(), signal.SIGHUP)\n"
                   "surroundings.prepare()\n"
                   "os.kill(os.getpid(), signal.SIGHUP)\n"
                   "print('goes on')")
        self.assertEqual(self.next_event().output, b"goes on")

    def test_it_gets_the_flags_and_environment_of_its_child(self):
        child = self.start("import os, sys\n"
                           "print(sys.argv[-1], os.environ['A'], 'HOME' in os.environ)", A="1")
        host, port = child.listener.getsockname()
        self.assertEqual(self.next_event().output, b"--flag 1 False")
        self.assertEqual(child.current.popen.args[-5:],
                         ["--host", host, "--port", str(port), "--flag"])


class ChildTest(unittest.TestCase):
    """A child whose processes are stand-ins."""

    def setUp(self):
        self.child = Child("users", "stub", mock.Mock(), [], {})
        self.process = self.begin()

    def begin(self):
        """Give the child a new process, as start() does."""
        process = mock.Mock(is_ending=False)
        self.child.former, self.child.current = self.child.current, process
        self.child.policy.note_start()
        return process

    def print_url(self, process):
        return self.child.note_output(process, b"Users service listening at http://localhost:3001")

    def test_the_line_that_names_its_url_makes_it_ready_once(self):
        self.assertFalse(self.child.note_output(self.process, b"warning: about to listen"))
        self.assertTrue(self.print_url(self.process))
        self.assertEqual((self.child.policy.state, self.child.url), ("up", "http://localhost:3001"))
        self.assertFalse(self.print_url(self.process))

    def test_whatever_words_name_its_url_but_no_line_of_its_log(self):
        log = b"2026-11-22T20:25:41.123Z - cannot reach what should be at http://localhost:3001"
        self.assertFalse(self.child.note_output(self.process, log))
        self.assertTrue(self.child.note_output(self.process, log + b"\nMap at http://a:1\n" + log))
        self.assertEqual(self.child.url, "http://a:1")

    def test_a_former_process_does_not_make_it_ready(self):
        self.print_url(self.process)
        self.begin()
        self.assertFalse(self.print_url(self.process))
        self.assertEqual(self.child.policy.state, "starting")

    def test_its_last_five_lines_are_kept(self):
        self.child.note_output(self.process, b"1\n2\n3")
        self.child.note_output(self.process, b"4\n5\n6\n7")
        self.assertEqual(list(self.child.last_lines), [b"3", b"4", b"5", b"6", b"7"])

    def test_an_end_before_it_was_ready_is_told_as_such(self):
        self.assertRegex(self.child.note_end(self.process, 1),
                         r"^users ended with exit status 1 before it was ready; "
                         r"starting it again in 0\.\d s$")

    def test_a_signal_that_killed_it_is_told_with_the_status_that_a_shell_shows(self):
        self.print_url(self.process)
        self.assertRegex(self.child.note_end(self.process, -9),
                         r"^users was killed by signal 9 \(exit status 137\); starting it again")
        self.assertIsNone(self.child.current)

    def test_what_it_has_started_is_killed_when_it_ends(self):
        self.child.note_end(self.process, 0)
        self.process.kill.assert_called()
        self.process.close.assert_called()

    def test_an_end_after_which_it_is_given_up_is_not_told_as_a_restart(self):
        self.assertEqual(self.child.note_end(self.process, module.BAD_SETTING), "")
        self.assertEqual(self.child.policy.next_action(), "give up")

    def test_where_a_replacement_fails_the_former_process_keeps_running(self):
        self.print_url(self.process)
        replacement = self.begin()
        self.assertEqual(self.child.note_end(replacement, 1),
                         "users ended with exit status 1 before it was ready; "
                         "the old process keeps running, and no further process is replaced")
        self.assertEqual((self.child.current, self.child.former), (self.process, None))
        self.assertEqual(self.child.policy.state, "up")

    def test_where_a_former_process_ends_the_new_one_goes_on_in_silence(self):
        self.print_url(self.process)
        replacement = self.begin()
        self.assertEqual(self.child.note_end(self.process, 0), "")
        self.assertEqual((self.child.current, self.child.former), (replacement, None))

    def test_its_processes_are_counted(self):
        silent = mock.MagicMock()
        with mock.patch.object(module, "Process", side_effect=[silent, OSError, silent]):
            counts = [(self.child.start(mock.Mock()), self.child.starts)[1] for _ in range(3)]
        self.assertEqual(counts, [1, 1, 2], "the second one could not be started")

    def test_a_process_that_the_system_refuses_counts_as_a_failed_start(self):
        self.child.current = None
        failed = self.child.policy.failed_starts
        with mock.patch.object(module, "Process", side_effect=OSError(24, "Too many open files")):
            sentence = self.child.start(mock.Mock())
        self.assertRegex(sentence, r"^users could not be started: Too many open files; "
                                   r"trying again in 0\.\d s$")
        self.assertEqual(self.child.policy.failed_starts, failed + 1)

    def test_a_replacement_that_the_system_refuses_leaves_all_as_it_was(self):
        self.print_url(self.process)
        with mock.patch.object(module, "Process", side_effect=OSError(24, "Too many open files")):
            sentence = self.child.start(mock.Mock())
        self.assertEqual(sentence, "a new process of users could not be started: "
                                   "Too many open files; the old one keeps running")
        self.assertEqual((self.child.current, self.child.policy.state), (self.process, "up"))

    def test_a_process_is_killed_if_there_is_no_thread_to_read_its_output(self):
        process = mock.Mock()
        with (mock.patch.object(module, "Process", return_value=process),
              mock.patch.object(module.threading.Thread, "start", side_effect=RuntimeError)):
            self.child.start(mock.Mock())
        process.kill.assert_called_once()


if __name__ == "__main__":
    unittest.main()
