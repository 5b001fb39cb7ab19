"""Rotated certificates: calls begin on the newest channel, and old ones end with their last call."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio

from etcd_infra._backends.channel import ChannelError
from etcd_infra._backends.rotated_channel import RotatedChannel
from etcd_infra._etcd.background import open_background
from tests.helpers.scripted_channel import ScriptedChannel


class Files:
    """Files with certificates, and the channels that were made of them."""

    def __init__(self):
        self.content = "first"
        self.made = []

    def make(self):
        """Make a channel of what is in the files."""
        if self.content == "rubbish":
            raise OSError("rubbish.pem")
        channel = ScriptedChannel()
        channel.answers.extend([self.content.encode()] * 9)
        self.made.append(channel)
        return channel

    def stamp(self):
        """What changes with the files."""
        if self.content is None:
            raise FileNotFoundError("gone.pem")
        return self.content


@asynccontextmanager
async def rotated():
    files = Files()
    async with open_background() as background:
        yield RotatedChannel(files.make, files.stamp, background), files


def call(channel):
    return channel.unary("/KV/Range", b"", time_limit=5.0)


async def test_channel_is_kept_while_the_files_are_the_same(autojump_clock):
    """Many calls, one channel."""
    async with rotated() as (channel, files):
        assert [b"first"] * 3 == [await call(channel) for _ in range(3)]
        assert 1 == len(files.made)


async def test_new_files_mean_a_new_channel(autojump_clock):
    """The next call uses them; the old channel is closed as soon as it has no calls."""
    async with rotated() as (channel, files):
        await call(channel)
        async with channel.stream("/Watch/Watch"):
            files.content = "second"
            assert b"second" == await call(channel)
            await trio.sleep(1)
            assert [0, 0] == [made.closed for made in files.made]
        await trio.sleep(1)
        assert [1, 0] == [made.closed for made in files.made]
    await channel.aclose()
    assert 1 == files.made[1].closed


async def test_idle_channel_is_closed_at_once(autojump_clock):
    """Nothing is left of a channel without calls when the next one is made."""
    async with rotated() as (channel, files):
        await call(channel)
        files.content = "second"
        await call(channel)
        await trio.sleep(1)
        assert [1, 0] == [made.closed for made in files.made]


@pytest.mark.parametrize(("content", "shown"), [(None, "gone.pem"), ("rubbish", "rubbish.pem")])
async def test_unreadable_files_are_no_connection(content, shown, autojump_clock):
    """A first call that finds no files was never sent; once they are there all is well."""
    async with rotated() as (channel, files):
        files.content = content
        with pytest.raises(ChannelError, match=shown) as caught:
            await call(channel)
        assert caught.value.never_sent
        files.content = "first"
        assert b"first" == await call(channel)
        assert 1 == len(files.made)


@pytest.mark.parametrize("content", [None, "rubbish"])
async def test_half_a_rotation_disturbs_nobody(content, autojump_clock):
    """While one file is new and the other still old, or missing, calls go on as before; then the new ones count."""
    async with rotated() as (channel, files):
        await call(channel)
        files.content = content
        for _ in range(3):
            assert b"first" == await call(channel)
        files.content = "second"
        assert b"second" == await call(channel)


async def test_closed_channel_makes_no_other_one(autojump_clock):
    """After the end nothing is opened any more, rotated files or not."""
    async with rotated() as (channel, files):
        await call(channel)
        await channel.aclose()
        for files.content in ("first", "second"):
            with pytest.raises(trio.ClosedResourceError):
                await call(channel)
        assert 1 == len(files.made)
