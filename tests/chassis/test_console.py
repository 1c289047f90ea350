"""What a person sees of the processes: labels and colours."""
import unittest

from microshop.chassis.console import COLOURS, make_labels


class LabelTest(unittest.TestCase):
    def test_labels_are_as_wide_as_the_longest_name(self):
        labels = make_labels("run_all", ["users", "recommendations"], coloured=False)
        self.assertEqual(labels, {
            "run_all": b"run_all         | ",
            "users": b"users           | ",
            "recommendations": b"recommendations | ",
        })

    def test_labels_are_of_equal_width_with_colours_too(self):
        labels = make_labels("run_all", ["users", "products"], coloured=True)
        self.assertEqual(labels["users"], f"\33[{COLOURS[0]}musers    | \33[0m".encode())
        self.assertEqual(labels["products"], f"\33[{COLOURS[1]}mproducts | \33[0m".encode())

    def test_a_name_that_is_added_later_changes_no_other_colour(self):
        three = make_labels("run_all", ["users", "products", "orders"], coloured=True)
        five = make_labels("run_all", ["users", "products", "orders", "a", "b"], coloured=True)
        self.assertEqual(three, {name: five[name] for name in three})

    def test_each_name_has_a_colour_of_its_own(self):
        names = [f"service{number}" for number in range(len(COLOURS))]
        labels = make_labels("run_all", names, coloured=True)
        colours = {label.partition(b"m")[0] for label in labels.values()}
        self.assertEqual(len(colours), len(names) + 1)

    def test_more_names_than_colours_use_the_colours_again(self):
        names = [f"service{number}" for number in range(len(COLOURS) + 1)]
        labels = make_labels("run_all", names, coloured=True)
        first, last = labels[names[0]], labels[names[-1]]
        self.assertEqual(first.partition(b"m")[0], last.partition(b"m")[0])


if __name__ == "__main__":
    unittest.main()
