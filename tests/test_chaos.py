"""A short run of chaos, and whether it would notice a loss. `make chaos` runs for a minute."""
import contextlib
import io
import os
import random
import signal
import sqlite3
import tempfile
import time
import unittest
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path
from unittest import mock

from microshop import SERVICES
from tests import chaos
from tests.helpers import Answered

SEED, PACE = 50, 0.1  # seconds from one fault to the next
SHOP = {"gateway", *SERVICES}
BOUGHT = {"userId": 1, "productId": 101, "quantity": 3}


def answered(status: int) -> Answered:
    return Answered(status, {"location": "/orders/203"}, b"")


def placed(status: int = 201, cancelled: int | None = None) -> chaos.Placed:
    return chaos.Placed("client0-0", BOUGHT, answered(status), cancelled and answered(cancelled))


def stored(order_id: int = 203, **different: object) -> dict[int, dict]:
    """Return the rows of the orders service: one order, perhaps different from what was wanted."""
    row = {"id": order_id, "key": "client0-0", **BOUGHT, "status": "confirmed", **different}
    return {order_id: row}


class OneRunTest(unittest.TestCase):
    """A run goes on until it has seen all that is asserted here; then it is judged."""

    @classmethod
    def setUpClass(cls):
        with mock.patch.object(chaos, "PACE", PACE):
            cls.report = chaos.run(seconds=0, seed=SEED, clients=6)

    def test_every_process_was_killed_and_stopped_and_came_back(self):
        report = self.report
        for what, counts in (("killed", report.kills), ("stopped", report.stops),
                             ("started again", report.restarts)):
            self.assertEqual(set(+counts), SHOP, f"processes that were {what} in:\n{report}")

    def test_clients_placed_cancelled_and_repeated_orders_until_they_were_answered(self):
        self.assertEqual(self.report.unseen, [], f"not seen in:\n{self.report}")

    def test_every_order_is_stored_once_and_as_its_client_was_answered_and_the_stock_adds_up(self):
        self.assertEqual(self.report.wrong, [], f"wrong in:\n{self.report}")


class UnseenTest(unittest.TestCase):
    def test_a_run_says_what_it_has_not_seen(self):
        report = chaos.Report(seed=1, answers=Counter({201: 1, 409: 1}), cancels=1, retries=2,
                              kills=Counter(SHOP), stops=Counter(SHOP - {"users"}),
                              locks=Counter(["users"]))
        self.assertEqual(
            set(report.unseen), {"replayed answer", "order answered 422", "stop of users",
                                 "clock that jumps", *(f"restart of {name}" for name in SHOP)})

    def test_a_run_that_never_sees_enough_ends_and_is_wrong(self):
        run = mock.Mock(seconds=0, report=chaos.Report(seed=1, seconds=chaos.EXTRA_TIME + 1))
        self.assertTrue(chaos.Run.is_done(run))
        self.assertIn("order answered 422", run.report.wrong[0])

    def test_a_run_goes_on_until_its_time_is_over_and_all_was_seen(self):
        for seconds, unseen, is_done in ((1, [], False), (5, ["a kill"], False), (5, [], True)):
            run = mock.Mock(seconds=5, report=mock.Mock(seconds=seconds, unseen=unseen))
            self.assertEqual(chaos.Run.is_done(run), is_done, (seconds, unseen))


class ShopTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.shop = self.enterContext(contextlib.closing(chaos.Shop(self.folder)))
        self.shop.wait_for("ready in")

    def test_no_process_outlives_the_shop_even_if_it_is_stopped_and_its_supervisor_killed(self):
        shop = self.shop
        self.assertEqual(set(shop.children()), SHOP)
        shop.send_all(signal.SIGSTOP)
        shop.popen.kill()
        shop.popen.wait()
        self.assertEqual(set(shop.children()), SHOP)
        shop.close()
        chaos.wait_until(lambda: not shop.children(), "the processes of a closed shop to end")

    def test_a_lock_kills_the_service_and_lasts_until_it_is_repaired(self):
        def begin() -> None:
            with contextlib.closing(sqlite3.connect(path, timeout=0)) as database:
                database.execute("BEGIN IMMEDIATE")

        path = self.folder / "users.db"
        before = self.shop.children()["users"]
        self.shop.inject("users", chaos.LOCK)
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            begin()
        self.shop.repair()
        begin()
        self.shop.wait_for("Users service listening", times=2)
        self.assertNotEqual(self.shop.children()["users"], before, "the process was not killed")

    def test_the_clock_of_a_process_jumps_ahead_and_back(self):
        def ahead() -> float:
            told = chaos.ask(port, "GET", "/orders").headers["date"]
            return parsedate_to_datetime(told).timestamp() - time.time()

        port = self.shop.port("Orders service")
        self.shop.inject("orders", chaos.AHEAD)
        chaos.wait_until(lambda: ahead() > 24 * 3600, "the clock to be a day ahead")
        self.shop.repair()
        chaos.wait_until(lambda: ahead() < 60, "the clock to be right again")


class ScheduleTest(unittest.TestCase):
    def test_each_round_has_each_fault_whatever_the_seed(self):
        for seed in range(100):
            faults = chaos.schedule_round(random.Random(seed))
            for kind in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT):
                names = sorted(fault.name for fault in faults if fault.kind == kind)
                self.assertEqual(names, sorted(SHOP), f"{kind.name} with seed {seed}")
            kinds = Counter(fault.kind for fault in faults)
            for kind in (chaos.LOCK, chaos.UNLOCK, chaos.AHEAD, chaos.BACK):
                self.assertEqual(kinds[kind], 1, f"{kind} with seed {seed}")

    def test_each_fault_that_lasts_is_undone_later(self):
        undone = {signal.SIGSTOP: signal.SIGCONT, chaos.LOCK: chaos.UNLOCK,
                  chaos.AHEAD: chaos.BACK}
        for seed in range(100):
            faults = chaos.schedule_round(random.Random(seed))
            at = {(fault.name, fault.kind): fault.at for fault in faults}
            for _, name, kind in faults:
                if kind in undone:
                    self.assertGreater(at[name, undone[kind]], at[name, kind], (kind, seed))

    def test_a_seed_repeats_its_schedule_and_another_seed_does_not(self):
        def schedule(seed: int) -> list[list[chaos.Fault]]:
            dice = random.Random(seed)
            return [chaos.schedule_round(dice) for _ in range(10)]

        self.assertEqual(schedule(1), schedule(1))
        self.assertNotEqual(schedule(1), schedule(2))
        first, second, *_ = schedule(1)
        self.assertNotEqual(first, second, "two rounds of one run")


class JudgementTest(unittest.TestCase):
    """Whether wrong databases would be noticed."""

    def test_an_order_may_end_as_its_client_was_answered(self):
        for order, status in (
                (placed(201), "confirmed"), (placed(202), "confirmed"), (placed(202), "rejected"),
                (placed(409), "rejected"), (placed(422), "rejected"),
                (placed(201, 200), "cancelled"), (placed(202, 202), "cancelled"),
                (placed(202, 409), "rejected")):
            with self.subTest(order, status=status):
                self.assertEqual(chaos.find_losses([order], stored(status=status)), [])

    def test_an_order_that_is_not_stored_as_its_client_was_answered_is_lost(self):
        for order, orders in (
                (placed(), {}), (placed(), stored(204)), (placed(), stored(key=None)),
                (placed(), stored(key="client0-1")), (placed(), stored(quantity=4)),
                (placed(), stored(userId=2)), (placed(), stored(status="cancelled")),
                (placed(), stored(status="rejected")), (placed(202), stored(status="pending")),
                (placed(202), stored(status="cancelled")), (placed(409), stored()),
                (placed(422), stored()), (placed(201, 200), stored()),
                (placed(201, 202), stored(status="cancelling")), (placed(202, 409), stored())):
            with self.subTest(order, orders=orders):
                [loss] = chaos.find_losses([order], orders)
                self.assertIn("client0-0", loss)

    def test_an_order_that_no_client_knows_is_a_double(self):
        for different in ({"key": None}, {}):
            orders = {**stored(), **stored(204, **different)}
            [double] = chaos.find_doubles([placed()], orders)
            self.assertIn("204", double)

    def test_seed_orders_and_an_order_whose_client_has_no_answer_yet_are_not_doubles(self):
        orders = {**stored(), **stored(201, key=None), **stored(202, key=None),
                  **stored(204, key="client0-1")}
        self.assertEqual(chaos.find_doubles([placed()], orders), [])

    def test_units_that_are_neither_free_nor_sold_make_the_stock_wrong(self):
        mice = chaos.SUPPLIED[102]
        orders = {**stored(), **stored(204, status="rejected")}
        for free, excess in (({101: 98, 102: mice}, {}), ({101: 101, 102: mice}, {101: 3}),
                             ({101: 98}, {102: -mice})):
            self.assertEqual(chaos.find_wrong_stock(orders, free), excess, f"free: {free}")


class CommandTest(unittest.TestCase):
    def finish(self, **wrong: object) -> tuple[int, str, list[str]]:
        """Let a run end with a report; return the exit status, what it printed, and its folders."""
        report = chaos.Report(seed=1, kills=Counter(users=2, orders=1), **wrong)
        chaotic = mock.Mock(run=lambda: report, shop=mock.Mock(lines=["run_all  | stopped"]))
        home = self.enterContext(tempfile.TemporaryDirectory())
        with (mock.patch.object(chaos, "Run", return_value=chaotic),
              mock.patch("sys.argv", ["chaos"]), mock.patch("tempfile.tempdir", home),
              mock.patch("signal.signal"), contextlib.redirect_stdout(io.StringIO()) as printed,
              self.assertRaises(SystemExit) as end):
            chaos.main()
        folders = [str(Path(home, name)) for name in os.listdir(home)]
        return end.exception.code, printed.getvalue(), folders

    def test_a_run_without_losses_exits_with_0_and_leaves_no_folder(self):
        status, printed, folders = self.finish()
        self.assertEqual((status, folders), (0, []))
        for line in (r"losses +0", r"doubles +0", r"stock off +0",
                     r"kills +3 +\(orders 1, users 2\)"):
            self.assertRegex(printed, f"(?m)^{line}$")

    def test_whatever_is_wrong_is_printed_and_its_data_are_kept(self):
        for wrong in ({"losses": ["this"]}, {"doubles": ["this"]}, {"violations": ["this"]},
                      {"wrong_stock": {101: -3}}):
            with self.subTest(wrong):
                status, printed, [folder] = self.finish(**wrong)
                self.assertEqual(status, 1)
                self.assertRegex(printed, r"(?m)^WRONG: .*(this|101.*-3)")
                self.assertIn(folder, printed)
                self.assertEqual(os.listdir(folder), ["shop.log"])

    def test_progress_is_told_while_it_runs(self):
        lines = []
        clock = mock.Mock(side_effect=(20.0 * number for number in range(100)))
        run = mock.Mock(report=chaos.Report(seed=1), tell=lines.append)
        run.ending.wait.return_value = False
        run.is_done.side_effect = [False, False, True]
        with mock.patch("time.monotonic", clock):
            chaos.Run.inject_faults(run)
        self.assertEqual(len(lines), 2, lines)
        self.assertRegex(lines[0], "0 orders, 0 retries, 0 kills, [01] stops")


if __name__ == "__main__":
    unittest.main()
