"""Whether a soak would notice a fault, and a small crowd. `make soak` runs for five minutes."""
import asyncio
import contextlib
import io
import os
import random
import socket
import tempfile
import unittest
from unittest import mock

from microshop.chassis.turns import MAX_SPARE
from microshop.users import Users
from tests import soak
from tests.helpers import Wire, process, read_request, running, upstream, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
needs_proc = unittest.skipUnless(soak.HAS_PROC, "this system does not tell what a process holds")


def wrong(*figures: soak.Figure) -> list[str]:
    report = soak.Report()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report.note("scene", figures)
    if printed.getvalue() != f"scene     {', '.join(figure.text for figure in figures)}\n":
        raise AssertionError(printed.getvalue())
    return report.wrong


class JudgementTest(unittest.TestCase):
    def test_a_figure_within_its_bounds_is_printed_and_is_not_wrong(self):
        self.assertEqual(wrong(
            soak.Figure("{} of 5 came", 5, least=5),
            soak.Figure("after {:.1f} to {:.1f} s", 1, 2, least=1, most=2),
            soak.Figure.none("lost", []), soak.Figure("{} without bounds", 9)), [])

    def test_each_figure_out_of_its_bounds_is_wrong(self):
        for figure in (soak.Figure("{} of 5 came", 4, least=5),
                       soak.Figure("after {} to {} s", 1, 2.1, most=2),
                       soak.Figure("after {} to {} s", 0.9, 2, least=1),
                       soak.Figure.none("lost", ["order 203"])):
            [line] = wrong(soak.Figure("{} fine", 1), figure)
            self.assertIn(figure.text, line)

    def test_the_first_of_the_things_that_must_not_exist_is_shown(self):
        self.assertEqual(soak.Figure.none("lost", ["{203}", 204]).text, "2 lost [{203}]")

    def test_growth_of_a_process_is_wrong_and_the_process_is_named(self):
        before = {name: soak.Holding(2, 10, 20.0) for name in ("users", "orders")}
        self.assertEqual(wrong(*soak.find_growth(before, before)), [])
        for holding, figure in (((99, 10, 20.0), r"\+97 threads \(users\)"),
                                ((2, 99, 20.0), r"\+89 descriptors \(users\)"),
                                ((2, 10, 99.0), r"\+79.0 MiB \(users\)")):
            after = {**before, "users": soak.Holding(*holding)}
            [line] = wrong(*soak.find_growth(before, after))
            self.assertRegex(line, figure)

    def test_connections_that_end_otherwise_or_too_late_are_wrong(self):
        for ends, faults in (([(10, 408)] * 2, 0), ([(10, 408), (10, 200)], 1),
                             ([(10, 408), (12, 408)], 1), ([(10, None)], 2)):
            figures = soak.judge_ends("heads", ends, 408, (10, 11))
            self.assertEqual(len(wrong(*figures)), faults, ends)

    def test_an_order_that_is_lost_or_doubled_is_wrong(self):
        load = soak.Load(0)
        load.keys, load.placed = {"a", "b", "unanswered"}, {203: "a", 204: "b"}
        stored = {201: None, 203: "a", 204: "b", 205: "unanswered"}
        for different, faults in (({}, 0), ({203: "c"}, 1), ({206: None}, 1), ({206: "a"}, 1),
                                  ({206: "no client's"}, 1)):
            rows = [{"id": id, "key": key} for id, key in {**stored, **different}.items()]
            with (self.subTest(different), mock.patch("tests.chaos.query", return_value=rows),
                  mock.patch("tests.soak.find_violations", return_value=[])):
                figures = soak.Soak.compare_orders(mock.Mock(loads=[load]))
                self.assertEqual(len(wrong(*figures)), faults)

    def test_the_command_prints_all_that_is_wrong_and_exits_with_1(self):
        for faults, status in (([], 0), (["this", "that"], 1)):
            with (mock.patch.object(soak, "run", return_value=mock.Mock(wrong=faults)),
                  mock.patch("signal.signal"), mock.patch("sys.argv", ["soak"]),
                  mock.patch("resource.setrlimit"),
                  contextlib.redirect_stdout(io.StringIO()) as printed,
                  self.assertRaises(SystemExit) as end):
                soak.main()
            self.assertEqual(end.exception.code, status)
            self.assertEqual(printed.getvalue().splitlines()[1:],
                             [f"WRONG: {fault}" for fault in faults])


@needs_proc
class HoldingTest(unittest.TestCase):
    def test_a_descriptor_that_stays_is_seen_except_for_pooled_connections(self):
        with (tempfile.TemporaryDirectory() as folder,
              process("microshop.users", "--port", "0", "--data", folder, "--quiet") as users):
            port, pid = users.port("Users service"), users.popen.pid
            wait_until(lambda: soak.hold_of(pid).threads == 3,
                       "three threads: the accept loop, that with the turn, and the log")
            files = soak.hold_of(pid).files
            with Wire(port) as client:
                client.send(b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n")  # opens no database
                client.read()
                self.assertEqual(soak.hold_of(pid).files, files + 1)
                self.assertEqual(soak.hold_of(pid, [port]).files, files)
                ours = os.getpid()
                self.assertEqual(soak.hold_of(ours, [port]).files, soak.hold_of(ours).files - 1)

    def test_memory_that_stays_is_seen(self):
        before = soak.hold_of(os.getpid()).memory
        kept = b"x" * 2**26
        grown = soak.hold_of(os.getpid()).memory - before
        self.assertAlmostEqual(grown, len(kept) / 2**20, delta=16)


class CrowdTest(unittest.TestCase):
    def test_slow_clients_are_answered_and_nothing_is_left_of_them(self):
        async def come_and_go() -> None:
            before, dice = soak.hold_of(os.getpid()), random.Random(1)
            answers = await soak.crowd(users.server_port, 30, 300, dice, [soak.GETS[0], soak.PUT])
            self.assertEqual(answers, {200: 300})
            most = before.threads + MAX_SPARE
            await soak.until(lambda: not soak.hold_of(os.getpid()).threads > most)
            growth = soak.find_growth({"users": before}, {"users": soak.hold_of(os.getpid())})
            self.assertEqual(wrong(*growth), [])

        with running(Users) as users, mock.patch.object(soak, "PAUSE", (0.001, 0.01)):
            asyncio.run(come_and_go())

    def test_an_answer_other_than_200_is_counted_with_its_detail(self):
        with running(Users) as users:
            answers = self.come(users.server_port)
        detail = "there is nothing at /products/101; try /users, /users/{id}, /health"
        self.assertEqual(answers, {f"404: {detail}": 8})

    def test_an_answer_that_does_not_come_is_counted_as_an_error(self):
        with upstream(lambda connection: connection.recv(1)) as url:
            answers = self.come(int(url.rpartition(":")[2]))
        self.assertEqual(answers.total(), 4, answers)
        self.assertNotIn(200, answers)

    def come(self, port):
        """Let four slow clients, and none that is silent, send 8 requests."""
        with mock.patch.object(soak, "PAUSE", (0, 0)):
            return asyncio.run(soak.crowd(port, 4, 8, random.Random(1), [soak.GETS[1]]))


class LoadTest(unittest.TestCase):
    def ask_twice(self, *answers: bytes) -> soak.Load:
        """Send two requests to a server that closes each connection after these answers."""
        def answer(connection: socket.socket) -> None:
            for each in answers:
                read_request(connection)
                connection.sendall(each)

        async def ask() -> None:
            client = soak.Connection(load.port)
            for _ in range(2):
                await load.ask(client, soak.GETS[0])
            client.close()

        with upstream(answer) as url:
            load = soak.Load(int(url.rpartition(":")[2]))
            asyncio.run(ask())
        return load

    def test_a_request_on_a_kept_connection_that_closes_without_a_byte_is_sent_once_more(self):
        load = self.ask_twice(OK, b"")
        self.assertEqual((load.count, load.retries, load.failed), (2, 1, []))

    def test_a_half_answered_request_and_the_first_of_a_connection_are_not_sent_again(self):
        for answers, failures in (((OK, OK[:12]), 1), ((OK, OK[:-4]), 1), ((b"",), 2)):
            load = self.ask_twice(*answers)
            self.assertEqual((load.retries, len(load.failed)), (0, failures), load.failed)

    def test_an_answer_that_is_not_a_success_has_failed(self):
        answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
        [failure, _] = self.ask_twice(answer).failed
        self.assertEqual(failure, "GET /users: 503 busy")


if __name__ == "__main__":
    unittest.main()
