"""Metrics are read as they were written, and what is not valid is refused."""
import unittest

from microshop.chassis.metrics import Family, format_metrics, gauge
from microshop.watching.exposition import Sample, add_up, parse_metrics, quantile


def buckets(**counts: float) -> list[Sample]:
    """Return the buckets of a histogram, given like le_0_5=3 (and le_inf)."""
    bounds = [name[3:].replace("_", ".").replace("inf", "+Inf") for name in counts]
    return [Sample({"le": bound}, count)
            for bound, count in zip(bounds, counts.values(), strict=True)]


class ParseTest(unittest.TestCase):
    def test_a_value_is_found_by_its_name_and_some_of_its_labels(self):
        metrics = parse_metrics(
            '# HELP a_total A.\n# TYPE a_total counter\n'
            'a_total{x="1",y="2"} 3\na_total{x="1",y="4"} 5\na_total 7\nb 1.5\n')
        self.assertEqual(metrics.total("a_total", x="1", y="2"), 3)
        self.assertEqual(metrics.total("a_total", x="1"), 8)
        self.assertEqual(metrics.total("a_total"), 15)
        self.assertEqual(metrics.total("b"), 1.5)
        self.assertEqual(metrics.total("c"), 0)
        self.assertEqual(list(metrics.select("a_total", y="4")), [({"x": "1", "y": "4"}, 5.0)])

    def test_a_label_may_have_any_name(self):
        metrics = parse_metrics('a{self="1",name="2",labels="3"} 4\n')
        self.assertEqual(metrics.total("a", self="1", name="2", labels="3"), 4)

    def test_what_the_chassis_writes_is_read_back(self):
        hostile = 'a"b\\c\nd\\n,e="f"} 1'
        metrics = parse_metrics(format_metrics([
            Family("c_total", "counter", "C.", [("", {"path": hostile, "none": ""}, 1)]),
            Family("h", "histogram", "H.", [("_bucket", {"le": "+Inf"}, 2), ("_count", {}, 2)]),
            gauge("g", "G.", 1e-05)]))
        self.assertEqual(list(metrics.select("c_total")), [({"path": hostile}, 1.0)])
        self.assertEqual(metrics.total("h_bucket", le="+Inf"), 2)
        self.assertEqual(metrics.total("h_count"), 2)
        self.assertEqual(metrics.total("g"), 1e-05)

    def test_what_is_not_valid_is_refused(self):
        for text in ("<html>", "a", "a b", "a 1 x", "a NaN", "a +Inf", "a 1.2.3", "9a 1", " a 1",
                     'a{x=1} 1', 'a{x="1} 1', 'a{x="1" y="2"} 1', 'a{x="1"},y="2"} 1', "a 1\r"):
            with self.subTest(text), self.assertRaises(ValueError, msg=f"{text!r} was accepted"):
                parse_metrics(text)


class SumTest(unittest.TestCase):
    def test_values_of_two_processes_are_added_label_by_label(self):
        both = add_up([parse_metrics('a{x="1"} 1\na{x="2"} 2\n'),
                       parse_metrics('a{x="2"} 3\nb 4\n')])
        self.assertEqual([both.total("a", x="1"), both.total("a", x="2"), both.total("b")],
                         [1, 5, 4])

    def test_growth_counts_new_values_from_zero_and_leaves_out_what_became_less(self):
        before = parse_metrics('a{x="1"} 5\na{x="2"} 5\n')
        after = parse_metrics('a{x="1"} 7\na{x="2"} 4\na{x="3"} 1\n')
        self.assertEqual(sorted((labels["x"], value)
                                for labels, value in after.growth_since(before, 0.5).select("a")),
                         [("1", 4), ("3", 2)], "per second, in half a second")


class QuantileTest(unittest.TestCase):
    def test_durations_are_taken_as_spread_evenly_over_their_bucket(self):
        spread = buckets(le_1=0, le_2=10, le_4=20, le_inf=20)
        for share, expected in ((0.25, 1.5), (0.5, 2.0), (0.75, 3.0), (0.99, 3.96), (1.0, 4.0)):
            with self.subTest(share):
                self.assertAlmostEqual(quantile(share, spread, mean=9), expected)

    def test_the_first_bucket_begins_at_zero(self):
        self.assertAlmostEqual(quantile(0.5, buckets(le_0_5=8, le_1=9, le_inf=9), mean=9), 0.28125)

    def test_if_all_are_in_one_bucket_their_mean_says_more_than_its_bounds(self):
        for share in (0.5, 0.99):
            self.assertEqual(quantile(share, buckets(le_2=0, le_5=0.5, le_inf=0.5), mean=4.9), 4.9)

    def test_beyond_the_last_bound_that_bound_is_all_that_is_known(self):
        self.assertEqual(quantile(0.99, buckets(le_1=1, le_10=1, le_inf=100), mean=9), 10.0)

    def test_the_series_of_several_statuses_are_added_up(self):
        self.assertAlmostEqual(
            quantile(0.5, buckets(le_1=10, le_2=10, le_inf=10)
                     + buckets(le_1=0, le_2=10, le_inf=10), mean=9), 1.0)

    def test_without_observations_there_is_none(self):
        for empty in ([], buckets(le_1=0, le_inf=0)):
            self.assertIsNone(quantile(0.5, empty, mean=0))


if __name__ == "__main__":
    unittest.main()
