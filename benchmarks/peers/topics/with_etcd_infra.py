"""etcd-infra in the race of topics: a listener without a group, or a consumer of an ordered or a sharing group."""

from __future__ import annotations

import trio
from stream import END, Stream

from etcd_infra import open_coordinator


async def publish(stream, topic):
    async def task():
        while stream.goes_on():
            await topic.publish(stream.message().encode())

    stream.start()
    async with trio.open_nursery() as nursery:
        for _ in range(stream.tasks):
            nursery.start_soon(task)
    await topic.publish(END.encode())


async def listen(stream, topic):
    async with topic.subscribe() as messages:
        stream.ready()
        async for message in messages:
            if stream.got(message.payload):
                return


async def consume(stream, topic):
    async with topic.subscribe(group="g", ack_after=600) as messages:
        stream.ready()
        async for message in messages:
            async with message:
                if stream.got(message.payload):
                    return


ROLES = {"publish": publish, "listen": listen, "consume": consume}


async def main():
    stream = Stream()
    async with open_coordinator(stream.endpoint, namespace="bench") as infra:
        await ROLES[stream.role](stream, infra.topic(stream.name, type=bytes))
        stream.report()


trio.run(main)
