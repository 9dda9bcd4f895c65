"""`gpt2box watch`: a local page that lives while the runs live. It answers GET alone, and writes nothing.

Who may look: on loopback whoever is on this machine, by a Host that names it (a page of another site could otherwise
point a name of its own at 127.0.0.1 and read along: DNS rebinding); beyond it whoever has the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2box.dashboard.state import ClientState, DashboardState
from gpt2box.errors import BadInput, MachineCannot
from gpt2box.report.html import WEB
from gpt2box.utils.paths import in_image, runs_dir, shown
from gpt2box.utils.progress import say

TOKEN_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,200}")  # of one's own: fit for an address, too long to guess
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    # Nothing from another host, no script or style but the page's own files.
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class AccessPolicy:
    """Where it listens, and whom it lets in."""

    host: str
    port: int
    token: str  # empty: none is asked for

    @property
    def cookie(self) -> str:
        """Of a name of its own: a browser does not tell the ports of a machine apart."""
        return f"gpt2box-{self.port}"

    def knows(self, token: str | None) -> bool:
        """Whether it is the token, in a time that does not tell how much of it is right."""
        return hmac.compare_digest((token or "").encode(), self.token.encode())


def make_access_policy(host: str, port: int, token: str | None, behind_loopback: bool) -> AccessPolicy:
    """What was asked for, made safe: beyond loopback there is a token.

    Raises:
        BadInput: a token that could be guessed.
    """
    if token is not None and not TOKEN_PATTERN.fullmatch(token):
        found = f"a token of {len(token)} characters" if token else "an empty token"
        raise BadInput(found, "16 to 200 letters, digits, - and _; without one, one is made where it is needed")
    if token is None and not (behind_loopback or is_loopback(host)):
        token = secrets.token_urlsafe(24)
    return AccessPolicy(host, port, token or "")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(entrance: AccessPolicy) -> None:
    """Answer until interrupted.

    Raises:
        BadInput: the port is taken, or the host is none of this machine's.
        MachineCannot: the port is not for this user.
    """
    with open_socket(entrance) as listening:
        port = listening.getsockname()[1]
        entrance = AccessPolicy(entrance.host, port, entrance.token)
        say(f"watching {shown(runs_dir())} on {browser_url(entrance)} (Ctrl-C ends it)")
        if in_image() and is_loopback(entrance.host):
            say("note: 127.0.0.1 is this container's own; with --host 0.0.0.0 and a published port you can look in")
        settings = uvicorn.Config(
            create_app(entrance), log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        settings.server_header = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])


def open_socket(entrance: AccessPolicy) -> socket.socket:
    """The socket, before anything is said."""
    try:
        family, _, _, _, place = socket.getaddrinfo(entrance.host, entrance.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(place[0]), entrance.port), family=family)
    except PermissionError as error:
        raise MachineCannot(f"port {entrance.port} is not for this user", "1024 or higher", "--port 8080") from error
    except OSError as error:
        raise BadInput(
            f"cannot listen on {entrance.host}, port {entrance.port}: {str(error.strerror).partition(' (while')[0]}",
            "a free port, an address of this machine",
            f"--port {entrance.port + 1 if entrance.port < 65_535 else 8080}",
        ) from error


def browser_url(entrance: AccessPolicy) -> str:
    """What to open in a browser."""
    host = entrance.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if in_image() else socket.gethostname()
    said = f"http://{f'[{host}]' if ':' in host else host}:{entrance.port}/"
    return said + (f"?token={entrance.token}" if entrance.token else "")


def create_app(entrance: AccessPolicy) -> Starlette:
    """The pages: the one that is looked at, its files, and what it asks for."""
    state = DashboardState()

    def now(request: Request) -> JSONResponse:  # not async: it reads files, in a thread
        asked = request.query_params
        return JSONResponse(
            state.updates(ClientState(**{name: asked.get(name, "") for name in ClientState.__dataclass_fields__}))
        )

    def page(request: Request) -> FileResponse:
        return FileResponse(WEB / "watch.html")

    routes = [Route("/", page), Route("/api/now", now), Mount("/", StaticFiles(directory=WEB))]
    middleware = [
        Middleware(AuthMiddleware, entrance=entrance),
        Middleware(GZipMiddleware, minimum_size=2000, compresslevel=3),
    ]
    return Starlette(routes=routes, middleware=middleware)


def parse_host(header: str) -> str | None:
    """A Host header's name or number, without the port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


class AuthMiddleware:
    """Lets requests in, and puts the headers on what goes out."""

    def __init__(self, app: ASGIApp, entrance: AccessPolicy) -> None:
        self.app, self.entrance = app, entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        answer = self.refuse_or_welcome(Request(scope)) or self.app
        await answer(scope, receive, with_headers)

    def refuse_or_welcome(self, request: Request) -> Response | None:
        """The answer to whom does not come in, or comes for the first time; none to who may pass."""
        entrance = self.entrance
        if not entrance.token:
            names = [*LOOPBACK_NAMES, *([entrance.host] if is_loopback(entrance.host) else [])]
            known = parse_host(request.headers.get("host", "")) in names
            return None if known else PlainTextResponse("open it as http://localhost, or give it a token\n", 421)
        if entrance.knows(request.query_params.get("token")):
            welcome = RedirectResponse("/", 303)  # an address without the token
            welcome.set_cookie(entrance.cookie, entrance.token, httponly=True, samesite="strict", max_age=30 * 86_400)
            return welcome
        if entrance.knows(request.cookies.get(entrance.cookie)):
            return None
        return PlainTextResponse("open the address that gpt2box watch printed: it has a token\n", 401)
