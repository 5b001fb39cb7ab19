"""A throw-away etcd in the foreground."""

from __future__ import annotations

import trio
import typer

from etcd_infra.testing import EtcdServer


async def serve() -> None:
    """Start it, say how to reach it, and wait for Ctrl-C."""
    async with EtcdServer() as server:
        typer.echo(f"etcd {server.version} answers at {server.endpoint}; its data goes with it")
        typer.echo(f"  export ETCD_INFRA_ENDPOINTS={server.endpoint}")
        typer.echo("  etcd-infra inspect")
        typer.echo("Ctrl-C stops it.")
        await trio.sleep_forever()
