"""Some seconds of chaos, and whether it would notice: `make chaos` is the same for a minute, at a slower pace."""
import contextlib
import io
import os
import signal
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from unittest import mock

from tests import chaos
from tests.helpers import Answered

SEED, PACE = 50, 0.1  # of a round that takes two seconds
SHOP = {"gateway", "users", "products", "orders"}
needs_signals = unittest.skipUnless(hasattr(signal, "SIGSTOP"), "this system cannot stop a process for a while")
BOUGHT = {"userId": 1, "productId": 101, "quantity": 3}


def told(status: int) -> Answered:
    return Answered(status, {"location": "/orders/203"}, b"")


def placed(status: int = 201, cancelled: int | None = None) -> chaos.Placed:
    return chaos.Placed("client0-0", BOUGHT, told(status), cancelled and told(cancelled))


def book(order_id: int = 203, **different: object) -> dict[int, dict]:
    """Return what the orders service has written down: one order, perhaps different from what was wanted."""
    return {order_id: {"id": order_id, "key": "client0-0", **BOUGHT, "status": "confirmed", **different}}


@needs_signals
class OneRoundTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with mock.patch.object(chaos, "PACE", PACE):
            cls.report = chaos.run(seconds=0, seed=SEED, clients=6)

    def test_every_process_was_killed_and_stopped_and_came_back(self):
        for counts in (self.report.kills, self.report.stops, self.report.restarts):
            self.assertEqual(set(+counts), SHOP)

    def test_clients_placed_orders_and_cancelled_some_and_asked_until_they_were_answered(self):
        for status in (201, 409, 422):
            self.assertGreater(self.report.told[status], 0)
        self.assertGreater(self.report.cancels, 0)
        self.assertGreater(self.report.retries, 0)
        self.assertGreater(self.report.resent, 0)

    def test_every_order_is_as_its_client_was_told_and_there_once_and_the_stock_adds_up(self):
        self.assertEqual(self.report.wrong, [], self.report)


@needs_signals
class ShopTest(unittest.TestCase):
    def test_no_process_outlives_the_shop_not_even_one_that_stands_still_and_has_lost_its_supervisor(self):
        with (tempfile.TemporaryDirectory() as folder, contextlib.closing(chaos.Shop(Path(folder))) as shop):
            shop.wait_for("ready in")
            self.assertEqual(set(shop.children()), SHOP)
            shop.hit_all(signal.SIGSTOP)
            shop.popen.kill()
            shop.popen.wait()
            self.assertEqual(set(shop.children()), SHOP)
            shop.close()
            chaos.wait_until(lambda: not shop.children(), f"{shop.children()} did not end")


@needs_signals
class ScheduleTest(unittest.TestCase):
    def test_each_process_is_killed_and_stopped_however_short_the_time_and_whatever_the_seed(self):
        for seed in range(100):
            blows = {(name, number) for _, name, number in chaos.plan_blows(seed, 0)}
            for number in (signal.SIGKILL, signal.SIGSTOP):
                self.assertEqual({name for name in SHOP if (name, number) in blows}, SHOP)

    def test_a_seed_repeats_the_schedule_and_another_does_not(self):
        self.assertEqual(chaos.plan_blows(1, 60), chaos.plan_blows(1, 60))
        self.assertNotEqual(chaos.plan_blows(1, 60), chaos.plan_blows(2, 60))

    def test_blows_fall_as_long_as_it_lasts(self):
        self.assertGreater(chaos.plan_blows(1, 60)[-1].at, 55)


class JudgementTest(unittest.TestCase):
    """What would be noticed, shown on books that are wrong."""

    def test_an_order_may_end_as_its_client_was_told(self):
        for order, status in ((placed(201), "confirmed"), (placed(202), "confirmed"), (placed(202), "rejected"),
                              (placed(409), "rejected"), (placed(422), "rejected"), (placed(201, 200), "cancelled"),
                              (placed(202, 202), "cancelled"), (placed(202, 409), "rejected")):
            with self.subTest(order, status=status):
                self.assertEqual(chaos.find_losses([order], book(status=status)), [])

    def test_an_order_that_is_not_as_its_client_was_told_is_lost(self):
        for order, orders in (
                (placed(), {}), (placed(), book(204)), (placed(), book(key=None)), (placed(), book(key="client0-1")),
                (placed(), book(quantity=4)), (placed(), book(userId=2)), (placed(), book(status="cancelled")),
                (placed(), book(status="rejected")), (placed(202), book(status="pending")),
                (placed(202), book(status="cancelled")), (placed(409), book()), (placed(422), book()),
                (placed(201, 200), book()), (placed(201, 202), book(status="cancelling")), (placed(202, 409), book())):
            with self.subTest(order, orders=orders):
                [loss] = chaos.find_losses([order], orders)
                self.assertIn("client0-0", loss)

    def test_an_order_that_nobody_was_told_of_is_a_double(self):
        for different in ({"key": None}, {}):
            [double] = chaos.find_doubles([placed()], {**book(), **book(204, **different)})
            self.assertIn("204", double)

    def test_the_seeds_orders_and_one_whose_client_has_no_answer_yet_are_no_doubles(self):
        orders = {**book(), **book(201, key=None), **book(202, key=None), **book(204, key="client0-1")}
        self.assertEqual(chaos.find_doubles([placed()], orders), [])

    def test_stock_is_off_by_what_is_neither_free_nor_sold(self):
        mice = chaos.SUPPLIED[102]
        for free, off in ({101: 98, 102: mice}, {}), ({101: 101, 102: mice}, {101: 3}), ({101: 98}, {102: -mice}):
            self.assertEqual(chaos.find_stock_off({**book(), **book(204, status="rejected")}, free), off)


class CommandTest(unittest.TestCase):
    def finish(self, **wrong: object) -> tuple[int, str, list[str]]:
        """Let a run end with a report; return the exit status, what is printed and which folders are left."""
        report = chaos.Report(seed=1, kills=Counter(users=2, orders=1), **wrong)
        chaotic = mock.Mock(run=lambda: report, shop=mock.Mock(lines=["run_all  | stopped"]))
        home = self.enterContext(tempfile.TemporaryDirectory())
        with (mock.patch.object(chaos, "Run", return_value=chaotic), mock.patch("sys.argv", ["chaos"]),
              mock.patch("tempfile.tempdir", home), mock.patch("signal.signal"),
              contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit) as end):
            chaos.main()
        return end.exception.code, printed.getvalue(), [str(Path(home, name)) for name in os.listdir(home)]

    def test_all_is_well(self):
        status, printed, folders = self.finish()
        self.assertEqual((status, folders), (0, []))
        for line in (r"losses +0", r"doubles +0", r"stock off +0", r"kills +3 +\(orders 1, users 2\)"):
            self.assertRegex(printed, f"(?m)^{line}$")

    def test_whatever_is_wrong_is_told_and_its_data_are_kept(self):
        for wrong in ({"losses": ["this"]}, {"doubles": ["this"]}, {"faults": ["this"]}, {"stock_off": {101: -3}}):
            with self.subTest(wrong):
                status, printed, [folder] = self.finish(**wrong)
                self.assertEqual(status, 1)
                self.assertRegex(printed, r"(?m)^WRONG: .*(this|101.*-3)")
                self.assertIn(folder, printed)
                self.assertEqual(os.listdir(folder), ["shop.log"])


if __name__ == "__main__":
    unittest.main()
