"""Rate limit, bearer token, and requests that a web page of another origin makes."""
import sys
import unittest

from microshop.chassis.admission import (
    Rate, RateLimit, bearer_token, client_of, is_cross_origin, is_local, is_same)
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
            self.assertTrue(is_same(bearer_token(shown), token), shown)
        for shown in (
                "", "Bearer", "Bearer ", token, f"Basic {token}", "Bearer s3cret-._~+/=",
                f"Bearer {token}=", "Bearer S3cret-._~+/==", f"Bearer {token}, Bearer x",
                f"Bearer\t{token}", "Bearer \xe9", f"Bearer {token}\xff"):
            self.assertFalse(is_same(bearer_token(shown), token), shown)

    def test_a_header_without_a_bearer_token_carries_none(self):
        for shown in ("", "Bearer", "Bearer ", "Basic Og==", "s3cret"):
            self.assertEqual(bearer_token(shown), "", shown)


class LocalTest(unittest.TestCase):
    def test_a_request_is_local_if_it_comes_from_here_without_a_proxy_and_for_a_name_of_ours(self):
        for expected, client, own, headers in (
                (True, "127.0.0.1", "127.0.0.1", {"host": "localhost:3000"}),
                (True, "127.0.0.2", "127.0.0.1", {"host": "127.0.0.1"}),
                (True, "::1", "::1", {"host": "[::1]:3000"}),
                (True, "::ffff:127.0.0.1", "::ffff:127.0.0.1", {"host": "LOCALHOST"}),
                (True, "127.0.0.1", "127.0.0.1", {}),  # HTTP/1.0
                # under run_all --host 192.0.2.2, live asks from and for that address
                (True, "192.0.2.2", "192.0.2.2", {"host": "192.0.2.2:3000"}),
                (False, "192.0.2.3", "192.0.2.2", {"host": "192.0.2.2:3000"}),
                (False, "192.0.2.3", "192.0.2.2", {"host": "localhost"}),
                (False, "127.0.0.1", "127.0.0.1", {"host": "shop.example"}),
                (False, "127.0.0.1", "127.0.0.1", {"host": "127.0.0.1.evil.example:3000"}),
                *[(False, "127.0.0.1", "127.0.0.1", {"host": "localhost", name: "x"})
                  for name in ("x-forwarded-for", "forwarded", "via", "x-real-ip",
                               "x-forwarded-host", "x-forwarded-proto")]):
            with self.subTest(client=client, own=own, headers=headers):
                self.assertIs(is_local(client, own, headers), expected)


class CrossOriginTest(unittest.TestCase):
    def test_what_a_browser_says_of_a_request_decides_whether_it_is_cross_origin(self):
        for is_cross, headers in (
                (False, {}),
                (False, {"host": "localhost:3000"}),
                (False, {"sec-fetch-site": "same-origin"}),
                (False, {"sec-fetch-site": "none"}),
                (True, {"sec-fetch-site": "same-site"}),
                (True, {"sec-fetch-site": "cross-site"}),
                (True, {"sec-fetch-site": "cross-site, same-origin"}),
                # behind a proxy, the Host may be another; the browser knows what it asked for
                (False, {"sec-fetch-site": "same-origin", "origin": "https://shop.example",
                         "host": "127.0.0.1:3000"}),
                (True, {"sec-fetch-site": "cross-site", "origin": "http://shop", "host": "shop"}),
                # Sec-Fetch-Site is not sent over http to another machine
                (False, {"origin": "http://shop:3000", "host": "shop:3000"}),
                (False, {"origin": "https://shop", "host": "shop"}),
                (False, {"sec-fetch-site": "", "origin": "", "host": "shop"}),
                (True, {"origin": "http://evil.example", "host": "shop:3000"}),
                (True, {"origin": "http://shop:3001", "host": "shop:3000"}),
                (True, {"origin": "http://shop:3000.evil.example", "host": "shop:3000"}),
                (True, {"origin": "http://evil.example://shop", "host": "shop"}),
                (True, {"origin": "http://shop, http://shop", "host": "shop"}),
                (True, {"origin": "null", "host": "shop"}),
                (True, {"origin": "null", "host": ""}),
                (True, {"origin": "http://shop"})):
            self.assertEqual(is_cross_origin(headers), is_cross, headers)


if __name__ == "__main__":
    unittest.main()
