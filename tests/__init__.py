"""The tests of microshop. `make test`, or `python -m unittest`, runs them all.

Where to look:

    test_<module>.py            tests of microshop/<module>.py; those of chassis/ and watching/ are
                                in folders of the same names
    test_seed.py                what the first version answered, byte for byte (golden.json)
    test_saga.py test_failures.py test_crash.py test_storage.py    what happens when something fails
    test_contracts.py           what the processes need of each other (contracts/, contract.py)
    test_hosts.py               what happens when the network between hosts fails
    test_metrics.py test_traces.py test_server_timing.py    what can be seen of a running shop
    test_laws.py test_readme.py test_new_service.py    what the source and the README must keep to
    helpers.py collection.py observing.py source.py    what several test modules share
    formats.py                  strict parsers for what the shop shows of itself
    browser.py                  drives a real browser, if there is one: for test_live_page.py
    hosts.py                    several hosts on this machine: network namespaces of Linux
    watching/told.py            what processes show of themselves, written by hand
    journal.py                  remembers requests and log lines, and shows them with a failure
    exercise.py exercises/      exercises for learners; proofs.py proves that each does what it says
    lanes.py                    runs the whole suite in several processes at once
    chaos.py fuzz.py soak.py bench.py conformance.py cluster.py    longer runs: see `make help`
    front.py                    the README's systemd unit and nginx, for conformance.py
    report.py                   what conformance.py and cluster.py print: a line for each check
    podman.py                   runs the pods of the manifest in containers, for cluster.py
    peers.py aiohttp_pair.py textbook.py    what bench.py compares the shop with; the tour shows
                                textbook.py, too

One module alone: `python -m unittest tests.test_users`. The assignments below are the hooks of
journal.py and lanes.py: unittest prints results with the class, and calls the package's
load_tests() to find the tests.
"""
import unittest

import microshop  # noqa: F401  # first, since it ends a Python that is too old, with one line
from tests import journal, lanes

unittest.TextTestRunner.resultclass = journal.TextResult
load_tests = lanes.load_tests
