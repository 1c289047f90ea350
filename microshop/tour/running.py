"""The chapters about running a shop."""
import contextlib
import select
import shlex
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from socket import SocketIO

from microshop.chassis.handler import BODY_TIME
from microshop.tour.drawing import Answer, draw_kill
from microshop.tour.own_shop import PATIENCE, send_signal
from microshop.tour.stage import Pending, Tour, send

# --- for `overload`

CONNECTIONS = 8   # that each process may have open
RATE = 12         # requests in an hour that a client may send
AT_ONCE = 6       # requests that are sent together
DRIP = 1.0        # seconds between two bytes of a slow client
SLOWLY = ("POST /users HTTP/1.1\r\nHost: shop\r\nExpect: 100-continue\r\n"
          "Content-Length: 1000\r\n\r\n")

# --- for `rolling_restart`

TIMEOUT = 25      # seconds that a request may take: the one that is in flight takes long
GRACE = 40        # seconds for requests in flight when a process has to end


def overload(tour: Tour) -> None:
    """Overload and slow clients."""
    tour.say(f"""
        Each open connection costs memory, so a process has a limit for them: --max-connections, in
        this shop {CONNECTIONS}. A client that sends very slowly holds a connection for long, and
        hardly has to work for it. That is a known attack (slowloris), but a bad network has the
        same effect.
        """)
    tour.start_shop(f"--max-connections={CONNECTIONS}", f"--rate={RATE}/h")
    tour.say("(In this chapter the gateway counts requests. Do not send any of your own.)")
    tour.predict(f"{CONNECTIONS} clients begin a POST, and each sends one byte every {DRIP:g} s. "
                 "What does the next client get: an answer, a long wait, or an error? And how long "
                 "do the slow ones keep their places?")
    slow = begin_slowly(tour)
    refused = tour.curl("/users/1", show=("Retry-After", "Connection"))
    tour.expect("The next client gets 503 Service Unavailable, and learns when to try again",
                (refused.status, "retry-after" in refused.headers), (503, True))
    tour.say(f"""
        This answer costs next to nothing: no thread has worked on the request. Retry-After says in
        how many seconds to try again. The slow clients have {BODY_TIME:g} s for the whole body, and
        a little more for each byte. They do not get {BODY_TIME:g} s for each byte.
        """)
    answers = [pending.wait() for pending in slow]
    count_lines(tour, [f"{answer.status} {answer.reason}, after {answer.seconds:.0f} s"
                       for answer in answers])
    tour.expect("Each of them gets 408 Request Timeout",
                [answer.status for answer in answers], [408] * CONNECTIONS)
    tour.expect("There is room again", tour.curl("/users/1").status, 200)
    exceed_rate(tour)
    tour.trade_off("""
        A long queue looks kinder than a 503. But if more requests come than can be answered, the
        queue grows, and so does the wait of everyone in it. Clients give up and try again, and the
        service works for clients that have left. An early refusal is cheap, and says when to
        return.
        """)


def begin_slowly(tour: Tour) -> list[Pending]:
    """Begin POSTs that take all places; return when the gateway works on each of them."""
    port, head = tour.port(), SLOWLY.replace("\r\n", r"\r\n")
    command = f"(printf '{head}'; while sleep {DRIP:g}; do printf .; done) | nc localhost {port}"
    tour.print(f"$ for n in $(seq {CONNECTIONS}); do {command} & done    # kill $(jobs -p)")
    slow, lines = [], []
    for _ in range(CONNECTIONS):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            stream = connection.makefile("rwb", buffering=0)  # it keeps the connection open
        stream.write(SLOWLY.encode())
        lines.append(stream.readline().decode().strip())
        stream.readline()  # the empty line after 100 Continue
        slow.append(Pending("POST /users", partial(drip, stream)))
    count_lines(tour, lines)
    return slow


def drip(stream: SocketIO) -> Answer:
    """Send a byte every DRIP seconds, until there is an answer. Status 0: there was none."""
    began, text = time.monotonic(), ""
    with stream, contextlib.suppress(OSError):
        while time.monotonic() < began + 2 * BODY_TIME:
            if select.select([stream], [], [], DRIP)[0]:
                text = stream.read().decode()
                break
            stream.write(b".")
    line = text.partition("\r\n")[0]
    _, status, reason = (line if line.startswith("HTTP/1.1 ") else "- 0 no answer").split(" ", 2)
    return Answer(int(status), reason, {}, text, time.monotonic() - began)


def count_lines(tour: Tour, lines: list[str]) -> None:
    """Print each of the lines once, and how many times there is one like it."""
    for line, count in Counter(lines).items():
        tour.print(f"{count} x {line}")
    tour.print()


def exceed_rate(tour: Tour) -> None:
    left = RATE - CONNECTIONS - 1  # after the slow requests and the one after them
    tour.say(f"""
        Against a single client that asks too often, there is a rate limit. Here it may send {RATE}
        at once, and after that one more every {3600 / RATE:g} s. Your address has sent
        {CONNECTIONS + 1} so far that count: the slow ones, and the last one. (The 503 does not
        count: that request was not even read.)
        """)
    answers = tour.curl_at_once(AT_ONCE, "/users/1")
    tour.expect(f"{left} more get 200, and the others get 429 Too Many Requests",
                Counter(answer.status for answer in answers), {200: left, 429: AT_ONCE - left})
    tour.say("""
        A monitor asks often, too. If it got 429, it would believe that the shop is down. So health
        checks do not count. (Your other requests get 429 for some minutes now.)
        """)
    tour.expect("A health check gets 200", tour.curl("/health/live").status, 200)


def rolling_restart(tour: Tour) -> None:
    """Replace everything while it runs."""
    tour.say("""
        A new version has to be started without an outage. SIGHUP makes run_all replace one process
        after another (a rolling restart): it starts a new process beside the old one, waits until
        that is ready, and then asks the old one to end.
        """)
    token = tour.own_folder() / "token"
    token.write_text("secret")
    tour.start_shop(f"--timeout={TIMEOUT}", f"--grace={GRACE}", f"--token-file={token}")
    tour.say(f"""
        (Here a request may take {TIMEOUT} s, and a process that has to end gets {GRACE} s to finish
        its requests. The file contains the secret that writes must carry; we need it later.)
        """)
    tour.curl("/users/1")
    tour.predict("We pause the users service while it has a request. Other clients ask for "
                 "products all the time. Now every process is replaced. How many requests fail?")
    old = tour.shop.pid("users")
    tour.pause("users")
    pending = tour.begin_curl("/users/1", end=" &\n")
    tour.expect("The request has left the gateway", lambda: tour.in_flight("users"), 1)
    replace_all(tour)
    tour.say("""
        The listening socket belongs to run_all, and old and new processes share it. So at no moment
        is a client refused. The old gateway gets no new requests now, but it still runs: it drains,
        that is, it waits for the request in flight. We let the old users process go on.
        """)
    tour.print(draw_kill(old, signal.SIGCONT, "the old process of users") + "\n")
    send_signal(old, signal.SIGCONT)
    answer = tour.finish_curl(pending, show=("Connection",))
    tour.choose_watch(f"#request={answer.id}")
    tour.expect("The old gateway has answered it", answer.status, 200)
    refuse_release(tour, token)
    tour.trade_off("""
        To stop everything and then start it again is simpler, but it is an outage each time, and a
        long one if the new version does not start. The price of a rolling restart: two versions run
        side by side, so they have to understand each other and the same database.
        """)


def replace_all(tour: Tour) -> None:
    shown = len(tour.shop.lines)
    with steady_load(tour, "/products/101") as answers:
        tour.restart()
        tour.shop.await_line("every process has been replaced")
    tour.show_lines("run_all", since=shown)
    tour.expect(f"All {len(answers)} requests of the other clients got 200",
                {answer.status for answer in answers}, {200})


@contextlib.contextmanager
def steady_load(tour: Tour, target: str) -> Iterator[list[Answer]]:
    """Send one GET after another while the block runs; yield the list of their answers."""
    port, answers, is_over = tour.port(), [], threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            answers.append(send(port, "GET", target))

    tour.print(f"$ while true; do curl -s localhost:{port}{target}; done    # Ctrl-C stops it\n")
    client = threading.Thread(target=ask, daemon=True)
    client.start()
    try:
        yield answers
    finally:
        is_over.set()
        client.join(PATIENCE)


def refuse_release(tour: Tour, token: Path) -> None:
    tour.say("""
        Now a bad release: there is a mistake in the file with the shop's token, which the gateway
        reads when it starts. So a new gateway cannot start.
        """)
    tour.print(f"$ echo 'two words' >{shlex.quote(str(token))}\n")
    token.write_text("two words\n")
    tour.predict("Which gateway do clients get after the next restart?")
    shown = len(tour.shop.lines)
    tour.restart()
    line = tour.shop.await_line(".*gateway ended with exit status .*")[0]
    tour.show_log("--token-file: ", "gateway")
    tour.show_lines("run_all", since=shown)
    tour.say("The services are new now, but the gateway is the one from before: two versions run "
             "side by side, and work.")
    tour.expect("The old gateway keeps running", line, lambda line: "old process keeps" in line)
    tour.expect("It answers as before", tour.curl("/users/1").status, 200)
