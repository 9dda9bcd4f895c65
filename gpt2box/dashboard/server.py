"""`gpt2box watch`: serve the dashboard, which only reads. It answers GET alone.

Access: on loopback, anyone on this machine whose Host header names it (against DNS rebinding, by which a page of
another site could point a name of its own at 127.0.0.1); beyond loopback, whoever has the token.
"""

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
from gpt2box.utils.paths import display_path, in_image, runs_dir
from gpt2box.utils.progress import log_line

TOKEN_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,200}")  # chosen by the user: safe in a URL, too long to guess
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    # Load nothing from another host, and no script or style but the page's own files.
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class AccessPolicy:
    """The address to listen on, and the token that requests must carry."""

    host: str
    port: int
    token: str  # empty: none is required

    @property
    def cookie_name(self) -> str:
        """The cookie's name, with the port: browsers share cookies between ports."""
        return f"gpt2box-{self.port}"

    def is_valid_token(self, token: str | None) -> bool:
        """Compare with the token, in constant time."""
        return hmac.compare_digest((token or "").encode(), self.token.encode())


def make_access_policy(host: str, port: int, token: str | None, behind_loopback: bool) -> AccessPolicy:
    """Return the access policy; without `behind_loopback`, an address beyond loopback gets a random token.

    Raises BadInput: `token` could be guessed.
    """
    if token is not None and not TOKEN_PATTERN.fullmatch(token):
        found = f"a token of {len(token)} characters" if token else "an empty token"
        raise BadInput(found, "16 to 200 letters, digits, - and _; without one, one is made where it is needed")
    if token is None and not (behind_loopback or is_loopback(host)):
        token = secrets.token_urlsafe(24)
    return AccessPolicy(host, port, token or "")


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(policy: AccessPolicy) -> None:
    """Serve the dashboard until interrupted.

    Raises:
        BadInput: the port is taken, or `host` is not an address of this machine.
        MachineCannot: this user may not use the port.
    """
    with open_socket(policy) as listening:
        port = listening.getsockname()[1]
        policy = AccessPolicy(policy.host, port, policy.token)
        log_line(f"watching {display_path(runs_dir())} on {browser_url(policy)} (Ctrl-C ends it)")
        if in_image() and is_loopback(policy.host):
            log_line(
                "note: 127.0.0.1 is this container's own; with --host 0.0.0.0 and a published port you can look in"
            )
        settings = uvicorn.Config(
            create_app(policy), log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        settings.server_header = False
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])


def open_socket(policy: AccessPolicy) -> socket.socket:
    """Bind the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(policy.host, policy.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), policy.port), family=family)
    except PermissionError as error:
        raise MachineCannot(f"this user may not use port {policy.port}", "1024 or higher", "--port 8080") from error
    except OSError as error:
        raise BadInput(
            f"cannot listen on {policy.host}, port {policy.port}: {str(error.strerror).partition(' (while')[0]}",
            "a free port, an address of this machine",
            f"--port {policy.port + 1 if policy.port < 65_535 else 8080}",
        ) from error


def browser_url(policy: AccessPolicy) -> str:
    """Return the URL to open in a browser."""
    host = policy.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if in_image() else socket.gethostname()
    url = f"http://{f'[{host}]' if ':' in host else host}:{policy.port}/"
    return url + (f"?token={policy.token}" if policy.token else "")


def create_app(policy: AccessPolicy) -> Starlette:
    """Create the app: the page, its files, and the API that it polls."""
    state = DashboardState()

    def updates(request: Request) -> JSONResponse:  # not async: it reads files, in a thread
        query = request.query_params
        return JSONResponse(
            state.updates(ClientState(**{name: query.get(name, "") for name in ClientState.__dataclass_fields__}))
        )

    def page(request: Request) -> FileResponse:
        return FileResponse(WEB / "watch.html")

    routes = [Route("/", page), Route("/api/now", updates), Mount("/", StaticFiles(directory=WEB))]
    middleware = [
        Middleware(AuthMiddleware, policy=policy),
        Middleware(GZipMiddleware, minimum_size=2000, compresslevel=3),
    ]
    return Starlette(routes=routes, middleware=middleware)


def parse_host(header: str) -> str | None:
    """Return the host of a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


class AuthMiddleware:
    """Refuses requests that the policy does not admit, and adds HEADERS to responses."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's startup and shutdown
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        response = self.check_access(Request(scope)) or self.app
        await response(scope, receive, with_headers)

    def check_access(self, request: Request) -> Response | None:
        """Return a refusal, or the redirect that sets the cookie; None if the request may pass."""
        policy = self.policy
        if not policy.token:
            names = [*LOOPBACK_NAMES, *([policy.host] if is_loopback(policy.host) else [])]
            is_known = parse_host(request.headers.get("host", "")) in names
            return None if is_known else PlainTextResponse("open it as http://localhost, or give it a token\n", 421)
        if policy.is_valid_token(request.query_params.get("token")):
            redirect = RedirectResponse("/", 303)  # to a URL without the token
            redirect.set_cookie(policy.cookie_name, policy.token, httponly=True, samesite="strict", max_age=30 * 86_400)
            return redirect
        if policy.is_valid_token(request.cookies.get(policy.cookie_name)):
            return None
        return PlainTextResponse("open the address that gpt2box watch printed: it has a token\n", 401)
