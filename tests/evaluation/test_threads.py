"""A container's CPU quota, as Linux states it in both versions of control groups."""

import pytest
import torch

from vtc.evaluation import threads
from vtc.evaluation.threads import cpu_quota, within_quota


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", None)],
)
def test_version_two(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(("limit", "expected"), [("400000", 4), ("-1", None)])
def test_version_one(tmp_path, limit, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(limit + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == expected


def test_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path / "gone") is None
    (tmp_path / "cpu.max").write_text("garbage")
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "inside"), [(1, 1), (64, 2), (None, 2)])
def test_threads_are_lowered_only_and_set_back(monkeypatch, quota, inside):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError), within_quota():
            assert torch.get_num_threads() == inside
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
