"""JSON, queries, fields and pages by themselves; the tests of services show what clients see."""
import unittest

from microshop.chassis.content import (
    MAX_INTEGER, MAX_PAGE, Integer, Page, Text, next_query, parse_json, parse_page, parse_query,
    validate)
from microshop.chassis.errors import BadRequest, UnprocessableContent

CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7f, 0xa0))]  # C0, DEL and C1
FIELDS = {"name": Text(longest=5), "lives": Integer(least=0, default=9), "owner": Integer()}


class ContentTest(unittest.TestCase):
    def refuse(self, parse, *inputs):
        """Check that each input is a bad request; return the detail of the last."""
        detail = ""
        for value in inputs:
            with self.subTest(input=value):
                with self.assertRaises(BadRequest, msg=f"{value!r} should be refused") as caught:
                    parse(value)
                detail = caught.exception.detail
        return detail


class JsonTest(ContentTest):
    def test_json_is_parsed(self):
        self.assertEqual({"name": "Mia", "lives": [9, 1.5, None, True]},
                         parse_json(b'{"name": "Mia", "lives": [9, 1.5, null, true]}'))

    def test_what_python_would_accept_but_is_not_json_is_refused(self):
        self.refuse(parse_json, b"", b"NaN", b"Infinity", b"1e999", b'"\\ud800"', b"\xff", b"{}{}",
                    b"1" * 5000)

    def test_a_repeated_name_is_refused(self):
        self.assertEqual("the body is not valid JSON: a name appears twice",
                         self.refuse(parse_json, b'{"a": 1, "a": 2}', b'[{"a": {"b": 1, "b": 1}}]'))

    def test_deep_nesting_is_refused(self):
        self.assertEqual("the body is not valid JSON: it is nested too deeply",
                         self.refuse(parse_json, b"[" * 100_000, b'{"a":' * 100_000))


class QueryTest(ContentTest):
    def test_a_query_is_parsed(self):
        self.assertEqual({"a": "1", "b": "ü=b", "c": ""},
                         parse_query("a=1&%62=%C3%BC=b&c", {"a", "b", "c", "d"}))
        self.assertEqual({}, parse_query("", {"a"}))

    def test_a_repeated_parameter_is_refused_and_named(self):
        self.assertEqual("a: this parameter must not appear twice",
                         self.refuse(lambda query: parse_query(query, "ab"), "a=1&b=2&%61=1"))

    def test_a_parameter_that_is_not_asked_for_is_ignored_whatever_it_contains(self):
        others = "&".join(["x=%ff", "%ff=1", "=1", "&", "%", *["y=1"] * 1000])
        self.assertEqual({"a": "1"}, parse_query(f"{others}&a=1&{others}", {"a"}))

    def test_the_query_for_the_next_page_keeps_all_other_parameters(self):
        for query, expected in (("", "after=7"), ("limit=2", "limit=2&after=7"),
                                ("after=5&ids=1,2&%61fter=6", "ids=1,2&after=7"),
                                ("a=%E9&a=b+c&d&&e=%3C>", "a=%E9&a=b+c&d=&e=%3C%3E&after=7")):
            with self.subTest(query):
                self.assertEqual(expected, next_query(query, 7))


class FieldTest(unittest.TestCase):
    def refuse(self, field, *values):
        for value in values:
            with self.subTest(field=field, value=value):
                with self.assertRaisesRegex(ValueError, "^must be ", msg=f"{value!r} is invalid"):
                    field.check(value)

    def test_an_integer_has_a_least_value_and_at_most_what_every_client_can_represent(self):
        self.assertEqual(9007199254740991, MAX_INTEGER)
        for least in (0, 1, 5):
            field = Integer(least=least)
            self.assertEqual([least, MAX_INTEGER], [field.check(least), field.check(MAX_INTEGER)])
            self.refuse(field, least - 1, MAX_INTEGER + 1, -MAX_INTEGER, 10**400)
        with self.assertRaisesRegex(ValueError, "^must be an integer from 5 to 9007199254740991$"):
            Integer(least=5).check(4)

    def test_an_integer_may_have_a_greatest_value(self):
        stars = Integer(least=1, most=5)
        self.assertEqual([1, 5], [stars.check(1), stars.check(5)])
        self.refuse(stars, 0, 6)
        with self.assertRaisesRegex(ValueError, "^must be an integer from 1 to 5$"):
            stars.check(6)

    def test_only_integers_are_accepted_as_integers(self):
        self.refuse(Integer(least=0), True, False, 1.5, 1e-2, 1e300, float("inf"), "1", "", None,
                    [], {})

    def test_a_number_without_a_fraction_is_an_integer_however_it_is_written(self):
        for value, expected in ((1.0, 1), (1e2, 100), (0.0, 0), (-0.0, 0)):
            found = Integer(least=0).check(value)
            self.assertEqual((found, type(found)), (expected, int))

    def test_a_control_character_is_refused_anywhere_in_a_text_and_never_trimmed(self):
        for control in CONTROLS:
            self.refuse(Text(), f"{control}Mia", f"M{control}ia", f"Mia{control}",
                        f" {control} Mia", control)

    def test_characters_next_to_the_control_characters_are_accepted(self):
        for character in " ~\xa0\u200d\u2028🐈":
            self.assertEqual(f"M{character}a", Text().check(f"M{character}a"))

    def test_the_length_of_a_text_is_counted_in_characters_before_trimming(self):
        self.assertEqual("Mia", Text(6).check("  Mia\xa0"))
        self.refuse(Text(5), "  Mia\xa0")
        for text in ("M", "Mia", "🐈🐈🐈"):
            self.assertEqual(text, Text(3).check(text))
        self.refuse(Text(3), "", "   ", "Mimi", "🐈🐈🐈🐈", b"Mia", None)


class ValidateTest(unittest.TestCase):
    def refuse(self, value):
        with self.assertRaises(UnprocessableContent, msg=f"{value!r} should be refused") as caught:
            validate(value, FIELDS)
        return caught.exception

    def test_fields_come_in_the_order_of_the_table_with_their_defaults(self):
        valid = validate({"owner": 1, "name": " Mia "}, FIELDS)
        self.assertEqual([("name", "Mia"), ("lives", 9), ("owner", 1)], list(valid.items()))

    def test_the_value_itself_is_not_changed(self):
        sent = {"name": " Mia ", "owner": 1}
        validate(sent, FIELDS)
        self.assertEqual({"name": " Mia ", "owner": 1}, sent)

    def test_null_does_not_mean_the_default(self):
        refusal = self.refuse({"name": "Mia", "owner": 1, "lives": None})
        detail = "must be an integer from 0 to 9007199254740991"
        self.assertEqual([{"field": "lives", "detail": detail}], [*refusal.members["errors"]])

    def test_the_detail_has_the_first_error_and_the_number_of_others(self):
        refusal = self.refuse({"lives": -1, "tail": True, "owner": 1})
        self.assertEqual(["name", "lives", "tail"],
                         [error["field"] for error in refusal.members["errors"]])
        self.assertRegex(refusal.detail, r"^name: must be text .* \(and 2 more\)$")

    def test_a_refusal_stays_small_however_many_fields_are_wrong_and_long(self):
        wrong = {f"{number:04}" * 1000: 0 for number in range(1000)}
        refusal = self.refuse({**wrong, "owner": 0})
        fields = [error["field"] for error in refusal.members["errors"]]
        self.assertEqual(20, len(fields))
        self.assertEqual(["name", "owner", "0000" * 25 + "..."], fields[:3])
        self.assertRegex(refusal.detail, r" \(and 1001 more\)$")
        self.assertLess(len(str(refusal.problem())), 5000)

    def test_only_a_json_object_has_fields(self):
        self.assertEqual("body: must be a JSON object", self.refuse([]).detail)


class PageTest(ContentTest):
    def test_a_page_has_defaults(self):
        self.assertEqual(Page(limit=100, after=0, ids=None), parse_page(""))

    def test_a_page_is_parsed(self):
        self.assertEqual(Page(1000, 0, "[3,7,1]"),
                         parse_page("limit=1000&after=0&ids=3,007,1&status=x"))
        self.assertEqual(Page(100, 0, f"[1,{MAX_INTEGER}]"), parse_page(f"ids=1%2C{MAX_INTEGER}"))

    def test_a_parameter_out_of_range_is_named_with_its_range(self):
        for query, detail in [
                ("limit=many", "limit: 'many' is not an integer from 1 to 1000"),
                ("limit=0", "limit: '0' is not an integer from 1 to 1000"),
                ("limit=1001", "limit: '1001' is not an integer from 1 to 1000"),
                ("limit=%C2%B2", "limit: '²' is not an integer from 1 to 1000"),
                ("after=-1", f"after: '-1' is not an integer from 0 to {MAX_INTEGER}"),
                ("after=" + "9" * 5000, f"after: '{'9' * 100}...' is not an integer from 0 to "
                                        f"{MAX_INTEGER}"),
                ("ids=", f"ids: '' is not an integer from 1 to {MAX_INTEGER}"),
                ("ids=1,,2", f"ids: '' is not an integer from 1 to {MAX_INTEGER}"),
                ("ids=1,0", f"ids: '0' is not an integer from 1 to {MAX_INTEGER}"),
                ("ids=1,+2", f"ids: ' 2' is not an integer from 1 to {MAX_INTEGER}")]:
            self.assertEqual(detail, self.refuse(parse_page, query))

    def test_at_most_a_thousand_ids_are_allowed(self):
        ids = ",".join(map(str, range(1, MAX_PAGE + 1)))
        self.assertEqual(f"[{ids}]", parse_page(f"ids={ids}").ids)
        self.assertEqual("ids: at most 1000 allowed, got 1001",
                         self.refuse(parse_page, f"ids={ids},1"))


if __name__ == "__main__":
    unittest.main()
