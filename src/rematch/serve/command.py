"""``rematch serve``: load, listen, serve."""

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from rematch.errors import RematchError

try:
    import uvicorn

    from rematch.serve.app import create_app
    from rematch.serve.connections import server_config
except ImportError as error:
    raise RematchError(
        f"rematch serve needs {error.name}. Install it: pip install 'rematch-mm[serve]'."
    ) from error
from rematch.console import say
from rematch.serve.engine import Engine
from rematch.serve.limits import Limits

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """The command's options; see ``rematch serve --help``."""

    target: str
    port: int = 8000
    host: str = "127.0.0.1"
    model: str | None = None
    api_keys: Path | None = None
    image_hosts: str = ""
    batch_tokens: int = 4096
    waiting: int = 512
    timeout: float = 60.0
    batching: bool = True
    most_rerank: int = 200


def run_server(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests that are queued.

    Raises:
        RematchError: If the target is neither an index nor a model, the keys cannot be read or are
            none, or the address cannot be listened on.
    """
    if not math.isfinite(options.timeout):
        raise RematchError(f"--timeout {options.timeout}: not a number of seconds.")
    keys = _load_keys(options.api_keys)
    with _listen(options.host, options.port) as listener:
        engine = Engine(options.target, options.model)
        if options.host not in _LOOPBACK and not keys:
            say(
                f"other machines can reach {options.host}, and no API key is required. Consider "
                "--api-keys."
            )
        hosts = [host.strip().lower() for host in options.image_hosts.split(",")]
        app = create_app(
            engine,
            Limits(hosts=tuple(host for host in hosts if host)),
            keys,
            batch_tokens=options.batch_tokens,
            waiting=options.waiting,
            timeout=options.timeout,
            batching=options.batching,
            most_rerank=options.most_rerank,
        )
        print(_banner(options, listener.getsockname()[1], engine), flush=True)  # noqa: T201
        config = server_config(app, timeout_graceful_shutdown=int(options.timeout) + 1)
        uvicorn.Server(config).run(sockets=[listener])


def _banner(options: ServeOptions, port: int, engine: Engine) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    page = "the search page is at /"
    if engine.index is None:
        page = "there is no search page without an index"
    return f"Serving {options.target} on http://{host}:{port}; {page}. Press Ctrl-C to stop."


def _listen(host: str, port: int) -> socket.socket:
    if not host:
        raise RematchError("--host: is empty. Give an address, such as 127.0.0.1 or 0.0.0.0.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named, asyncio switches Nagle's algorithm off
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, UnicodeError, TypeError) as error:  # of names that are no host names
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise RematchError(
            f"cannot listen on {host}:{port} ({reason}). Stop what uses it, or choose another "
            "--host or --port."
        ) from None
    return listener


def _load_keys(path: Path | None) -> list[str]:
    """API keys from the environment and from a file.

    Raises:
        RematchError: If either is there but holds no key, or a key that cannot be sent.
    """
    keys = []
    variable = os.environ.get("REMATCH_API_KEYS")
    if variable is not None:
        keys += _checked_keys(variable.split(","), "REMATCH_API_KEYS")
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise RematchError(
                f"--api-keys {path}: cannot be read ({reason}). Give a file with one key a line."
            ) from None
        keys += _checked_keys(lines, f"--api-keys {path}")
    return keys


def _checked_keys(values: list[str], source: str) -> list[str]:
    """Keys without the space around them.

    Raises:
        RematchError: If there is none, or one that cannot be sent in a header.
    """
    keys = [value.strip() for value in values if value.strip()]
    if not keys:
        raise RematchError(
            f"{source}: has no key, and without keys anybody could use the server. Give a key, or "
            "leave it out if that is meant."
        )
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise RematchError(
            f"{source}: has a key with characters that clients cannot send. Use ASCII letters, "
            "digits and punctuation."
        )
    return keys
