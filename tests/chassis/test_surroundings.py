"""What a process does about the streams, signals and limits that it has inherited."""
import subprocess
import sys
import textwrap
import unittest

from tests.helpers import PATIENCE, TOP, clean_environment

CLOSED = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]


def run(code: str, inherited: str = "", before: list[str] | None = None) -> tuple[int, str]:
    """Run code in a process, after prepare(); return its exit status and what it printed.

    `inherited` runs first, in a process that then becomes this one by exec(); `before` is a command
    that does so.
    """
    prepared = ("import os, signal, socket, subprocess, sys\n"
                "from microshop.chassis import surroundings\n"
                "surroundings.prepare()\n" + textwrap.dedent(code))
    parent = f"import os, signal, sys\n{inherited}\nos.execv(sys.executable, sys.argv[1:])"
    command = [*(before or []), sys.executable, "-c", parent, sys.executable, "-c", prepared]
    done = subprocess.run(command, cwd=TOP, env=clean_environment(), capture_output=True, text=True,
                          timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr


class SurroundingsTest(unittest.TestCase):
    def test_no_socket_gets_the_number_of_a_closed_standard_stream(self):
        status, _ = run("sys.exit(socket.socket().fileno())", before=CLOSED)
        self.assertGreater(status, 2, "the number of a new socket")

    def test_printing_to_closed_standard_streams_is_harmless(self):
        status, _ = run("""
            for stream in (sys.stdout, sys.stderr):
                stream.write("nobody reads this")
                stream.flush()
            sys.exit(7)""", before=CLOSED)
        self.assertEqual(status, 7, "the exit status of a process that prints and exits with 7")

    def test_letters_that_the_encoding_of_the_terminal_lacks_are_printed_as_escapes(self):
        done = run("print('wéird'); print('päth', file=sys.stderr)",
                   "os.environ['PYTHONIOENCODING'] = 'ascii'")
        self.assertEqual(done, (0, "w\\xe9ird\np\\xe4th\n"))

    def test_the_exit_status_of_a_child_is_seen_although_the_parent_ignored_sigchld(self):
        done = run("print(subprocess.run(['sh', '-c', 'exit 7']).returncode)",
                   "signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
        self.assertEqual(done, (0, "7\n"))

    def test_a_sigterm_that_the_parent_has_blocked_ends_the_process(self):
        done = run("os.kill(os.getpid(), signal.SIGTERM)",
                   "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])")
        self.assertEqual(done, (143, ""))

    def test_ctrl_c_before_the_work_has_begun_prints_no_traceback(self):
        self.assertEqual(run("os.kill(os.getpid(), signal.SIGINT)"), (130, ""))

    def test_a_sighup_that_the_parent_ignored_or_blocked_is_ignored(self):
        for how in ("signal.signal(signal.SIGHUP, signal.SIG_IGN)",
                    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])\n"
                    "os.kill(os.getpid(), signal.SIGHUP)"):
            with self.subTest(how):
                done = run("os.kill(os.getpid(), signal.SIGHUP); print('goes on')", how)
                self.assertEqual(done, (0, "goes on\n"))

    def test_a_limit_that_the_system_does_not_raise_is_no_obstacle(self):
        done = run("""
            errors = [ValueError, PermissionError]
            def refuse(*_): raise errors.pop()
            surroundings.resource.setrlimit = refuse
            surroundings.prepare()
            print(errors)""")
        self.assertEqual(done, (0, "[]\n"), "setrlimit() should have failed twice")

    def test_a_system_that_knows_no_limit_but_has_one_gets_fewer_files(self):
        done = run("""
            wanted, unlimited = [], surroundings.resource.RLIM_INFINITY
            def set_limit(_, limits):
                wanted.append(limits[0])
                if limits[0] == unlimited: raise ValueError  # as on macOS
            surroundings.resource.getrlimit = lambda _: (256, unlimited)
            surroundings.resource.setrlimit = set_limit
            surroundings.prepare()
            print(wanted == [unlimited, surroundings.MOST_FILES])""")
        self.assertEqual(done, (0, "True\n"))


if __name__ == "__main__":
    unittest.main()
