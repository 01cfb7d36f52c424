"""The table as text: every row says its policy, intervals, difference to random and evidence."""

import pytest

from vtc.evaluation import printed, table

pytestmark = pytest.mark.eval

CELLS = {
    ("none", "keep", None, 0): [1, 1, 1, 0],
    ("vtc_cls", "keep", 0.5, 0): [1, 1, 0, 0],
    ("vtc_cls", "renumber", 0.5, 0): [1, 0, 0, 0],
    ("random", "keep", 0.5, 0): [1, 0, 0, 0],
    ("random", "keep", 0.5, 1): [0, 1, 1, 0],
}


@pytest.fixture
def summary(samples_frame):
    return table.tables(samples_frame(CELLS))[1]


def as_dict(row):
    return dict(zip(printed.COLUMNS, printed.cells(row), strict=True))


def test_every_row_says_everything(summary):
    for row in summary:
        cells = as_dict(row)
        assert cells["positions"] == row["positions"] and cells["keep"] == row["keep"]
        assert cells["accuracy"].startswith(f"{100 * row['accuracy']:.1f} [")
        assert all(cells.values())


def test_numbers_are_points_with_sign_and_interval(summary):
    cells = as_dict(summary[1])
    row = summary[1]
    low, high = 100 * row["vs_full_low"], 100 * row["vs_full_high"]
    assert cells["vs full"] == f"-25.0 [{low:+.1f}, {high:+.1f}]"
    assert cells["vs random"].startswith("+12.5 [")
    assert cells["evidence"] == "n/a"


def test_active_tokens_stand_beside_kept_ones(samples_frame):
    cells = {("none", "keep", None, 0): [1, 1], ("shortv", "keep", 0.5, 0): [1, 0]}
    shown = as_dict(table.tables(samples_frame(cells))[1][1])
    assert (shown["kept"], shown["active"], shown["of full"]) == ("100.0 %", "50.0 %", "n/a")


def test_nothing_is_compared_with_itself(summary):
    assert as_dict(summary[0])["vs full"] == as_dict(summary[0])["vs random"] == "—"
    assert as_dict(summary[3])["method"] == "random ×2"
    assert as_dict(summary[3])["vs random"] == "—"


def test_covered_evidence_stands_beside_recall_only(summary):
    row = summary[1] | {"evidence_recall": 0.5, "evidence_covered": 0.75}
    assert printed.evidence(row) == "50 % (75 % covered)"
    assert printed.evidence(row | {"evidence_recall": None}) == "n/a"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "+12.3"), (-0.5, "-50.0"), (0.0, "+0.0"), (-0.0001, "+0.0"), (-0.001, "-0.1")],
)
def test_points_that_round_to_zero_are_not_negative(value, text):
    assert printed.points(value) == text


def test_one_question_has_no_interval(samples_frame):
    cells = {("none", "keep", None, 0): [1], ("uniform", "keep", 0.5, 0): [0]}
    row = table.tables(samples_frame(cells))[1][1]
    assert as_dict(row)["vs full"] == "-100.0 [n/a]"


@pytest.mark.parametrize("width", ["40", "200"])
def test_no_number_is_cut_on_any_screen(summary, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    printed.show(summary)
    out = capsys.readouterr().out
    assert "…" not in out
    lines = [line for line in out.splitlines() if line.startswith((" vtc_cls", " random"))]
    for row, line in zip(summary[1:], lines, strict=True):
        shown = as_dict(row)
        for column in printed.NOT_ON_SCREEN:
            del shown[column]
        assert line.split() == " ".join(shown.values()).split()


@pytest.mark.parametrize(
    ("label", "short"),
    [
        ("shortv", "shortv"),
        ("shortv:calibration=/a/b/c.json", "shortv:calibration=c.json"),
        (
            "shortv:calibration='/a b/c d.json',scorer=random",
            "shortv:calibration=c d.json,scorer=random",
        ),
        (
            "naavit:calibration=c.json@0.5+var:calibration=/x/y.json",
            "naavit:calibration=c.json@0.5+var:calibration=y.json",
        ),
    ],
)
def test_folders_are_left_out_of_names(label, short):
    assert printed.short(label) == short
