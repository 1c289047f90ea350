"""Exercises that go with the chapters in microshop/tour/failures.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
    Exercise(
        title="Two laptops",
        pattern="Safe retry",
        minutes=10,
        file="chassis/client.py",
        old="""\
        if self.method == "POST" and self.upstream.idempotent_receiver:
            return bool(self.headers.get("idempotency-key"))
        return self.method in IDEMPOTENT
""",
        new="""\
        if self.method == "POST":
            return self.upstream.idempotent_receiver
        return self.method in IDEMPOTENT
""",
        test="chassis.test_client.RetryTest."
             "test_a_post_with_an_idempotency_key_is_retried_at_an_idempotent_receiver_only",
        chapter="retries",
        story="""
            Some customers have got two laptops, and have paid for both, although they pressed the
            button once. It happens only on days when the orders service was restarted. The log of
            the gateway shows one request for each of them, and it was answered with 201. The log
            of orders shows two orders, in the same second.
            """,
        hints=(
            "The gateway sends some requests again when a connection breaks. That is decided in "
            "microshop/chassis/client.py.",
            "Call.is_idempotent says whether sending a request twice does what sending it once "
            "does. How does orders recognize that a POST is a repeat?",
            "orders recognizes a repeat by its Idempotency-Key. A POST without one must not be "
            "sent twice, even to an idempotent receiver. The names of headers are in lower case.",
        )),
    Exercise(
        title="Fewer and fewer places",
        pattern="Bulkhead",
        minutes=10,
        file="chassis/client.py",
        old="""\
        try:
            return self._try_until_answered(call)
        finally:
            upstream.leave()
""",
        new="""\
        reply = self._try_until_answered(call)
        upstream.leave()
        return reply
""",
        test="chassis.test_client.BulkheadTest."
             "test_a_call_that_fails_gives_its_place_in_the_bulkhead_back",
        chapter="bulkhead",
        story="""
            Last night users was slow for a minute. It has been quick again since then, and its own
            health check is good. But through the gateway, every request for a user gets 503: users
            is said to be at its limit of concurrent requests. In fact it has none at all. Only a
            restart of the gateway helps, until the next bad minute.
            """,
        hints=(
            "The gateway counts its calls in flight to each service: that is the bulkhead. A call "
            "takes a place in it and must give it back. See Client.call in "
            "microshop/chassis/client.py.",
            "Upstream.enter takes the place, and Upstream.leave gives it back. On which ways can "
            "_try_until_answered end?",
            "It can also end with an exception. What must happen in any case belongs in a "
            "`finally`.",
        )),
    Exercise(
        title="The breaker that does not notice",
        pattern="Circuit breaker",
        minutes=15,
        file="chassis/client.py",
        old="is_about_instance = had_fair_time or not isinstance(error, TimeoutError)",
        new="is_about_instance = not isinstance(error, TimeoutError)",
        test="chassis.test_client.CircuitBreakerTest."
             "test_a_timeout_opens_the_circuit_breaker_unless_the_call_had_less_than_half_the_time",
        chapter="service_hangs",
        story="""
            The users service hangs. Every client that asks for a user waits until the timeout is
            over, and then gets 504, for as long as it hangs. It was different when the service
            answered each request with 500: then the circuit breaker of the gateway opened after a
            few failures, and clients got 503 at once. This time it has stayed closed.
            """,
        hints=(
            "A circuit breaker can count only what it is told. The client tells it how each try "
            "has ended: see Client._try in microshop/chassis/client.py.",
            "Which outcome does _try record when a try ends with a TimeoutError? And what does "
            "CircuitBreaker.end do with that outcome?",
            "A timeout is a failure of the instance if the call had fair time, that is, more than "
            "half of the client's timeout. Only if it had less does a timeout say nothing.",
        )),
    Exercise(
        title="A stampede after every pause",
        pattern="Circuit breaker",
        minutes=10,
        file="chassis/resilience.py",
        old="        return not self._is_probing and not self.remaining()\n",
        new="        return not self.remaining()\n",
        test="chassis.test_resilience.CircuitBreakerTest."
             "test_a_half_open_breaker_lets_one_probe_pass_at_a_time",
        chapter="service_hangs",
        story="""
            users was overloaded, and its circuit breaker opened, as it should. But users does not
            recover. Its operators see a pattern: nothing for half a second, then all clients at
            once; nothing for a second, then all clients at once; and so on. Each time, users
            breaks down again under that load, just when it was about to be well.
            """,
        hints=(
            "Closed, open, half-open: look at CircuitBreaker in microshop/chassis/resilience.py. "
            "In which of these states does the stampede happen?",
            "CircuitBreaker.admits says whether a call may begin now. How many calls may begin "
            "while the breaker is half-open?",
            "begin() notes that a probe is under way, and end() that it is over. Until then, "
            "admits() must not let another call pass.",
        )),
    Exercise(
        title="Work for a client that has left",
        pattern="Deadline propagation",
        minutes=15,
        file="orders.py",
        old="            upstream, method, target, self.trace, headers, body, self.deadline)\n",
        new="            upstream, method, target, self.trace, headers, body)\n",
        test="test_saga.DeadlineTest.test_the_time_that_is_left_is_passed_on_to_each_service",
        chapter="deadline",
        story="""
            An app gives each order one second. When products is slow, the app gets 504 from the
            gateway, and shows an error. It should get 202 in time: the order is stored, and will
            be confirmed later. The log of orders shows that it does answer with 202, but too late:
            the gateway has gone away by then.
            """,
        hints=(
            "How much time is left travels with a request, from hop to hop. Compare in the traces "
            "how long the gateway waits for orders, and how long orders waits for products.",
            "A saga calls other services in Saga.ask, in microshop/orders.py. How does it know "
            "when its client stops waiting, and what does it tell Client.call?",
            "Client.call takes a deadline, and passes on the time until then. Without one, a call "
            "may take CALL_TIME, whatever the client wants.",
        )),
    Exercise(
        title="The service that never stops starting",
        pattern="Supervisor, restart with backoff",
        minutes=20,
        file="chassis/child.py",
        old="""\
        if self.state == "up" and self._heartbeat_at - self._since >= self.HEALTHY_TIME:
            self._longest = self.FIRST_PAUSE
""",
        new="""\
        if self.state == "up":
            self._longest = self.FIRST_PAUSE
""",
        test="chassis.test_child.RestartPolicyTest."
             "test_the_pauses_of_a_child_that_crashes_as_soon_as_it_is_ready_double",
        chapter="service_gone",
        story="""
            A new version of users starts, says that it is ready, and crashes at its first request.
            The supervisor starts it again, of course. But it does so five times in a second, all
            night long. In the morning, the disk is full of logs, and the other services are slow,
            since one core does nothing but start users.
            """,
        hints=(
            "The supervisor waits before it starts a child again. How long is decided by "
            "RestartPolicy in microshop/chassis/child.py.",
            "The pause doubles each time a process ends, and becomes short again later. When does "
            "RestartPolicy._enter make it short again?",
            "That a process became ready does not mean that it is well. Only if it has sent "
            "heartbeats for HEALTHY_TIME after that may the pause be short again.",
        )),
    Exercise(
        title="Three times the load, when it hurts most",
        pattern="Retry budget",
        minutes=15,
        file="chassis/client.py",
        old="            return not self.is_open() and self._retries.take()\n",
        new="            return not self.is_open()\n",
        test="chassis.test_client.RetryTest.test_retries_stop_when_their_budget_is_spent",
        related="retries",
        story="""
            On a busy evening, users began to break some of its connections, because it had too
            much to do. Within seconds, it got up to three times as many requests as there were
            clients, and then answered hardly any. The gateway should have been the one to help.
            Instead it repeated everything that failed.
            """,
        hints=(
            "Retries are a good answer to a rare failure, and a bad one to overload. What limits "
            "their number over all calls is the retry budget, in microshop/chassis/resilience.py.",
            "find_pause in microshop/chassis/client.py decides whether a call is retried. Which "
            "method of Upstream does it ask, and what does that look at?",
            "Upstream.take_retry must also take the retry from the budget, self._retries, and "
            "allow it only if the budget does.",
        )),
]
