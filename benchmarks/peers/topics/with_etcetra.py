"""etcetra in the race of topics: a put for each message, and a watch of the prefix."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from etcetra import EtcdClient, HostPortPair
from stream import END, Stream


async def publish(stream, etcd):
    async def task(number):
        count = 0
        while stream.goes_on():
            count += 1
            await etcd.put(f"{stream.name}/{id(stream):x}-{number}-{count}", stream.message())

    stream.start()
    await asyncio.gather(*map(task, range(stream.tasks)))
    await etcd.put(f"{stream.name}/end-{id(stream):x}", END)


async def listen(stream, etcd):
    watched = asyncio.Event()

    async def tell():
        await watched.wait()
        stream.ready()

    telling = asyncio.create_task(tell())
    async for event in etcd.watch_prefix(f"{stream.name}/", ready_event=watched):
        if stream.got(event.value):
            break
    await telling


async def main():
    stream = Stream()
    url = urlsplit(stream.endpoint)
    async with EtcdClient(HostPortPair(url.hostname, url.port)).connect() as etcd:
        await (publish if stream.role == "publish" else listen)(stream, etcd)
        stream.report()


asyncio.run(main())
