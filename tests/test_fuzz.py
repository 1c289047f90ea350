"""A round of fuzzing, and whether it would notice a fault. `make fuzz` runs it for a minute."""
import re
import unittest
from unittest import mock

from microshop.chassis import wire
from microshop.chassis.handler import Handler
from microshop.gateway import GatewayHandler
from tests import fuzz

SEED = 7
WIRE_INPUTS = 4000     # inputs for wire.py in this process
GATEWAY_INPUTS = 400   # inputs for a running gateway
FAULT_INPUTS = 2000    # inputs among which a fault must be noticed
REFUSALS = {"refused", *(f"refused {status}" for status in (400, 413, 414, 431, 501, 505))}


class CarelessStream(wire.Stream):
    """Leaves bodies unread, so that they are taken for requests."""

    def read_body(self, *_: object) -> bytes:
        return b""


def parsing_lengths(change):
    """Return a parse_length() that sees other fields: `change` returns pairs for each field."""
    def parse_length(version, fields, parse=wire.parse_length):
        changed = [pair for name, value in fields.items() for pair in change(name, value)]
        return parse(version, wire.Fields(changed))
    return parse_length


def keep_first_value(name, value):
    return [(name, value.split(",")[0])]


def drop_transfer_encoding(name, value):
    return [] if name == "transfer-encoding" else [(name, value)]


def parsing_bare_lf(head, parse=wire.parse_request):
    return parse(re.sub("\r?\n", "\r\n", head))


FAULTS = {  # faults of wire.py: the attributes that make it faulty, and what must be noticed
    "a bare LF ends a line": (
        {"parse_request": parsing_bare_lf}, "where it is cut|no head may contain"),
    "a length may have a sign": (
        {"LENGTH": re.compile(r"\+?[0-9]{1,4000}")}, "elsewhere after None"),
    "a length may be a fraction": (
        {"LENGTH": re.compile(r"[0-9.]+")}, "it raises ValueError"),
    "the first of two lengths is used": (
        {"parse_length": parsing_lengths(keep_first_value)}, "elsewhere after None"),
    "Transfer-Encoding is ignored": (
        {"parse_length": parsing_lengths(drop_transfer_encoding)}, r"elsewhere after \d"),
    "invalid input is awaited to its end": (
        {"STRAY": re.compile(rb"(?!)")}, "it can only be refused"),
    "a body is left unread": (
        {"Stream": CarelessStream}, r"elsewhere after \d"),
}


class FuzzTest(unittest.TestCase):
    def test_a_round_of_fuzzing_finds_no_fault_and_tries_everything(self):
        report = fuzz.run(SEED, wire_inputs=WIRE_INPUTS, gateway_inputs=GATEWAY_INPUTS)
        self.assertEqual([], report.wrong, report)
        self.assertEqual({"wire.py": WIRE_INPUTS, "gateway": GATEWAY_INPUTS}, report.inputs)
        self.assertEqual(set(fuzz.OPERATORS), set(report.operators), "each damage should be tried")
        self.assertLessEqual(REFUSALS | {"accepted", "short"}, set(report.outcomes),
                             "each outcome should be seen")

    def test_each_known_case_has_its_outcomes(self):
        for name, (data, outcomes) in fuzz.CASES.items():
            with self.subTest(case=name):
                seen = fuzz.check(data, fuzz.Dice(SEED))
                self.assertEqual(outcomes, [message.outcome for message in seen], data[:200])

    def test_each_known_difference_to_the_standard_library_still_exists(self):
        for name in fuzz.KNOWN_DIFFERENCES:
            with self.subTest(difference=name), mock.patch.dict(fuzz.KNOWN_DIFFERENCES):
                del fuzz.KNOWN_DIFFERENCES[name]
                self.assert_noticed("http.server sees")

    def test_a_fault_of_the_wire_is_noticed(self):
        for name, (attributes, words) in FAULTS.items():
            with self.subTest(fault=name), mock.patch.multiple(wire, **attributes):
                self.assert_noticed(words)

    def test_a_gateway_that_answers_a_request_inside_a_body_is_noticed(self):
        def setup(handler: Handler) -> None:
            Handler.setup(handler)
            handler.stream = CarelessStream(handler.connection)

        data = (b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: %d\r\n\r\n" % len(fuzz.SMUGGLED)
                + fuzz.SMUGGLED)
        with (mock.patch.object(GatewayHandler, "setup", setup), fuzz.running_gateway() as port,
              self.assertRaisesRegex(
                  fuzz.Fault, r"more answers than messages|marker-\d+ is answered")):
            for seed in range(9):  # for some of them the client resets, which shows nothing
                fuzz.converse(port, data, fuzz.Dice(seed))

    def assert_noticed(self, words):
        """Check that a fault is found, and described with these words (a regular expression)."""
        report = fuzz.Report(SEED)
        report.fuzz("wire.py", fuzz.check, inputs=FAULT_INPUTS)
        self.assertRegex("".join(report.wrong), words, f"{FAULT_INPUTS} inputs should show a fault")


if __name__ == "__main__":
    unittest.main()
