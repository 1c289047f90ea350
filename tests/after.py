"""Run code of a test's in a process of its own: `python -m tests.after CODE FLAGS`.

So a test starts a part of the shop with other constants, or with less memory or fewer descriptors.
"""
import sys

if __name__ == "__main__":
    code = sys.argv.pop(1)
    exec(code)
