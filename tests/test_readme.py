"""The README tells the truth: what its commands print, how large the layers are, what is where.

The commands in its ```console blocks are run in their order. Where the README prints `...`,
anything may come; and ports, times, pids and temporary folders may differ.
"""
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from argparse import ArgumentParser
from pathlib import Path

from microshop import GATEWAY_PORT, SERVICES
from microshop.gateway import Gateway
from tests.helpers import TOP, Answered, ask, clean_environment, process, service_of
from tests.source import LAYERS, size_of_layers

README = (TOP / "README.md").read_text()
TOLERANCES = {  # of the stated lines of code; a new service must not need another README for them
    "pattern": 0.1, "chassis": 0.05, "tools": 0.05, "tour": 0.05}
CURLS = 18        # commands at least, or this test has lost sight of the README's blocks

CURL = ArgumentParser("curl in the README", exit_on_error=False)
CURL.add_argument("url")
CURL.add_argument("-i", action="store_true")
CURL.add_argument("-s", action="store_true")
CURL.add_argument("-H", action="append", default=[])
CURL.add_argument("-X")
CURL.add_argument("-d")

TEMPORARY = r"\S*/microshop-\w+"  # a folder of run_all --fresh
VARIABLE = (r"localhost:\d+", r"127\.0\.0\.1:\d+", r"\d+\.\d\d s\b", r"\bpid \d+", TEMPORARY)


def read_commands() -> list[tuple[str, str]]:
    """Return each command in a ```console block, and what is printed below it."""
    commands = []
    for block in re.findall(r"(?ms)^ *```console\n(.*?)^ *```$", README):
        for part in re.split(r"(?m)^ *\$ ", block)[1:]:
            command, _, printed = part.replace("\\\n", "").partition("\n")
            commands.append((command.partition(" #")[0].strip(), printed.strip()))
    return commands


def pattern_of(printed: str) -> str:
    """Return a pattern for what a command may print."""
    pieces = re.split("(" + "|".join([r"\.\.\.", *VARIABLE]) + ")", printed)
    return "".join(map(pattern_of_piece, pieces))


def pattern_of_piece(piece: str) -> str:
    if piece == "...":
        return ".+"
    fixed = re.sub(r"(\\ )+\\\|", r"\\ +\\|", re.escape(piece))  # labels have the longest's width
    return next((pattern for pattern in VARIABLE if re.fullmatch(pattern, piece)), fixed)


COMMANDS = read_commands()
STARTS = re.compile(r"python -m microshop(\.run_all)?( |$)")


class ReadmeCommandsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.shop = cls.enterClassContext(
            process("microshop.run_all", "--fresh", "--port", "0", TMPDIR=cls.folder))
        cls.shop.wait_for("ready in")
        cls.shop.wait_for("Live picture at")  # the shop is ready without it
        cls.lines = cls.shop.lines.copy()
        titles = {GATEWAY_PORT: Gateway.title,
                  **{port: service_of(name).title for name, port in SERVICES.items()}}
        cls.ports = {str(port): cls.shop.port(title) for port, title in titles.items()}

    def test_run_all_prints_what_the_readme_shows(self):
        block = next(printed for command, printed in COMMANDS if STARTS.match(command))
        shown = block.split("\n")
        printed = "\n".join(self.lines)
        for line in shown:  # in any order: the processes start at the same time
            self.assertRegex(printed, f"(?m)^{pattern_of(line)}$", "a line in README.md")
        for line in self.lines:
            is_shown = any(re.fullmatch(pattern_of(each), line) for each in shown)
            is_of_a_new_service = any(name in line and name not in block for name in SERVICES)
            if not is_shown and not is_of_a_new_service:
                self.fail(f"run_all prints {line!r}, which README.md does not show")

    def test_curl_audit_and_kill_print_what_the_readme_shows_one_after_another(self):
        runs = {"curl": self.run_curl, "python": self.run_python, "kill": self.run_kill}
        tried = []
        for command, printed in COMMANDS:
            program, *arguments = shlex.split(command)
            if program == "make" or STARTS.match(command):
                continue
            with self.subTest(command):
                self.assertIn(program, runs, f"this test cannot run {command!r}")
                runs[program](arguments, printed)
                tried.append(program)
        self.assertGreater(tried.count("curl"), CURLS)
        self.assertIn("python", tried)

    def run_curl(self, arguments: list[str], expected: str) -> None:
        options = CURL.parse_args(arguments)
        answer = self.ask(options)
        if options.i:
            head, _, expected = expected.partition("\n\n")
            status, *fields = head.split("\n")
            self.assertEqual(f"HTTP/1.1 {answer.status}", " ".join(status.split()[:2]))
            for name, value in (field.split(": ", 1) for field in fields):
                self.assertRegex(answer.headers.get(name.lower(), "(none)"),
                                 f"^{pattern_of(value)}$", f"the header {name}")
        self.assertRegex(answer.body.decode(), f"^{pattern_of(expected)}$")

    def ask(self, options) -> Answered:
        """Send the request that a curl command sends."""
        port, target = re.fullmatch(r"(?:http://)?localhost:(\d+)(/.*)?", options.url).groups()
        headers = dict(field.split(": ", 1) for field in options.H)
        method = options.X or ("POST" if options.d else "GET")
        body = options.d.encode() if options.d else None
        return ask(self.ports[port], method, target or "/", headers, body)

    def run_python(self, arguments: list[str], expected: str) -> None:
        """Run it beside the shop's temporary folder, which is the only one that it can find."""
        [data] = Path(self.folder).glob("microshop-*")
        arguments = [re.sub(TEMPORARY, str(data), argument) for argument in arguments]
        urls = {f"MICROSHOP_{name.upper()}_URL": f"http://127.0.0.1:{self.ports[str(port)]}"
                for name, port in SERVICES.items()}
        environment = clean_environment(TMPDIR=self.folder, PYTHONPATH=str(TOP), **urls)
        done = subprocess.run([sys.executable, *arguments], cwd=self.folder, env=environment,
                              capture_output=True, text=True)
        self.assertRegex(done.stdout.strip(), f"^{pattern_of(expected)}$", done.stderr)

    def run_kill(self, arguments: list[str], expected: str) -> None:
        """Run kill with the real pid in place of the README's: both have a line with the name."""
        *flags, pid = arguments
        name = re.search(rf"(\w+) \(pid {pid}\)", README)[1]
        real = self.shop.wait_for(rf"\b{name} \(pid (\d+)\)")[1]
        subprocess.run(["kill", *flags, real], check=True)


class ReadmeTextTest(unittest.TestCase):
    def test_stated_lines_of_code_are_close_to_the_true_ones(self):
        sizes = size_of_layers()
        true = ", ".join(f"the {layer} {sizes[layer]:,}" for layer in LAYERS)
        paragraphs = [text for text in README.split("\n\n") if "lines of code" in text]
        for layer in LAYERS:
            stated = re.search(rf"\b{layer}\b[^0-9]*([0-9][0-9,]*)", "\n\n".join(paragraphs))
            with self.subTest(layer):
                self.assertTrue(stated, f"README.md should say: lines of code: {true}")
                lines = int(stated[1].replace(",", ""))
                self.assertLess(abs(lines / sizes[layer] - 1), TOLERANCES[layer],
                                f"README.md says {layer} {lines}; true are {true}")

    def test_make_knows_each_command_that_the_readme_shows(self):
        rules = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.M)
        shown = re.findall(r"^\$ make ([a-z-]+)|`make ([a-z-]+)`", README, re.M)
        self.assertTrue(shown, "README.md shows no make command")
        for names in shown:
            self.assertIn("".join(names), rules, "a make command in README.md")

    def test_every_module_that_the_readme_names_exists(self):
        folders = [TOP / folder for folder in (
            "microshop", "microshop/chassis", "microshop/watching", "tests", "tests/chassis", "")]
        for name in re.findall(r"`([a-z_/]+\.py)`", README):
            with self.subTest(name):
                self.assertTrue(any((folder / name).exists() for folder in folders),
                                f"README.md names {name}, which is nowhere")


if __name__ == "__main__":
    unittest.main()
