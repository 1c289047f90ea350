"""The regular expressions of microshop and of its tests mean the same on every supported Python."""
import re
import unittest

from tests.helpers import TOP

FOLDERS = ("microshop", "tests")

# The end of a group, and a possessive quantifier. (An escaped parenthesis does not end a group.)
POSSESSIVE_GROUP = re.compile(r"(?<!\\)\)(?:[*+?]|\{[0-9]*,?[0-9]*\})\+")


class PatternTest(unittest.TestCase):
    def test_no_pattern_has_a_possessive_quantifier_after_a_group(self):
        for path in sorted(path for folder in FOLDERS for path in (TOP / folder).rglob("*.py")):
            name = path.relative_to(TOP)
            with self.subTest(file=str(name)):
                lines = path.read_text(encoding="utf-8").splitlines()
                found = [line.strip() for line in lines if POSSESSIVE_GROUP.search(line)]
                self.assertEqual(
                    [], found, f"{name} has a possessive quantifier after a group, which Python "
                    "before 3.11.5 matches wrongly (CPython gh-106052): use an atomic group "
                    "(?>...) instead")

    def test_every_possessive_quantifier_after_a_group_is_found(self):
        for group in ("(?:ab)", "(a|b)", "(?P<name>a)"):
            for quantifier in ("*", "+", "?", "{2}", "{2,}", "{,3}", "{2,3}"):
                with self.subTest(pattern=f"{group}{quantifier}+"):
                    self.assertRegex(f'"{group}{quantifier}+"', POSSESSIVE_GROUP)
                    self.assertNotRegex(f'"{group}{quantifier}"', POSSESSIVE_GROUP)

    def test_possessive_character_classes_and_literal_parentheses_are_allowed(self):
        for pattern in ("[0-9]++", "[ \\t]*+", "[0-9]{1,4}+", r"\(a\)++", "(?>(?:ab)*)"):
            with self.subTest(pattern=pattern):
                self.assertNotRegex(pattern, POSSESSIVE_GROUP)


if __name__ == "__main__":
    unittest.main()
