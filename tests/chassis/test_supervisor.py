"""How children are replaced and ended, and their cores. test_run_all has real processes."""
import itertools
import math
import unittest
from fractions import Fraction
from types import SimpleNamespace
from typing import Any
from unittest import mock

from microshop.chassis import supervisor as module
from microshop.chassis.child import Child
from microshop.chassis.supervisor import RollingRestart, Shutdown, Supervisor, assign_cores
from tests.chassis.test_resilience import Clock


def child_that_is_up(name: str) -> Child:
    """Return a child with a stand-in for a process."""
    child = Child(name, "stub", mock.Mock(), [], {})
    child.policy.note_start()
    child.policy.note_ready()
    child.current = mock.Mock(is_ending=False)
    return child


class RollingRestartTest(unittest.TestCase):
    def setUp(self):
        self.users, self.orders = child_that_is_up("users"), child_that_is_up("orders")
        self.restart = RollingRestart([self.users, self.orders])
        self.restart.is_requested = True

    def replace(self, child: Child) -> None:
        """Start a new process beside the present one."""
        child.former, child.current = child.current, mock.Mock(is_ending=False)
        child.policy.note_start()

    def make_ready(self, child: Child) -> bool:
        """Let the new process become ready and the former one end."""
        child.policy.note_ready()
        is_last = self.restart.note_ready(child)
        child.former = None
        return is_last

    def test_nothing_is_replaced_without_a_request(self):
        self.restart.is_requested = False
        self.assertFalse(self.restart.begin())
        self.assertIsNone(self.restart.next_child())

    def test_children_are_replaced_one_after_another(self):
        self.assertTrue(self.restart.begin())
        self.assertIs(self.restart.next_child(), self.users)
        self.replace(self.users)
        self.assertIsNone(self.restart.next_child(), "users is not ready yet")
        self.assertFalse(self.make_ready(self.users))
        self.assertIs(self.restart.next_child(), self.orders)
        self.replace(self.orders)
        self.assertTrue(self.make_ready(self.orders), "orders was the last one")
        self.assertIsNone(self.restart.next_child())

    def test_a_child_whose_former_process_still_ends_is_not_replaced_yet(self):
        self.users.former = mock.Mock(is_ending=True)
        self.restart.begin()
        self.assertIsNone(self.restart.next_child())
        self.users.former = None
        self.assertIs(self.restart.next_child(), self.users)

    def test_a_replacement_that_fails_ends_it_and_is_not_tried_again(self):
        self.restart.begin()
        self.assertIs(self.restart.next_child(), self.users)
        self.replace(self.users)
        self.users.note_end(self.users.current, 1)
        self.assertEqual([self.restart.next_child() for _ in range(3)], [None, None, None])

    def test_after_a_replacement_that_failed_another_request_tries_it_again(self):
        self.test_a_replacement_that_fails_ends_it_and_is_not_tried_again()
        self.restart.is_requested = True
        self.assertTrue(self.restart.begin())
        self.assertIs(self.restart.next_child(), self.users)

    def test_a_child_that_crashed_and_was_started_again_counts_as_replaced(self):
        self.users.note_end(self.users.current, -9)
        self.users.policy.note_start()
        self.restart.begin()
        self.assertIsNone(self.restart.next_child(), "users is not ready yet")
        self.assertFalse(self.make_ready(self.users))
        self.assertIs(self.restart.next_child(), self.orders)

    def test_a_child_that_is_down_does_not_hold_up_the_others(self):
        self.restart.begin()
        self.users.note_end(self.users.current, -9)
        self.assertEqual([self.restart.next_child() for _ in range(2)], [None, self.orders])

    def test_a_child_that_was_down_at_the_beginning_is_not_waited_for_at_the_end(self):
        self.orders.note_end(self.orders.current, -9)
        self.restart.begin()
        self.assertIs(self.restart.next_child(), self.users)
        self.replace(self.users)
        self.assertTrue(self.make_ready(self.users), "users was the last one that ran")

    def test_a_request_during_a_rolling_restart_begins_another_one_after_it(self):
        self.restart.begin()
        self.restart.is_requested = True
        self.assertFalse(self.restart.begin(), "the first one is not finished")
        for child in (self.users, self.orders):
            self.replace(child)
            self.make_ready(child)
        self.assertTrue(self.restart.begin())


class OptionalChildTest(unittest.TestCase):
    """A supervisor of a service, of a child that the shop does not need, and of a gateway."""

    def setUp(self):
        self.users, self.live, self.gateway = [
            Child(name, "stub", mock.Mock(), [], {}, is_optional=name == "live")
            for name in ("users", "live", "gateway")]
        self.console = mock.Mock()
        tiers = [[self.users, self.live], [self.gateway]]
        self.supervisor = Supervisor(tiers, 10.0, self.console)

    def make_ready(self, child: Child) -> None:
        child.policy.note_start()
        child.policy.note_ready()
        self.supervisor._note_ready(child)

    def said_ready(self) -> int:
        return sum("ready in" in call.args[0] for call in self.console.say.call_args_list)

    def test_the_shop_is_ready_once_the_others_are(self):
        self.make_ready(self.users)
        self.assertEqual(self.said_ready(), 0, "before the gateway is ready")
        self.make_ready(self.gateway)
        self.assertEqual(self.said_ready(), 1, "as soon as the gateway is ready")
        self.make_ready(self.live)
        self.assertEqual(self.said_ready(), 1, "when live is ready, too")

    def test_it_does_not_make_the_shop_ready_before_the_others(self):
        self.make_ready(self.live)
        self.assertEqual(self.said_ready(), 0)

    def test_it_is_the_last_to_be_replaced(self):
        for child in (self.users, self.live, self.gateway):
            self.make_ready(child)
        restart, replaced = self.supervisor.rolling_restart, []
        restart.is_requested = True
        restart.begin()
        while child := restart.next_child():
            replaced.append(child.name)
            self.make_ready(child)
        self.assertEqual(replaced, ["users", "gateway", "live"])


class ShutdownTest(unittest.TestCase):
    """A gateway before two services, which has 10 seconds to end."""

    def setUp(self):
        clock = Clock()
        self.enterContext(mock.patch.object(module, "time", SimpleNamespace(monotonic=clock)))
        self.began_at = clock()
        names = ("users", "orders", "gateway")
        self.users, self.orders, self.gateway = map(child_that_is_up, names)
        self.shutdown = Shutdown([[self.users, self.orders], [self.gateway]], grace=10.0)
        self.shutdown.begin()

    def test_the_gateway_ends_first_and_leaves_time_for_the_services(self):
        self.shutdown.end_next_tier()
        self.gateway.current.end.assert_called_once_with(self.began_at + 7.5)
        self.users.current.end.assert_not_called()
        self.orders.current.end.assert_not_called()

    def test_the_services_end_together_when_the_gateway_has_ended(self):
        self.gateway.current = None
        self.shutdown.end_next_tier()
        self.users.current.end.assert_called_once_with(self.began_at + 10.0)
        self.orders.current.end.assert_called_once_with(self.began_at + 10.0)

    def test_the_former_process_of_a_child_ends_too(self):
        self.gateway.former = mock.Mock()
        self.shutdown.end_next_tier()
        self.gateway.former.end.assert_called_once()

    def test_a_port_is_closed_when_its_tier_ends(self):
        self.shutdown.end_next_tier()
        self.gateway.listener.close.assert_called()
        self.users.listener.close.assert_not_called()

    def test_the_second_signal_makes_it_urgent(self):
        self.shutdown.signals.append(2)
        self.assertTrue(self.shutdown.is_requested)
        self.assertFalse(self.shutdown.is_urgent)
        self.shutdown.signals.append(2)
        self.assertTrue(self.shutdown.is_urgent)

    def test_a_closed_terminal_requests_it_and_is_not_urgent_however_often_that_is_noticed(self):
        for _ in range(2):
            self.shutdown.is_unwatched = True
            self.assertTrue(self.shutdown.is_requested)
            self.assertFalse(self.shutdown.is_urgent)

    def test_a_ctrl_c_after_the_terminal_was_closed_is_the_first_signal(self):
        self.shutdown.is_unwatched = True
        self.shutdown.signals.append(2)
        self.assertFalse(self.shutdown.is_urgent)

    def test_it_has_not_begun_before_it_begins(self):
        self.assertTrue(self.shutdown.has_begun)
        self.assertFalse(Shutdown([], grace=math.inf).has_begun)


class CoreTest(unittest.TestCase):
    """Which core each of three services and one or more gateways gets."""

    def cores(self, available: Any, gateways: int = 1) -> list[int | None]:
        services = [Child(name, "stub", mock.Mock(), [], {}) for name in ("a", "b", "c")]
        front = [Child(f"gateway{n}", "stub", mock.Mock(), [], {}) for n in range(gateways)]
        with mock.patch.object(module.os, "sched_getaffinity", create=True,
                               side_effect=[available]):
            assign_cores([services, front])
        return [child.core for child in services + front]

    def test_a_single_gateway_has_a_core_for_itself_and_the_services_share_the_others(self):
        self.assertEqual(self.cores({0, 1}), [1, 1, 1, 0])
        self.assertEqual(self.cores({4, 5, 6}), [5, 6, 5, 4])

    def test_several_gateways_are_spread_over_the_cores_and_then_the_services(self):
        self.assertEqual(self.cores({0, 1}, gateways=2), [0, 1, 0, 0, 1])
        self.assertEqual(self.cores({0, 1, 2}, gateways=2), [2, 2, 0, 0, 1])
        self.assertEqual(self.cores({0, 1, 2, 3}, gateways=2), [2, 3, 2, 0, 1])
        self.assertEqual(self.cores({0, 1}, gateways=3), [1, 0, 1, 0, 1, 0])

    def test_where_there_are_more_cores_than_children_each_child_has_its_own(self):
        self.assertEqual(self.cores(set(range(8))), [1, 2, 3, 0])
        self.assertEqual(self.cores(set(range(8)), gateways=2), [2, 3, 4, 0, 1])

    def test_on_a_single_core_every_child_is_kept_there(self):
        self.assertEqual(self.cores({3}), [3] * 4)
        self.assertEqual(self.cores({3}, gateways=2), [3] * 5)

    def test_every_child_has_a_core_and_the_loads_of_two_cores_differ_by_one_child_at_most(self):
        for size, gateways in itertools.product(range(1, 9), range(1, 9)):
            chosen = self.cores(set(range(size)), gateways)
            case = f"cores: {size}, gateways: {gateways}; the services and they got {chosen}"
            self.assertLessEqual(set(chosen), set(range(size)), f"an invalid core: {case}")
            shares = [Fraction(1, 3)] * 3 + [Fraction(1, gateways)] * gateways
            loads = [[share for share, its_core in zip(shares, chosen, strict=True)
                      if its_core == core] for core in range(size)]
            least = min(map(sum, loads))
            for core, load in enumerate(loads):
                self.assertLessEqual(sum(load) - max(load, default=0), least, f"core {core} has "
                                     f"more load than another, even without a child: {case}")

    def test_where_the_system_does_not_tell_its_cores_no_child_is_kept_on_one(self):
        for error in (PermissionError, AttributeError):
            self.assertEqual(self.cores(error), [None] * 4, error)


if __name__ == "__main__":
    unittest.main()
