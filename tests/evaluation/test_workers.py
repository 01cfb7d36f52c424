"""The processes of a sweep stay what they are."""

from __future__ import annotations

import pytest

from vtc.evaluation import workers

pytest.importorskip("joblib")


def test_a_process_that_holds_more_and_more_stays():
    from joblib.externals.loky.process_executor import ProcessPoolExecutor

    def grown():
        import builtins
        import os
        import time

        # what a module holds, and for longer than loky waits between two looks
        builtins.held_by_a_test = [
            *getattr(builtins, "held_by_a_test", ()),
            bytearray(b"x") * 400_000_000,
        ]
        time.sleep(1.1)
        return os.getpid()

    with ProcessPoolExecutor(1, initializer=workers._may_grow) as pool:
        processes = {pool.submit(grown).result() for _ in range(3)}
    assert len(processes) == 1
