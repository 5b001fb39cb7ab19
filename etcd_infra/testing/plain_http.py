"""Etcd's plain HTTP side: health, version, metrics, and the JSON gateway for what needs no client."""

from __future__ import annotations

import json
from typing import Any, Final

import trio

_ANSWER_SECONDS: Final = 1.0


async def is_healthy(endpoint: str) -> bool:
    """Whether the member answers, has a leader, and can commit."""
    try:
        return (await get_json(endpoint, "/health")).get("health") == "true"
    except (OSError, ValueError, trio.BrokenResourceError):
        return False


async def get_json(endpoint: str, path: str) -> dict[str, Any]:
    """Read one JSON document; an empty one if nothing comes within a second."""
    _, body = await _ask(endpoint, f"GET {path} HTTP/1.0\r\n\r\n".encode())
    return json.loads(body) if body else {}


async def read_metrics(endpoint: str) -> dict[str, float]:
    """Read the member's metrics, by name with labels; buckets and summaries are left as they are."""
    _, body = await _ask(endpoint, b"GET /metrics HTTP/1.0\r\n\r\n")
    lines = (line for line in body.decode().splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def call_gateway(endpoint: str, path: str, request: dict[str, Any]) -> dict[str, Any]:
    """
    Call the member's JSON gateway.

    Raises:
        RuntimeError: it refused; the text is what it said.
        OSError: it can not be reached, or does not answer within a second.
    """
    data = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        status, body = await _ask(endpoint, head.encode() + data)
    except trio.BrokenResourceError as error:
        raise OSError(f"{endpoint}{path}: {error}") from error
    if not status:
        raise TimeoutError(f"{endpoint}{path}: no answer within {_ANSWER_SECONDS} s")
    if b" 200 " not in status:
        raise RuntimeError(f"{endpoint}{path}: {body.decode(errors='replace')}")
    answer: dict[str, Any] = json.loads(body)
    return answer


async def _ask(endpoint: str, request: bytes) -> tuple[bytes, bytes]:
    """Return the status line and the body, both empty if the answer does not end within a second."""
    host, port = endpoint.removeprefix("http://").rsplit(":", 1)
    answer = b""
    with trio.move_on_after(_ANSWER_SECONDS):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(request)
            async for chunk in stream:
                answer += chunk
            head, _, body = answer.partition(b"\r\n\r\n")
            return head.partition(b"\r\n")[0] + b" ", body
    return b"", b""
