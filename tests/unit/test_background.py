"""Background tasks serve a body to its end, and no longer."""

from __future__ import annotations

import trio

from etcd_infra._etcd.background import open_background


async def test_task_goes_on_while_the_cancelled_body_cleans_up(autojump_clock):
    """Cancelled from outside, the body's clean-up is still served; then the task ends, too."""
    seen = []

    async def serve(task_status) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            seen.append("task ended")

    with trio.move_on_after(1):
        async with open_background() as background:
            await background.start(serve)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                seen.append("body ended")
    assert ["body ended", "task ended"] == seen


async def test_task_that_is_cancelled_while_it_starts_ends(autojump_clock):
    """The cancellation comes right before the task says that it has started: nobody waits for ever."""
    ended = []

    async def slow(task_status) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    began = trio.current_time()
    with trio.fail_after(10), trio.move_on_after(1):
        async with open_background() as background:
            await background.start(slow)
    assert [began + 2] == ended
