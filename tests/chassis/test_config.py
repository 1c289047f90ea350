"""Settings: flag over environment over default, and one line for what is bad."""
import contextlib
import io
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis import config

SETTINGS = [
    config.Setting("port", config.port, "3000", "port"), config.HOST, config.DATA, config.QUIET,
    *config.FOR_GATEWAY, *config.SHARED, config.TOKEN,
    config.Setting("supervised", config.handles, None, "handles"),
    config.Setting("workers", config.count, "1", "workers"),
    config.Setting("users-url", config.base_urls, "http://localhost:3001", "where users is"),
]


class ConfigTest(unittest.TestCase):
    def read(self, *arguments, check=None, **environment):
        with mock.patch.dict("os.environ", environment):
            return config.read("microshop.test", SETTINGS, check, list(arguments))

    def refuse(self, *arguments, **environment):
        with contextlib.redirect_stderr(io.StringIO()) as printed, self.assertRaises(SystemExit) as caught:
            self.read(*arguments, **environment)
        self.assertEqual(caught.exception.code, 2)
        self.assertEqual(printed.getvalue().count("\n"), 1)
        return printed.getvalue()

    def test_defaults_hold_where_nothing_is_said(self):
        self.assertEqual(vars(self.read()), {
            "port": 3000, "host": "127.0.0.1", "data": Path("data"), "quiet": False, "timeout": 5.0, "workers": 1,
            "token": None, "token_file": None, "rate": None, "max_in_flight": 64, "flags": {},
            "max_connections": 1024, "grace": 10.0, "supervised": None,
            "users_url": ["http://localhost:3001"]})

    def test_the_environment_wins_over_defaults_and_a_flag_over_both(self):
        self.assertEqual(self.read(MICROSHOP_PORT="4000").port, 4000)
        self.assertEqual(self.read("--port", "5000", MICROSHOP_PORT="4000").port, 5000)
        self.assertEqual(self.read(MICROSHOP_PORT="").port, 3000)
        self.assertTrue(self.read("--quiet", MICROSHOP_QUIET="0").quiet)
        self.assertTrue(self.read(MICROSHOP_QUIET="yes").quiet)

    def test_several_base_urls_are_copies(self):
        settings = self.read(MICROSHOP_USERS_URL="http://a:1/, http://[::1]:2")
        self.assertEqual(settings.users_url, ["http://a:1", "http://[::1]:2"])

    def test_a_bad_value_is_named_with_where_it_came_from(self):
        for name, text in (("port", "x"), ("port", "65536"), ("port", "-1"), ("port", "٣"), ("workers", "0"),
                           ("max-connections", "0"), ("max-connections", "100000"), ("grace", "0"), ("grace", "soon"),
                           ("supervised", "3"), ("supervised", "3,4,5"), ("supervised", "-3,4"),
                           ("data", __file__),
                           ("timeout", "0"), ("timeout", "nan"), ("timeout", "-3"), ("host", "a b"),
                           ("users-url", "localhost:3001"), ("users-url", "ftp://a"), ("users-url", "http://a:x"),
                           ("users-url", "http://a/path"), ("users-url", "http://a,"), ("users-url", "http://a..b:80"),
                           ("users-url", "http://[::::]"), ("users-url", "http://a:0"), ("max-in-flight", "0"),
                           ("rate", "100"), ("rate", "0/s"), ("rate", "100/d"), ("rate", "1.5/s"), ("rate", "-1/s"),
                           ("token-file", "/nowhere/at/all"), ("token-file", "/"), ("token-file", __file__)):
            with self.subTest(name, text=text):
                twin = f"MICROSHOP_{name.upper().replace('-', '_')}"
                self.assertIn(f"--{name}: {text!r} ", self.refuse(f"--{name}={text}"))
                self.assertIn(f"{twin}: {text!r} ", self.refuse(**{twin: text}))
        self.assertIn("--data: '' is no folder", self.refuse("--data", ""))
        for name in ("rate", "token-file"):  # as from a variable that was never set: better no shop than an open one
            self.assertIn(f"--{name}: '' ", self.refuse(f"--{name}="))
        for twin in ("MICROSHOP_TOKEN", "MICROSHOP_TOKEN_FILE", "MICROSHOP_RATE"):
            self.assertIn(f"{twin}: ", self.refuse(**{twin: ""}))
        self.assertIn("MICROSHOP_QUIET: 'maybe' ", self.refuse(MICROSHOP_QUIET="maybe"))

    def test_a_supervisor_hands_two_sockets_on(self):
        self.assertEqual(self.read("--supervised", "3,14").supervised, [3, 14])

    def test_a_rate_is_requests_in_seconds(self):
        for text, rate in (("100/s", (100, 1)), ("600/m", (600, 60)), ("5000/h", (5000, 3600))):
            self.assertEqual(self.read("--rate", text).rate, rate)

    def test_a_token_comes_from_the_environment_or_a_file_and_is_never_shown(self):
        self.assertEqual(self.read(MICROSHOP_TOKEN="s3cret-._~+/==").token, "s3cret-._~+/==")
        self.assertIn("--token", self.refuse("--token", "s3cret"))
        with tempfile.NamedTemporaryFile("w") as file:
            for text, token in (("s3cret\n", "s3cret"), ("two words", None), ("", None), ("\xe9", None)):
                file.seek(0)
                file.truncate()
                file.write(text)
                file.flush()
                with self.subTest(text):
                    if token:
                        self.assertEqual(self.read("--token-file", file.name).token_file, token)
                        continue
                    told = self.refuse(MICROSHOP_TOKEN_FILE=file.name)
                    self.assertRegex(told, f"MICROSHOP_TOKEN_FILE: '{file.name}' holds what is no token")
                    self.assertFalse(text and text in told)
        for token in ("two words", "s3cret!", "=", "s3=cret", "\xe9"):
            told = self.refuse(MICROSHOP_TOKEN=token)
            self.assertIn("MICROSHOP_TOKEN: what it holds is no token", told)
            self.assertNotIn(repr(token), told)

    def test_what_was_given_as_flags_can_be_handed_on(self):
        settings = self.read("--rate", "100/s", "--max-in-flight=7", "--port", "1", MICROSHOP_TIMEOUT="3")
        self.assertEqual(config.as_flags(settings, config.FOR_GATEWAY), ["--rate=100/s", "--max-in-flight=7"])

    def test_an_unknown_or_shortened_flag_is_named(self):
        self.assertIn("--prot", self.refuse("--prot", "1"))
        self.assertIn("--por", self.refuse("--por", "1"))
        self.assertIn("--port", self.refuse("--port"))
        self.assertIn("extra", self.refuse("extra"))

    def test_what_is_bad_together_is_refused_too(self):
        def check(settings):
            raise ValueError("--port: too near to --workers")
        self.assertIn("--port: too near", self.refuse(check=check))

    def test_help_tells_defaults_and_twins(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit) as caught:
            self.read("--help")
        self.assertEqual(caught.exception.code, 0)
        self.assertIn("(default: 3000)", printed.getvalue())
        self.assertIn("MICROSHOP_DATA", printed.getvalue())


if __name__ == "__main__":
    unittest.main()
