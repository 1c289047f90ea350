"""Fields and their checks, by themselves; what a client is told of them is in the tests of the services."""
import unittest

from microshop.chassis.content import MAX_INTEGER, Integer, Text, validate
from microshop.chassis.errors import UnprocessableContent

CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7f, 0xa0))]  # C0, DEL and C1
FIELDS = {"name": Text(longest=5), "lives": Integer(least=0, default=9), "owner": Integer()}


class FieldTest(unittest.TestCase):
    def refuse(self, field, *values):
        for value in values:
            with self.subTest(value=value), self.assertRaisesRegex(ValueError, "^must be "):
                field.check(value)

    def test_an_integer_lies_within_its_bounds_and_what_every_client_can_hold(self):
        self.assertEqual(MAX_INTEGER, 9007199254740991)
        for least in (0, 1, 5):
            field = Integer(least=least)
            self.assertEqual([field.check(least), field.check(MAX_INTEGER)], [least, MAX_INTEGER])
            self.refuse(field, least - 1, MAX_INTEGER + 1, -MAX_INTEGER, 10**400)
        with self.assertRaisesRegex(ValueError, "^must be an integer from 5 to 9007199254740991$"):
            Integer(least=5).check(4)

    def test_nothing_but_an_integer_is_one(self):
        self.refuse(Integer(least=0), True, False, 1.0, 1e2, float("inf"), "1", "", None, [], {})

    def test_no_control_character_is_in_a_text_and_none_is_trimmed_away(self):
        for control in CONTROLS:
            self.refuse(Text(), f"{control}Mia", f"M{control}ia", f"Mia{control}", f" {control} Mia", control)

    def test_what_stands_next_to_a_control_character_is_none(self):
        for character in " ~\xa0\u200d\u2028🐈":
            self.assertEqual(Text().check(f"M{character}a"), f"M{character}a")

    def test_the_length_of_a_text_counts_after_trimming(self):
        self.assertEqual([Text(3).check(text) for text in ("M", "Mia", "  Mia\xa0", "🐈🐈🐈")],
                         ["M", "Mia", "Mia", "🐈🐈🐈"])
        self.refuse(Text(3), "", "   ", "Mimi", "🐈🐈🐈🐈", b"Mia", None)


class ValidateTest(unittest.TestCase):
    def refuse(self, value):
        with self.assertRaises(UnprocessableContent) as caught:
            validate(value, FIELDS)
        return caught.exception

    def test_fields_come_in_the_tables_order_with_their_defaults(self):
        valid = validate({"owner": 1, "name": " Mia "}, FIELDS)
        self.assertEqual(list(valid.items()), [("name", "Mia"), ("lives", 9), ("owner", 1)])

    def test_what_was_sent_stays_as_it_was(self):
        sent = {"name": " Mia ", "owner": 1}
        validate(sent, FIELDS)
        self.assertEqual(sent, {"name": " Mia ", "owner": 1})

    def test_null_does_not_stand_for_a_default(self):
        self.assertEqual([*self.refuse({"name": "Mia", "owner": 1, "lives": None}).members["errors"]],
                         [{"field": "lives", "detail": "must be an integer from 0 to 9007199254740991"}])

    def test_a_refusal_says_the_first_thing_and_how_many_there_are(self):
        refusal = self.refuse({"lives": -1, "tail": True, "owner": 1})
        self.assertEqual([error["field"] for error in refusal.members["errors"]], ["tail", "name", "lives"])
        self.assertEqual(refusal.detail, "tail: is not a known field (and 2 more)")
        self.assertEqual(self.refuse([]).detail, "body: must be a JSON object")


if __name__ == "__main__":
    unittest.main()
