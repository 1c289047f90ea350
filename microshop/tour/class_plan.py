"""For teachers: plans for a class."""
TEXT = ""
