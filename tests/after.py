"""Run a module after some code of a test's: `python -m tests.after CODE MODULE FLAGS`.

No product code: so a test gives a process less of something than it would have, time or descriptors.
"""
import runpy
import sys

if __name__ == "__main__":
    _, code, module, *flags = sys.argv
    sys.argv = [module, *flags]
    exec(code)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
