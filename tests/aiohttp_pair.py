"""A service and a gateway as aiohttp's documentation shows them, for tests/bench.py.

This is the one module here that needs a package. tests/peers.py runs it in an environment of its
own, and ends it with SIGTERM.

    python -m tests.aiohttp_pair users
    python -m tests.aiohttp_pair http://127.0.0.1:3001
"""
import socket
import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, web

USERS = [{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}]
UPSTREAM = sys.argv[1]
SESSION = web.AppKey("session", ClientSession)


async def list_users(_: web.Request) -> web.Response:
    return web.json_response(USERS)


async def forward(request: web.Request) -> web.Response:
    async with request.app[SESSION].get(UPSTREAM + request.path_qs) as answer:
        return web.Response(body=await answer.read(), status=answer.status,
                            content_type=answer.content_type, charset=answer.charset)


async def client_session(app: web.Application) -> AsyncIterator[None]:
    """Open the gateway's connections when it starts, and close them when it ends."""
    async with ClientSession() as app[SESSION]:
        yield


def main() -> None:
    app = web.Application()
    if UPSTREAM == "users":
        app.router.add_get("/users", list_users)
    else:
        app.router.add_get("/{path:.*}", forward)
        app.cleanup_ctx.append(client_session)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"aiohttp listening at http://localhost:{listener.getsockname()[1]}", flush=True)
    web.run_app(app, sock=listener, print=None)


if __name__ == "__main__":
    main()
