"""The README tells the truth: what its commands print, and how long the house is."""
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from argparse import ArgumentParser, Namespace

from tests.helpers import TOP, Answered, ask, process

README = (TOP / "README.md").read_text()
COMMANDS = [tuple(part.split("\n", 1)) for block in re.findall(r"```console\n(.*?)```", README, re.S)
            for part in re.split(r"^\$ ", block, flags=re.M)[1:]]  # (command, what it prints)

CURL = ArgumentParser()
CURL.add_argument("url")
CURL.add_argument("-i", action="store_true")
CURL.add_argument("-H", action="append", default=[])
CURL.add_argument("-X")
CURL.add_argument("-d")


def pattern_of(printed: str) -> str:
    """Return a pattern for a text in which `...`, ports, pids and times may differ."""
    pattern = re.escape(printed).replace(r"\.\.\.", ".+")
    pattern = re.sub(r"pid\\ \d+", r"pid \\d+", pattern)
    return re.sub(r"\d\\\.\d\d\\ s", r"\\d+\\.\\d\\d\\ s", re.sub(r"localhost:\d+", r"localhost:\\d+", pattern))


class ReadmeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.shop = cls.enterClassContext(process("microshop.run_all", "--data", cls.folder, "--port", "0"))
        cls.shop.wait_for("ready in")
        cls.lines = cls.shop.lines.copy()

    def test_run_all_prints_what_is_promised(self):
        printed, = (printed for command, printed in COMMANDS if command == "python -m microshop.run_all")
        promised = printed.strip().split("\n")
        self.assertEqual(len(self.lines), len(promised))
        for line in promised[:-1]:  # the services may be quicker than each other
            self.assertTrue(any(re.fullmatch(pattern_of(line), given) for given in self.lines), line)
        self.assertRegex(self.lines[-1], f"^{pattern_of(promised[-1])}$")

    def curl(self, arguments: Namespace) -> Answered:
        """Ask what a curl command asks."""
        headers = dict(field.split(": ", 1) for field in arguments.H)
        method = arguments.X or ("POST" if arguments.d else "GET")
        return ask(self.shop.port("API Gateway"), method, arguments.url.removeprefix("localhost:3000"), headers,
                   arguments.d and arguments.d.encode())

    def test_curl_and_the_audit_print_what_is_promised_one_after_another(self):
        tried = []
        for command, printed in COMMANDS:
            program, *arguments = shlex.split(command)
            with self.subTest(command):
                if program == "curl":
                    arguments = CURL.parse_args(arguments)
                    answer, expected = self.curl(arguments), printed.strip()
                    if arguments.i:
                        head, _, expected = expected.partition("\n\n")
                        status, *fields = head.split("\n")
                        self.assertEqual(int(status.split()[1]), answer.status)
                        for name, value in (field.split(": ", 1) for field in fields):
                            self.assertEqual(answer.headers[name.lower()], value)
                    self.assertRegex(answer.body.decode(), f"^{pattern_of(expected)}$")
                elif command == "python -m microshop.audit":
                    audit = subprocess.run([sys.executable, "-m", "microshop.audit", "--data", self.folder],
                                           cwd=TOP, capture_output=True, text=True)
                    self.assertEqual(audit.stdout.replace(self.folder, "data").strip(), printed.strip())
                else:
                    continue
                tried.append(program)
        self.assertGreater(tried.count("curl"), 18)
        self.assertIn("python", tried)

    def test_make_knows_each_command_that_is_shown(self):
        rules = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.M)
        shown = re.findall(r"^\$ make ([a-z-]+)|`make ([a-z-]+)`", README, re.M)
        self.assertTrue(shown)
        for names in shown:
            self.assertIn("".join(names), rules)

    def test_every_module_it_names_is_there(self):
        for name in re.findall(r"`(?:microshop/)?([a-z_/]+\.py)`", README):
            with self.subTest(name):
                self.assertTrue(any((TOP / folder / name).exists()
                                    for folder in ("microshop", "microshop/chassis", "tests", "tests/chassis")))


if __name__ == "__main__":
    unittest.main()
