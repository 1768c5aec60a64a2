from gateway.clocks import Steadiness, elapsed


class Clock:
    """True time, as a test lets it pass."""

    now = 100.0

    def __call__(self) -> float:
        """Return it."""
        return self.now


def test_true_time_goes_on() -> None:
    """Time passes, whatever the clock on the wall says."""
    assert elapsed() <= elapsed()


def test_a_clock_that_nobody_sets_is_relied_on_since_the_first_look() -> None:
    """What was before the first look is not known; what drifts slowly counts as steady."""
    clock = Clock()
    steadiness = Steadiness(clock)
    for turn in range(10):
        assert steadiness.see(5000.0 + 15.5 * turn) == 15.0 * turn
        clock.now += 15.0


def test_a_clock_that_was_set_is_relied_on_anew() -> None:
    """After a step in either direction only the time since then counts."""
    clock = Clock()
    steadiness = Steadiness(clock)
    steadiness.see(5000.0)
    for step in (7200.0, -7200.0, 6.0):
        clock.now += 60.0
        base = 5000.0 + clock.now + step
        assert steadiness.see(base) == 0.0
        clock.now += 60.0
        assert steadiness.see(base + 60.0) == 60.0
