"""The live picture: a page that shows the running shop. The shop works without it."""
import base64
import hashlib
import re
from argparse import Namespace
from pathlib import Path

from microshop import GATEWAY_PORT, LIVE_PORT, SERVICES
from microshop.chassis import config
from microshop.chassis.answer import NO_STORE, Answer
from microshop.chassis.errors import Forbidden
from microshop.chassis.handler import Handler
from microshop.chassis.server import Service

PAGE = Path(__file__).with_name("live.html")
OWN_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{0,5})?", re.I)
INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.S)
SAFE = [NO_STORE, ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin")]


def content_security_policy(page: str) -> str:
    """Return the policy under which nothing but the page's own script and style is applied.

    They are named by their hashes. So if a text of a client became part of the page as HTML by
    mistake, a script in it would not run, and nothing could be sent to another host.
    """
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
             "frame-ancestors 'none'"]
    if "data:" in page:
        rules.append("img-src data:")
    inline: dict[str, list[str]] = {}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        inline.setdefault(kind, []).append(f"'sha256-{digest}'")
    return "; ".join(rules + [f"{kind}-src {' '.join(found)}" for kind, found in inline.items()])


class LiveHandler(Handler):
    server: "Live"

    def check_client(self) -> None:
        """Raise Forbidden if the request was sent to another name than this machine's own.

        A web page of another site may let its own name lead to 127.0.0.1 (DNS rebinding). To the
        browser, what is here would be part of that site, and its scripts could read it.
        """
        if not OWN_HOST.fullmatch(self.headers.get("host", "")):
            raise Forbidden("the live picture is shown only at localhost, 127.0.0.1 or [::1]")
        super().check_client()

    def show_page(self) -> Answer:
        return Answer(self.server.page, headers=[
            *SAFE, ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Security-Policy", self.server.policy)])

    routes = {"/": {"GET": show_page}}


class Live(Service):
    name, title, port = "live", "Live picture", LIVE_PORT
    announcement = "{title} at"
    handler = LiveHandler
    options = [
        config.HOST, config.TIMEOUT, config.QUIET,
        *[config.service_url(name, port)
          for name, port in {"gateway": GATEWAY_PORT, **SERVICES}.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        page = PAGE.read_text()
        self.page, self.policy = page.encode(), content_security_policy(page)


if __name__ == "__main__":
    Live.main()
