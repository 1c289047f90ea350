"""Rate limit and bearer token."""
import sys
import unittest

from microshop.chassis.admission import Rate, RateLimit, client_of, is_bearer
from tests.chassis.test_resilience import Clock


class RateLimitTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()

    def test_a_client_may_send_all_at_once_and_then_as_they_come(self):
        limit = RateLimit(Rate(10, 1), self.clock)
        self.assertEqual([limit.take("a") for _ in range(10)], [0.0] * 10)
        self.assertAlmostEqual(limit.take("a"), 0.1)
        self.assertEqual(limit.take("b"), 0)
        self.clock.now += 0.05
        self.assertAlmostEqual(limit.take("a"), 0.05)  # asking costs nothing
        self.clock.now += 0.05
        self.assertEqual(limit.take("a"), 0)
        self.assertGreater(limit.take("a"), 0)
        self.clock.now += 100
        self.assertEqual(sum(limit.take("a") == 0 for _ in range(50)), 10)

    def test_in_the_long_run_it_is_the_rate(self):
        for rate in (Rate(7, 1), Rate(100, 1), Rate(600, 60), Rate(5000, 3600)):
            limit = RateLimit(rate, self.clock)
            taken = 0
            for _ in range(20000):
                self.clock.now += rate.seconds / rate.requests / 4
                taken += limit.take("a") == 0
            self.assertAlmostEqual(taken, 5000 + rate.requests, delta=2)

    def test_however_many_clients_come_they_cost_no_more_memory_than_some(self):
        limit = RateLimit(Rate(1, 60), self.clock)
        limit.take("client 7")
        for number in range(RateLimit.MOST_CLIENTS):
            limit.take(f"client {number}")
        size = sys.getsizeof(limit._full_at)
        for number in range(200_000):
            limit.take(f"{number}")
            if number % 5000 == 0:
                self.clock.now += 0.1
                self.assertGreater(limit.take("client 7"), 0)  # who is seen is remembered
                self.assertGreater(limit.take(f"{number}"), 0)
        self.assertLessEqual(len(limit._full_at), RateLimit.MOST_CLIENTS)
        self.assertLess(sys.getsizeof(limit._full_at), size * 4)

    def test_a_client_is_an_ipv4_address_or_an_ipv6_network(self):
        for address, client in (("127.0.0.1", "127.0.0.1"), ("::ffff:10.0.0.7", "10.0.0.7"),
                                ("2001:db8::1", "2001:db8::/64"), ("2001:db8::ffff:ffff:ffff:ffff", "2001:db8::/64"),
                                ("2001:db8:0:1::1", "2001:db8:0:1::/64"), ("fe80::1%lo", "fe80::/64"),
                                ("::1", "::/64")):
            self.assertEqual(client_of(address), client)


class BearerTest(unittest.TestCase):
    def test_only_the_token_itself_will_do(self):
        for shown in ("Bearer s3cret-._~+/==", "bearer s3cret-._~+/==", "BEARER  s3cret-._~+/== "):
            self.assertTrue(is_bearer(shown, "s3cret-._~+/=="), shown)
        for shown in ("", "Bearer", "Bearer ", "s3cret-._~+/==", "Basic s3cret-._~+/==", "Bearer s3cret-._~+/=",
                      "Bearer s3cret-._~+/===", "Bearer S3cret-._~+/==", "Bearer s3cret-._~+/==, Bearer x",
                      "Bearer\ts3cret-._~+/==", "Bearer \xe9", "Bearer s3cret-._~+/==\xff"):
            self.assertFalse(is_bearer(shown, "s3cret-._~+/=="), shown)


if __name__ == "__main__":
    unittest.main()
