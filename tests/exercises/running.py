"""Exercises that go with the chapters in microshop/tour/running.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
    Exercise(
        title="The monitor that is too curious",
        pattern="Rate limit",
        minutes=5,
        file="gateway.py",
        old='''\
        if self.server.limit and self.path.partition("?")[0].rstrip("/") not in MONITORED_PATHS:
            self.check_rate(self.server.limit)
''',
        new='''\
        if self.server.limit:
            self.check_rate(self.server.limit)
''',
        test="test_gateway.RateLimitTest.test_health_checks_do_not_count",
        chapter="overload",
        story="""
            Since the shop has a rate limit, it is "down" several times a day. The load balancer
            takes the gateway out of service, although customers get their answers until that
            very moment. A minute later it is back. The monitoring team has asked for more
            frequent health checks, to find the cause. It has become worse since.
            """,
        hints=(
            "What does a load balancer think of a process that answers its health check with 429?",
            "GuardedHandler.check_client() in microshop/gateway.py decides which requests count "
            "for the rate. Which requests should never be refused for it?",
            "There is a set of such paths, MONITORED_PATHS. A path may come with a query, or with "
            "a slash at the end.",
        )),
    Exercise(
        title="A byte now and then",
        pattern="Slow client timeout",
        minutes=20,
        file="chassis/handler.py",
        old='''\
        self.stream.deadline = min(
            self.stream.deadline + size / BODY_RATE, time.monotonic() + BODY_TIME)
''',
        new='''\
        self.stream.deadline = time.monotonic() + BODY_TIME
''',
        test="chassis.test_handler.SlowClientTest"
             ".test_the_time_for_a_body_does_not_begin_again_with_each_byte",
        chapter="overload",
        story="""
            A stranger attacks the shop, with a single laptop and almost no traffic. All connections
            are in use, and customers get 503. The processor is idle. Each of these connections
            has begun a POST hours ago, and still sends its body, one byte every few seconds. You
            do have a timeout of ten seconds for that. It never ends any of them.
            """,
        hints=(
            "A timeout that starts again whenever something arrives is no limit for the whole. "
            "Find the one for the body of a request.",
            "note_arrival() in microshop/chassis/handler.py is called when a part of the body has "
            "arrived. How much more time may a single byte bring?",
            "Let each byte bring 1 / BODY_RATE seconds: add this to the deadline that there was. "
            "But after a silence of BODY_TIME it is over, however much came before (min).",
        )),
    Exercise(
        title="Always room for one more",
        pattern="Load shedding",
        minutes=15,
        file="chassis/listener.py",
        old='''\
        if is_full and not self.connections.close_oldest():
            self.rejected.add(handler)
            return
''',
        new='''\
        if is_full:
            self.connections.close_oldest()
''',
        test="chassis.test_listener.FullServiceTest"
             ".test_without_an_idle_connection_a_newcomer_gets_503_at_once_and_no_thread",
        chapter="overload",
        story="""
            On the day of the big sale, the gateway took every connection that came, with a
            request in flight on each of them. Answers took a second, then ten, then a minute.
            Customers pressed reload, which made it worse. At last the process ran out of memory.
            Every customer lost, also those who had come when there was still room.
            """,
        hints=(
            "A limit for connections exists: --max-connections. What should happen to a client "
            "that comes when all are busy?",
            "process_request() in microshop/chassis/listener.py makes room by closing a "
            "connection that is idle. What does close_oldest() return if none is idle?",
            "If it returns False, do not serve the connection: rejected.add() answers 503 at once.",
        )),
    Exercise(
        title="Cut off in the middle of a sentence",
        pattern="Graceful drain",
        minutes=20,
        file="chassis/server.py",
        old='''\
        while self.connections and time.monotonic() < began + self.settings.grace:
            self.connections.close_idle(LAST_LOOK)
            self.turns.end_overdue()
            if self.heartbeat:
                self.heartbeat.beat()
            time.sleep(0.01)
''',
        new='''\
        self.connections.close_idle(LAST_LOOK)
        self.turns.end_overdue()
''',
        test="chassis.test_server.DrainTest"
             ".test_requests_in_flight_are_finished_and_idle_connections_are_closed",
        chapter="rolling_restart",
        story="""
            You deploy five times a day, by rolling restart, so that no customer notices. But at
            each deployment a few of them see "connection reset by peer". It hits those whose
            request takes a little longer. The log of the old process says that a grace period is
            over, in the same millisecond in which the process was told to end.
            """,
        hints=(
            "A process that has to end should drain: take no new work, and finish what is in "
            "flight. Find where the end of a process is written down.",
            "drain() in microshop/chassis/server.py. When may it return, and how long may it wait "
            "at most?",
            "Wait in a loop with short pauses, as long as there are connections and the grace "
            "period (self.settings.grace) is not over. The heartbeat has to go on meanwhile, and "
            "connections that have become idle have to be closed.",
        )),
    Exercise(
        title="The king is dead before there is another",
        pattern="Rolling restart",
        minutes=30,
        file="chassis/supervisor.py",
        old='''\
        if child := self.rolling_restart.next_child():
            self.console.say(child.start(self.events.put))
''',
        new='''\
        if child := self.rolling_restart.next_child():
            self.console.say(child.start(self.events.put))
            if child.former:
                child.former.replace(time.monotonic() + self.shutdown.grace)
''',
        test="test_run_all.RollingRestartTest"
             ".test_where_a_new_process_fails_the_old_one_goes_on_and_the_others_stay",
        chapter="rolling_restart",
        story="""
            Friday, five o'clock: a small release. The new users service has a typing error in
            its first line, so it ends as soon as it is started. Until now that was no tragedy,
            since the old process went on serving. Today the shop has no users service at all:
            one process cannot start, and the other one is gone. run_all tries again and again.
            """,
        hints=(
            "During a rolling restart, a service has two processes for a moment. Which event "
            "proves that the old one is not needed any more?",
            "Look at everything in microshop/chassis/supervisor.py that calls replace(), which "
            "asks a former process to end. At which moment does each of these calls come?",
            "A process that has just been started may fail. _note_ready() is called when it "
            "serves. Only there may the former process be asked to end.",
        )),
]
