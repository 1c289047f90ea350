"""Some seconds of fuzz, and whether it would notice: `python -m tests.fuzz` is the same for a minute."""
import re
import unittest
from unittest import mock

from microshop.chassis import wire
from microshop.chassis.handler import Handler
from microshop.gateway import GatewayHandler
from tests import fuzz

SEED, SECONDS = 7, 2.5
LEAST = 200  # inputs for wire.py, and as many for the gateway, on a machine however slow
MOST = 2000  # inputs that it may take to notice what is wrong, a fraction of a second
REFUSALS = {"refused", *(f"refused {status}" for status in (400, 413, 414, 431, 501, 505))}


class Careless(wire.Stream):
    """Leaves bodies unread, so that they pass for requests."""

    def read_body(self, *_: object) -> bytes:
        return b""


def parsing_lengths(change):
    """Return a parse_length that sees other fields: those that `change` makes of each name and value."""
    return lambda version, fields, parse=wire.parse_length: parse(version, wire.Fields(
        [pair for name, value in fields.items() for pair in change(name, value)]))


BREAKS = {  # what is wrong with wire.py: how to make it so, and what is to be noticed
    "a bare LF ends a line": (
        {"parse_request": lambda head, parse=wire.parse_request: parse(re.sub("\r?\n", "\r\n", head))},
        "where it is cut|no head may hold"),
    "a length may have a sign": ({"LENGTH": re.compile(r"\+?[0-9]{1,4000}")}, "elsewhere after None"),
    "a length may be a fraction": ({"LENGTH": re.compile(r"[0-9.]+")}, "it raises ValueError"),
    "of two lengths the first holds": (
        {"parse_length": parsing_lengths(lambda name, value: [(name, value.split(",")[0])])}, "elsewhere after None"),
    "Transfer-Encoding is ignored": (
        {"parse_length": parsing_lengths(lambda name, value: [(name, value)] * (name != "transfer-encoding"))},
        r"elsewhere after \d"),
    "what can only be refused is awaited": ({"STRAY": re.compile(rb"(?!)")}, "it can only be refused"),
    "a body is left unread": ({"Stream": Careless}, r"elsewhere after \d"),
}


class FuzzTest(unittest.TestCase):
    def test_some_seconds_show_nothing_wrong_and_leave_nothing_out(self):
        report = fuzz.run(SECONDS, SEED, LEAST)
        self.assertEqual(report.wrong, [], report)
        self.assertGreaterEqual(min(report.inputs["wire.py"], report.inputs["gateway"]), LEAST)
        self.assertEqual(set(report.operators), set(fuzz.OPERATORS))
        self.assertLessEqual(REFUSALS | {"accepted", "short"}, set(report.outcomes))

    def test_each_case_comes_out_as_it_should(self):
        for name, (data, outcomes) in fuzz.CASES.items():
            with self.subTest(name):
                self.assertEqual([seen.outcome for seen in fuzz.check(data, fuzz.Dice(SEED))], outcomes)

    def test_a_known_difference_to_the_standard_library_is_one(self):
        for name in fuzz.KNOWN_DIFFERENCES:
            with self.subTest(name), mock.patch.dict(fuzz.KNOWN_DIFFERENCES):
                del fuzz.KNOWN_DIFFERENCES[name]
                self.assert_noticed("http.server sees")

    def test_a_break_of_the_wire_is_noticed(self):
        for name, (attributes, words) in BREAKS.items():
            with self.subTest(name), mock.patch.multiple(wire, **attributes):
                self.assert_noticed(words)

    def test_a_gateway_that_answers_a_request_within_a_body_is_noticed(self):
        def setup(handler: Handler) -> None:
            Handler.setup(handler)
            handler.stream = Careless(handler.connection)

        data = b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: %d\r\n\r\n" % len(fuzz.SMUGGLED) + fuzz.SMUGGLED
        with (mock.patch.object(GatewayHandler, "setup", setup), fuzz.running_gateway() as port,
              self.assertRaisesRegex(fuzz.Fault, r"more answers than messages|marker-\d+ is answered")):
            for manner in range(9):  # a reset shows nothing
                fuzz.converse(port, data, fuzz.Dice(manner))

    def assert_noticed(self, words):
        report = fuzz.Report(SEED)
        report.fuzz("wire.py", fuzz.check, seconds=0, least=MOST)
        self.assertRegex("".join(report.wrong), words)


if __name__ == "__main__":
    unittest.main()
