"""Metrics in the text format of Prometheus. What is counted is tested in tests/test_metrics.py."""
import unittest

from microshop.chassis.metrics import BUCKETS, Histogram, format_metrics, gauge
from tests.formats import parse_metrics


class HistogramTest(unittest.TestCase):
    def setUp(self):
        self.histogram = Histogram("things_seconds", "Durations of things.",
                                   lambda name: {"name": name})

    def bucket(self, bound):
        """Return how many observations a bucket has, according to a strict parser."""
        text = format_metrics([self.histogram.family()])
        return parse_metrics(text.encode()).total("things_seconds_bucket", le=bound)

    def test_a_duration_that_equals_a_bound_is_in_that_bucket(self):
        for bound in BUCKETS:
            self.histogram.observe(("a",), bound)
        self.assertEqual([self.bucket(format(bound)) for bound in BUCKETS],
                         list(range(1, len(BUCKETS) + 1)))

    def test_a_duration_beyond_all_bounds_is_only_in_the_last_bucket(self):
        self.histogram.observe(("a",), BUCKETS[-1] + 1)
        self.assertEqual((self.bucket(format(BUCKETS[-1])), self.bucket("+Inf")), (0, 1))

    def test_hostile_values_of_labels_are_escaped(self):
        for name in ('a"b', "a\\b", "a\nb", 'x"} 1'):
            self.histogram.observe((name,), 1)
        text = format_metrics([self.histogram.family()])
        names = {labels["name"] for labels, _ in
                 parse_metrics(text.encode()).find("things_seconds_count")}
        self.assertEqual(names, {'a"b', "a\\b", "a\nb", 'x"} 1'})

    def test_a_metric_without_labels_has_no_braces(self):
        self.assertIn("\nup 1\n", format_metrics([gauge("up", "Whether it is up.", 1)]))


if __name__ == "__main__":
    unittest.main()
