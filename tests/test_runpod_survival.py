"""RunPod's queue gets an answer to every job, once, whoever is killed and whatever is sent; at full length in
benchmarks/runpod_queue.py."""

from pathlib import Path

from benchmarks import runpod_queue


def test_every_job_is_answered_once_and_right_whoever_is_killed(tmp_path: Path) -> None:
    figures = runpod_queue.under_kills(tmp_path, jobs=7, kills=4, seed=1)
    assert figures.wrong == []
    assert (figures.right_videos, figures.errors_of_callers) == (6, 1)
    assert figures.kills == {"worker": 2, "server": 2}


def test_what_is_malformed_is_answered_with_the_callers_error_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    figures = runpod_queue.malformed(tmp_path, range(12))
    assert figures.wrong == []
    assert figures.right_videos + figures.errors_of_callers == 12
    assert figures.errors_of_callers > 6
