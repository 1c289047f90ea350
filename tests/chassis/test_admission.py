"""Rate limit and bearer token."""
import sys
import unittest

from microshop.chassis.admission import Rate, RateLimit, client_of, is_bearer
from tests.chassis.test_resilience import Clock


class RateLimitTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()

    def test_a_client_may_send_a_burst_and_then_has_to_wait_for_each_token(self):
        limit = RateLimit(Rate(10, 1), self.clock)
        self.assertEqual([limit.take("a") for _ in range(10)], [0.0] * 10)
        self.assertAlmostEqual(limit.take("a"), 0.1)
        self.assertEqual(limit.take("b"), 0, "another client has a bucket of its own")
        self.clock.now += 0.05
        self.assertAlmostEqual(limit.take("a"), 0.05, msg="a rejected request takes no token")
        self.clock.now += 0.05
        self.assertEqual(limit.take("a"), 0)
        self.assertGreater(limit.take("a"), 0)
        self.clock.now += 100
        burst = [limit.take("a") for _ in range(50)]
        self.assertEqual(burst.count(0), 10, "a bucket holds no more than one burst")

    def test_in_the_long_run_a_client_gets_the_rate(self):
        for rate in (Rate(7, 1), Rate(100, 1), Rate(600, 60), Rate(5000, 3600)):
            limit = RateLimit(rate, self.clock)
            taken = 0
            for _ in range(20000):
                self.clock.now += rate.seconds / rate.requests / 4
                taken += limit.take("a") == 0
            self.assertAlmostEqual(taken, 5000 + rate.requests, delta=2, msg=f"{rate}")

    def test_many_clients_need_no_more_memory_and_recent_ones_are_remembered(self):
        limit = RateLimit(Rate(1, 60), self.clock)
        limit.take("client 7")
        for number in range(RateLimit.MOST_CLIENTS):
            limit.take(f"client {number}")
        size = sys.getsizeof(limit._full_at)
        for number in range(200_000):
            limit.take(f"{number}")
            if number % 5000 == 0:
                self.clock.now += 0.1
                for recent in ("client 7", f"{number}"):
                    self.assertGreater(limit.take(recent), 0, f"{recent!r} was forgotten")
        self.assertLessEqual(len(limit._full_at), RateLimit.MOST_CLIENTS)
        self.assertLess(sys.getsizeof(limit._full_at), size * 4)

    def test_a_client_is_an_ipv4_address_or_an_ipv6_network(self):
        for address, client in (
                ("127.0.0.1", "127.0.0.1"),
                ("::ffff:10.0.0.7", "10.0.0.7"),
                ("2001:db8::1", "2001:db8::/64"),
                ("2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
                ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
                ("fe80::1%lo", "fe80::/64"),
                ("::1", "::/64")):
            self.assertEqual(client_of(address), client, address)


class BearerTest(unittest.TestCase):
    def test_nothing_but_the_exact_token_is_accepted(self):
        token = "s3cret-._~+/=="
        for shown in (f"Bearer {token}", f"bearer {token}", f"BEARER  {token} "):
            self.assertTrue(is_bearer(shown, token), shown)
        for shown in (
                "", "Bearer", "Bearer ", token, f"Basic {token}", "Bearer s3cret-._~+/=",
                f"Bearer {token}=", "Bearer S3cret-._~+/==", f"Bearer {token}, Bearer x",
                f"Bearer\t{token}", "Bearer \xe9", f"Bearer {token}\xff"):
            self.assertFalse(is_bearer(shown, token), shown)


if __name__ == "__main__":
    unittest.main()
