"""The README tells the truth: what its commands print, and how long the house is."""
import re
import shlex
import unittest

from tests.helpers import TOP, ask, process

README = (TOP / "README.md").read_text()
COMMANDS = [tuple(part.split("\n", 1)) for block in re.findall(r"```console\n(.*?)```", README, re.S)
            for part in re.split(r"^\$ ", block, flags=re.M)[1:]]  # (command, what it prints)


def pattern_of(printed: str) -> str:
    """Return a pattern for a text in which `...`, ports and times may differ."""
    pattern = re.escape(printed).replace(r"\.\.\.", ".+")
    return re.sub(r"\d\\\.\d\d\\ s", r"\\d+\\.\\d\\d\\ s", re.sub(r"localhost:\d+", r"localhost:\\d+", pattern))


class ReadmeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.shop = cls.enterClassContext(process("microshop.run_all", "--fresh", "--port", "0"))
        cls.shop.wait_for("ready in")
        cls.lines = cls.shop.lines.copy()

    def test_run_all_prints_what_is_promised(self):
        printed, = (printed for command, printed in COMMANDS if command == "python -m microshop.run_all")
        promised = printed.strip().split("\n")
        self.assertEqual(len(self.lines), len(promised))
        for line in promised[:-1]:  # the services may be quicker than each other
            self.assertTrue(any(re.fullmatch(pattern_of(line), given) for given in self.lines), line)
        self.assertRegex(self.lines[-1], f"^{pattern_of(promised[-1])}$")

    def test_curl_prints_what_is_promised(self):
        tried, port = 0, self.shop.port("API Gateway")
        for command, printed in COMMANDS:
            program, *arguments = shlex.split(command)
            if program != "curl":
                continue
            with self.subTest(command):
                target = arguments[-1].removeprefix("localhost:3000")
                answer, expected = ask(port, "GET", target), printed.strip()
                if "-i" in arguments:
                    head, expected = expected.split("\n\n")
                    status, *fields = head.split("\n")
                    self.assertEqual(int(status.split()[1]), answer.status)
                    for name, value in (field.split(": ", 1) for field in fields):
                        self.assertEqual(answer.headers[name.lower()], value)
                self.assertRegex(answer.body.decode(), f"^{pattern_of(expected)}$")
                tried += 1
        self.assertGreater(tried, 8)

    def test_make_knows_each_command_that_is_shown(self):
        rules = re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.M)
        shown = re.findall(r"^\$ make ([a-z-]+)|`make ([a-z-]+)`", README, re.M)
        self.assertTrue(shown)
        for names in shown:
            self.assertIn("".join(names), rules)

    def test_the_size_is_as_told(self):
        told = int(re.search(r"about ([0-9,]+) lines", README)[1].replace(",", ""))
        lines = sum(len(path.read_text().splitlines()) for path in (TOP / "microshop").rglob("*.py"))
        self.assertLess(abs(lines - told), 60, f"it is {lines} lines")

    def test_every_module_it_names_is_there(self):
        for name in re.findall(r"`(?:microshop/)?([a-z_/]+\.py)`", README):
            with self.subTest(name):
                self.assertTrue(any((TOP / folder / name).exists()
                                    for folder in ("microshop", "microshop/chassis", "tests", "tests/chassis")))


if __name__ == "__main__":
    unittest.main()
