"""aetcd in the race of topics: a put for each message, and a watch of the prefix."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aetcd
from stream import END, Stream


async def publish(stream, client):
    async def task(number):
        count = 0
        while stream.goes_on():
            count += 1
            await client.put(
                f"{stream.name}/{id(stream):x}-{number}-{count}".encode(), stream.message().encode()
            )

    stream.start()
    await asyncio.gather(*map(task, range(stream.tasks)))
    await client.put(f"{stream.name}/end-{id(stream):x}".encode(), END.encode())


async def listen(stream, client):
    watching = await client.watch_prefix(f"{stream.name}/".encode())
    stream.ready()
    async for event in watching:
        if stream.got(event.kv.value):
            return


async def main():
    stream = Stream()
    url = urlsplit(stream.endpoint)
    async with aetcd.Client(host=url.hostname, port=url.port) as client:
        await (publish if stream.role == "publish" else listen)(stream, client)
        stream.report()


asyncio.run(main())
