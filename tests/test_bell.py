"""Waking a loop that has nothing to do."""

import asyncio

import pytest

from gateway.bell import Bell


async def test_a_ring_before_the_wait_is_not_lost() -> None:
    """What happened while a loop was busy ends its next wait at once."""
    bell = Bell()
    listener = bell.listener()
    bell.ring()
    async with asyncio.timeout(5):
        await listener.wait(3600)


async def test_a_wait_ends_by_itself() -> None:
    """Without a ring the wait ends after its time."""
    async with asyncio.timeout(5):
        await Bell().listener().wait(0.01)


async def test_what_only_comes_with_time_is_not_woken_by_a_ring() -> None:
    """A listener that does not want to be woken waits its time out; the others hear the ring."""
    bell = Bell()
    sleeper, waker = bell.listener(woken=False), bell.listener()
    bell.ring()
    async with asyncio.timeout(5):
        await waker.wait(3600)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await sleeper.wait(3600)


async def test_a_loop_that_is_cancelled_together_with_a_ring_ends() -> None:
    """A stop that meets a ring ends the loop; born with the first version, which waited by `wait_for`."""
    bell = Bell()
    listener = bell.listener()

    async def loop() -> None:
        while True:
            await listener.wait(3600)

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    bell.ring()
    await asyncio.sleep(0)  # the ring has woken the wait, the loop has not gone on yet
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=2)
    assert task in done
    assert task.cancelled()
