"""What callers are told, and how well the remaining time is guessed."""

from avatar_api.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_percent_and_places_count_from_one_to_all() -> None:
    progress = Progress()
    told = [progress.step(clip, 2, step, 4) for clip in range(2) for step in range(4)]
    assert [(report["clip"], report["step"]) for report in told] == [(c, s) for c in (1, 2) for s in (1, 2, 3, 4)]
    assert [report["percent"] for report in told] == [12.5 * number for number in range(1, 9)]
    assert {(report["clips"], report["steps"]) for report in told} == {(2, 4)}


def test_the_remaining_time_is_learnt_from_the_jobs_own_steps() -> None:
    """Steps of 2 s, and 10 s before the first step of each clip."""
    clock = Clock()
    progress = Progress(clock)
    guesses: list[float | None] = []
    for clip in range(3):
        for step in range(5):
            clock.now += 12 if step == 0 else 2
            guesses.append(progress.step(clip, 3, step, 5).get("eta_seconds"))
    whole = 3 * (12 + 4 * 2)
    done = [20 * clip + 12 + 2 * step for clip in range(3) for step in range(5)]
    assert guesses[0] is None, "after one step nothing is known"
    assert guesses[1:] == [whole - seconds for seconds in done[1:]]
