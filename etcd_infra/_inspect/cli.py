"""The command line: arguments in, info objects out."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import trio
import typer

from etcd_infra import EtcdInfraError, HealthInfo, Inspector, environment_options, open_etcd

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="etcd-infra",
    help="Coordination on etcd: look inside, check health, try it out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WATCH_SECONDS = 1.0


class Kind(StrEnum):
    """What can be inspected."""

    LOCKS = "locks"
    RWLOCKS = "rwlocks"
    SEMAPHORES = "semaphores"
    CYCLES = "cycles"
    ELECTIONS = "elections"
    MEMBERS = "members"
    STATE = "state"
    TRANSACTIONS = "transactions"
    TOPICS = "topics"
    SESSIONS = "sessions"
    LEASES = "leases"
    HEALTH = "health"


NAMED = (Kind.LOCKS, Kind.RWLOCKS, Kind.SEMAPHORES, Kind.ELECTIONS, Kind.MEMBERS, Kind.STATE, Kind.TOPICS)


class Output(StrEnum):
    """How it is shown."""

    TABLE = "table"
    JSON = "json"


Endpoints = Annotated[
    str,
    typer.Option(envvar="ETCD_INFRA_ENDPOINTS", help="etcd's URLs, separated by commas."),
]
Namespace = Annotated[str, typer.Option(envvar="ETCD_INFRA_NAMESPACE", help="The services' namespace.")]
DEFAULT_ENDPOINTS = "http://127.0.0.1:2379"


@app.command()
def inspect(  # noqa: PLR0913, PLR0917 - these are the command's options
    kind: Annotated[Kind | None, typer.Argument(help="What to show; everything if left out.")] = None,
    name: Annotated[
        str | None,
        typer.Argument(help="One lock, semaphore, election, group, topic, or how state keys begin."),
    ] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to show it.")] = Output.TABLE,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again each second.")] = False,  # noqa: FBT002
    history: Annotated[bool, typer.Option(help="With `locks NAME`: who owned it before.")] = False,  # noqa: FBT002
    namespace: Namespace = "",
    endpoints: Endpoints = DEFAULT_ENDPOINTS,
) -> None:
    """Show who holds, leads and waits, who is there, what state there is, and how etcd is."""
    if name is not None and kind not in NAMED:
        named = ", ".join(NAMED)
        raise typer.BadParameter(f"{kind or 'everything'} has no names; NAME goes with {named}")
    if history:
        if kind is not Kind.LOCKS or name is None or watch:
            raise typer.BadParameter("--history goes with `locks NAME`, and not with --watch")
        _run(_history, endpoints, namespace, name, output)
        return
    kinds = [kind] if kind is not None else list(Kind)
    _run(_inspect, endpoints, namespace, kinds, name, output, watch)


@app.command()
def health(
    endpoints: Endpoints = DEFAULT_ENDPOINTS,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 2.0,
) -> None:
    """Exit with 0 if etcd answers a linearizable read in time, with 1 if not: a readiness probe."""
    found = _run(_health, endpoints, timeout)
    if not isinstance(found, HealthInfo) or not found.healthy:
        reason = getattr(found, "error", None) or ", ".join(getattr(found, "alarms", ())) or "no answer in time"
        typer.echo(f"unhealthy: {reason}", err=True)
        raise typer.Exit(1)
    typer.echo(f"healthy: revision {found.revision}, {found.latency * 1000:.1f} ms, etcd {found.version}")


@app.command("dev-server")
def dev_server() -> None:
    """Run a throw-away etcd in the foreground until Ctrl-C."""
    from etcd_infra._inspect.dev_server import serve

    try:
        _run(serve)
    except KeyboardInterrupt:
        typer.echo("stopped; its data is gone")


@app.command(context_settings={"allow_interspersed_args": False})
def run(  # noqa: PLR0913, PLR0917
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after `--`.")],
    lock: Annotated[str | None, typer.Option(help="Run it while this lock is held.")] = None,
    elect: Annotated[str | None, typer.Option(help="Run it while this process leads here.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the lock; else exit with 75 if it is held.")] = True,  # noqa: FBT002
    grace: Annotated[float, typer.Option(help="Seconds between SIGTERM and SIGKILL.")] = 5.0,
    ttl: Annotated[int, typer.Option(help="Seconds for which it is held if this machine dies.")] = 15,
    namespace: Namespace = "",
    endpoints: Endpoints = DEFAULT_ENDPOINTS,
) -> None:
    """Run a command under a lock or a leadership, and end it if that is lost."""
    from etcd_infra._inspect.supervise import Job, run_job

    try:
        job = Job(command, lock, elect, waits=wait, grace=grace, ttl=ttl)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(_run(run_job, endpoints, namespace, job))


@app.command()
def demo(
    endpoints: Annotated[
        str | None, typer.Option(help="Use this etcd instead of starting a throw-away one.")
    ] = None,
) -> None:
    """Let three processes fight for one lock while one is killed and one is frozen."""
    from etcd_infra._inspect.demo import run_demo

    raise typer.Exit(_run(run_demo, endpoints))


def _run(function: Any, *arguments: object) -> Any:
    """Run an async command; errors of etcd and of the arguments become one line and exit code 1 or 2."""
    try:
        return trio.run(function, *arguments)
    except (EtcdInfraError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


async def _inspect(  # noqa: PLR0913, PLR0917
    endpoints: str,
    namespace: str,
    kinds: list[Kind],
    name: str | None,
    output: Output,
    watch: bool,  # noqa: FBT001
) -> None:
    async with open_etcd(endpoints, **environment_options()) as backend:
        inspector = Inspector(backend, namespace)
        if not watch:
            _show(await _look(inspector, endpoints, kinds, name), output)
            return
        while True:
            found = await _look(inspector, endpoints, kinds, name)
            if output is Output.TABLE:
                sys.stdout.write("\x1b[2J\x1b[H")
            _show(found, output)
            await trio.sleep(WATCH_SECONDS)


async def _history(endpoints: str, namespace: str, name: str, output: Output) -> None:
    from etcd_infra._inspect.render import to_json

    async with open_etcd(endpoints, **environment_options()) as backend:
        found = await Inspector(backend, namespace).lock_history(name)
    if output is Output.JSON:
        sys.stdout.write(to_json(found) + "\n")
    else:
        _print_table(f"{found.name}, since revision {found.since_revision}", found.tenures)


async def _look(
    inspector: Inspector, endpoints: str, kinds: list[Kind], name: str | None
) -> dict[Kind, object]:
    return {
        kind: await _every_health(endpoints)
        if kind is Kind.HEALTH
        else await inspector.inspect(kind.value, name)
        for kind in kinds
    }


async def _every_health(endpoints: str) -> tuple[HealthInfo, ...]:
    found: list[HealthInfo] = []
    for endpoint in filter(None, map(str.strip, endpoints.split(","))):
        async with open_etcd(endpoint, **environment_options()) as backend:
            found.append(await Inspector(backend, endpoint=endpoint).health())
    return tuple(found)


def _show(found: dict[Kind, object], output: Output) -> None:
    from etcd_infra._inspect.render import to_json

    if output is Output.JSON:
        sole = next(iter(found.values())) if len(found) == 1 else found
        sys.stdout.write(to_json(sole) + "\n")
        return
    for kind, infos in found.items():
        _print_table(kind.value, cast("Sequence[Any]", infos if isinstance(infos, tuple) else (infos,)))


def _print_table(title: str, rows: Sequence[Any]) -> None:
    from rich.console import Console

    from etcd_infra._inspect.render import to_table

    Console().print(to_table(title, rows, now=time.time()))


async def _health(endpoints: str, timeout: float) -> HealthInfo | None:  # noqa: ASYNC109 - the probe's own limit
    with trio.move_on_after(timeout):
        async with open_etcd(endpoints, call_timeout=timeout, **environment_options()) as backend:
            return await Inspector(backend).health()
    return None
