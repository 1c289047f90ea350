"""Settings: a flag wins over the environment and that over the default; a bad value is one line."""
import contextlib
import io
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis import config
from tests.helpers import TOP

SETTINGS = [
    config.Setting("port", config.port, "3000", "port"),
    config.HOST, config.DATA, config.QUIET, *config.FOR_GATEWAY, *config.SHARED, config.TOKEN,
    config.Setting("supervised", config.supervision, None, "what run_all passes on"),
    config.Setting("workers", config.count, "1", "number of workers"),
    config.service_url("users", 3001),
]
DEFAULTS = {
    "port": 3000, "host": "127.0.0.1", "data": Path("data"), "quiet": False, "timeout": 5.0,
    "token": None, "token_file": None, "rate": None, "max_in_flight": 64, "max_connections": 1024,
    "grace": 10.0, "supervised": None, "workers": 1, "users_url": ["http://127.0.0.1:3001"],
    "flags": {}}
BAD_VALUES = {
    "port": ["x", "65536", "-1", "٣"],
    "workers": ["0"],
    "max-connections": ["0", "100000"],
    "max-in-flight": ["0"],
    "grace": ["0", "soon"],
    "timeout": ["0", "nan", "-3"],
    "rate": ["100", "0/s", "100/d", "1.5/s", "-1/s"],
    "host": ["a b"],
    "data": [__file__, f"{__file__}/below", "a" * 300],
    "token-file": ["/nowhere/at/all", "/", __file__],
    "supervised": ["3", "3,4", "3,4,5,6", "-3,4,5", "3,4,x"],
    "users-url": ["localhost:3001", "ftp://a", "http://a:x", "http://a/path", "http://a,",
                  "http://a:0", "http://a..b:80", "http://[::::]"],
}


def variable(name):
    """Return the environment variable of a setting."""
    return "MICROSHOP_" + name.upper().replace("-", "_")


class ConfigTest(unittest.TestCase):
    def read(self, *arguments, check=None, **environment):
        with mock.patch.dict("os.environ", environment):
            return config.read("microshop.test", SETTINGS, check, list(arguments))

    def refuse(self, *arguments, check=None, **environment):
        """Return the one line that is printed before the process exits with status 2."""
        given = f"{arguments} {environment}"
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            with self.assertRaises(SystemExit, msg=f"{given} should end the process") as caught:
                self.read(*arguments, check=check, **environment)
        self.assertEqual(2, caught.exception.code, f"the exit status for {given}")
        self.assertRegex(printed.getvalue(), r"\A[^\n]+\n\Z", f"one line was expected for {given}")
        return printed.getvalue()


class ValueTest(ConfigTest):
    def test_every_setting_has_a_default(self):
        self.assertEqual(DEFAULTS, vars(self.read()))

    def test_the_environment_wins_over_the_default(self):
        self.assertEqual(4000, self.read(MICROSHOP_PORT="4000").port)

    def test_a_flag_wins_over_the_environment(self):
        self.assertEqual(5000, self.read("--port", "5000", MICROSHOP_PORT="4000").port)
        self.assertTrue(self.read("--quiet", MICROSHOP_QUIET="0").quiet)

    def test_an_empty_environment_variable_means_the_default(self):
        self.assertEqual(3000, self.read(MICROSHOP_PORT="").port)

    def test_a_switch_can_be_set_in_the_environment(self):
        self.assertTrue(self.read(MICROSHOP_QUIET="yes").quiet)
        self.assertFalse(self.read(MICROSHOP_QUIET="off").quiet)

    def test_several_base_urls_are_instances_of_one_service(self):
        settings = self.read(MICROSHOP_USERS_URL="http://a:1/, http://[::1]:2")
        self.assertEqual(["http://a:1", "http://[::1]:2"], settings.users_url)

    def test_a_rate_is_a_number_of_requests_in_a_number_of_seconds(self):
        for text, rate in {"100/s": (100, 1), "600/m": (600, 60), "5000/h": (5000, 3600)}.items():
            with self.subTest(rate=text):
                self.assertEqual(rate, self.read("--rate", text).rate)

    def test_the_supervisor_passes_on_two_file_descriptors_and_the_count_of_restarts(self):
        self.assertEqual([3, 14, 2], self.read("--supervised", "3,14,2").supervised)

    def test_only_settings_given_as_flags_are_passed_on_as_flags(self):
        settings = self.read("--rate", "100/s", "--max-in-flight=7", "--port", "1",
                             MICROSHOP_TIMEOUT="3")
        self.assertEqual(["--rate=100/s", "--max-in-flight=7"],
                         config.as_flags(settings, config.FOR_GATEWAY))


class RefusalTest(ConfigTest):
    def test_a_bad_value_is_named_together_with_its_flag_or_variable(self):
        for name, texts in BAD_VALUES.items():
            for text in texts:
                with self.subTest(setting=name, text=text):
                    self.assertIn(f"--{name}: {text!r} ", self.refuse(f"--{name}={text}"))
                    self.assertIn(f"{variable(name)}: {text!r} ",
                                  self.refuse(**{variable(name): text}))
        self.assertIn("MICROSHOP_QUIET: 'maybe' is neither 1 nor 0",
                      self.refuse(MICROSHOP_QUIET="maybe"))

    def test_the_message_says_what_the_value_is_not(self):
        for argument, message in {
                "--data=": "--data: '' is not a folder",
                "--port=x": "--port: 'x' is not a port (0 to 65535)",
                "--timeout=soon": "--timeout: 'soon' is not a number of seconds, like 5 or 0.5",
                "--rate=100": "--rate: '100' is not a rate, like 100/s, 600/m or 5000/h",
                "--token-file=/x/y": "--token-file: '/x/y' cannot be read: No such file"}.items():
            with self.subTest(argument=argument):
                self.assertIn(message, self.refuse(argument))

    def test_a_port_that_kubernetes_has_set_for_a_service_called_microshop_says_what_to_do(self):
        self.assertRegex(
            self.refuse(MICROSHOP_PORT="tcp://10.0.0.1:80"),
            "MICROSHOP_PORT: 'tcp://10.0.0.1:80' is not a port: Kubernetes .* Service called "
            "microshop; set enableServiceLinks: false in the pod, or rename the Service ")

    def test_an_empty_token_or_rate_is_refused_instead_of_starting_without_protection(self):
        for name in ("rate", "token-file"):
            with self.subTest(flag=name):
                self.assertIn(f"--{name}: '' ", self.refuse(f"--{name}="))
        for name in ("token", "token-file", "rate"):
            with self.subTest(variable=name):
                self.assertIn(f"{variable(name)}: ", self.refuse(**{variable(name): ""}))

    def test_an_unknown_shortened_or_incomplete_flag_is_named(self):
        for argument in ("--prot=1", "--por=1", "--port", "extra"):
            with self.subTest(argument=argument):
                self.assertIn(argument.partition("=")[0], self.refuse(argument))

    def test_values_that_do_not_go_together_are_refused(self):
        def check(settings):
            raise ValueError("--port: too close to --workers")
        self.assertIn("--port: too close to --workers", self.refuse(check=check))


class TokenTest(ConfigTest):
    RULE = (r"does not contain a valid token "
            r"\(only letters, digits and -\._~\+/, optionally followed by =\)")

    def test_a_token_comes_from_the_environment(self):
        self.assertEqual("s3cret-._~+/==", self.read(MICROSHOP_TOKEN="s3cret-._~+/==").token)

    def test_a_token_cannot_be_a_flag_which_other_users_could_see(self):
        self.assertIn("--token", self.refuse("--token", "s3cret"))

    def test_an_invalid_token_is_refused_and_never_printed(self):
        for token in ("two words", "s3cret!", "=", "s3=cret", "\xe9"):
            with self.subTest(token=token):
                printed = self.refuse(MICROSHOP_TOKEN=token)
                self.assertRegex(printed, f"MICROSHOP_TOKEN: the variable {self.RULE}")
                self.assertNotIn(repr(token), printed)

    def test_a_token_comes_from_a_file(self):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("s3cret\n")
            file.flush()
            self.assertEqual("s3cret", self.read("--token-file", file.name).token_file)

    def test_a_file_without_a_valid_token_is_refused_and_its_text_never_printed(self):
        for text in ("two words", "", "\xe9"):
            with self.subTest(text=text), tempfile.NamedTemporaryFile("w") as file:
                file.write(text)
                file.flush()
                printed = self.refuse(MICROSHOP_TOKEN_FILE=file.name)
                self.assertRegex(printed, f"MICROSHOP_TOKEN_FILE: '{file.name}' {self.RULE}")
                if text:
                    self.assertNotIn(text, printed)


class HelpTest(ConfigTest):
    def test_help_shows_defaults_and_environment_variables(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            with self.assertRaises(SystemExit) as caught:
                self.read("--help")
        self.assertEqual(0, caught.exception.code, "the exit status of --help")
        self.assertIn("(default: 3000)", printed.getvalue())
        self.assertIn("--port as MICROSHOP_PORT", printed.getvalue())

    def test_help_of_every_program_begins_with_what_it_does(self):
        for name in ("run_all", "users", "gateway", "live", "audit", "backup", "kubernetes"):
            with self.subTest(name):
                done = subprocess.run([sys.executable, "-m", f"microshop.{name}", "--help"],
                                      cwd=TOP, capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                purpose = done.stdout.split("\n\n")[1]
                self.assertRegex(purpose, r"\A(Start|Run|Check|Copy|Print) ")


if __name__ == "__main__":
    unittest.main()
