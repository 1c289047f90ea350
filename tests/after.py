"""Run some code of a test's in a process of its own: `python -m tests.after CODE FLAGS`.

No product code: so a test gives a part of the shop less of something than it would have, time or descriptors.
"""
import sys

if __name__ == "__main__":
    code = sys.argv.pop(1)
    exec(code)
