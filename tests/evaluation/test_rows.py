"""A sweep with methods that skip work: what is active, what is kept, and what the report shows."""

import base64
import io
import json
import re

import pandas as pd
import pytest
from PIL import Image

from vtc.calibration import Calibration
from vtc.evaluation import printed

pytestmark = pytest.mark.eval

QUESTIONS = 3


@pytest.fixture(scope="module")
def rows(sweep, tmp_path_factory):
    """The sweep's result; contributions of the six layers are made up: 3, 5 and 0 are lowest."""
    folder = tmp_path_factory.mktemp("rows")
    file = folder / "calibration.json"
    Calibration(layer_contribution=(0.2, 0.5, 0.6, 0.0, 0.4, 0.1)).save(file)
    return sweep(
        folder / "out",
        methods=(
            f"shortv:calibration='{file}'",
            "yopo:heads=1.0",
            "sink_removal:mode=mask,dims=(24,),tau=7.0",
            "vtc_cls@0.5+naavit:layers=(2,4)",
        ),
        keeps=(0.11, 8),
        layer_keeps=(0.5, 0.45, 0.6),
        questions=QUESTIONS,
        pictures=1,
    )


def one(result, start):
    (row,) = [row for row in result.rows if row["label"].startswith(start)]
    return row


@pytest.mark.parametrize(
    ("start", "kept", "active"),
    [
        ("shortv", 1.0, 3 / 6),
        ("yopo", 1.0, 3 / 6),
        ("sink_removal", 1.0, 1.0),
        # half of the tokens, in four of six layers
        ("vtc_cls@", 0.5, 0.5 * 4 / 6),
    ],
)
def test_shares_are_those_of_the_layers_that_leave_tokens_active(rows, start, kept, active):
    found = [row for row in rows.rows if row["label"].startswith(start)]
    found = [row for row in found if row["keep"] in ("0.5", "adaptive")]
    assert len(found) == 1
    assert found[0]["kept_fraction"] == kept
    assert found[0]["active_fraction"] == pytest.approx(active)


def test_what_only_skips_work_keeps_all_evidence(rows):
    for row in rows.rows:
        if row["label"].startswith(("shortv", "yopo", "sink_removal", "none")):
            assert row["evidence_recall"] == 1.0
        if row["label"] == "random":
            assert row["evidence_recall"] < 1.0


def test_shares_of_the_same_layers_are_run_once_and_it_is_said(rows):
    keeps = [row["keep"] for row in rows.rows if row["label"].startswith("shortv")]
    assert keeps == ["0.5", "0.6"]
    assert [note for note in rows.notes if note.startswith("yopo")] == [
        "yopo:heads=1.0: keep=0.45 not run, the same as keep=0.5 (3 of 6 layers)"
    ]
    assert json.loads((rows.out / "table.json").read_text())["notes"] == list(rows.notes)
    assert all(printed.short(note) in rows.report.read_text() for note in rows.notes)


def test_columns_of_the_csv(rows):
    table = pd.read_csv(rows.out / "table.csv")
    for name in ("active_fraction", "ttft_ratio", "ttft_ratio_p20", "ttft_ratio_p80"):
        assert table[name].notna().all()


def test_the_report_shows_all_figures_and_each_plan_once(rows):
    text = rows.report.read_text()
    alts = re.findall(r'src="data:image/svg\+xml,[^"]+" alt="([^"]+)"', text)
    against = ("visual tokens kept", "active visual tokens", "time to first token")
    assert [any(words in alt for alt in alts) for words in against] == [True] * 3
    names = ("accuracy", "accuracy_active", "accuracy_time")
    assert all((rows.out / f"{name}.{e}").exists() for name in names for e in ("png", "svg"))
    charts = re.findall(r'src="data:image/webp;base64,([^"]+)" alt="([^"]+): decoder layers"', text)
    assert [alt.partition(":")[0] for _, alt in charts] == [
        "shortv",
        "yopo",
        "sink_removal",
        "vtc_cls@0.5+naavit",
    ]
    for data, _ in charts:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.height > image.width / 2


def test_no_folder_of_the_machine_is_named_beside_a_method(rows):
    text = rows.report.read_text()
    (row,) = [row for row in rows.summary if row["keep"] == "0.5" and "shortv" in row["method"]]
    folder = row["options"]["calibration"].rpartition("/")[0]
    # the command is what was typed
    before, _, behind = text.partition("<pre>")
    everything = before + behind.partition("</pre>")[2]
    assert "shortv:calibration=calibration.json" in everything and folder not in everything


def test_only_what_drops_tokens_is_drawn_over_the_pictures(rows):
    text = rows.report.read_text()
    kept = text.partition('class="strip kept"')[2].partition("</div>")[0]
    alts = re.findall(r'src="data:image/webp;base64,[^"]+" alt="([^"]+)"', kept)
    shown = [alt.partition(": ")[0] for alt in alts]
    assert not [alt for alt in shown if alt.startswith(("shortv", "yopo", "sink_removal"))]
    assert {"full model", "random", "uniform", "average_pool", "downsample"} <= set(shown)


def test_the_full_model_is_timed_beside_every_timed_question(rows):
    frame = rows.samples
    timed = frame[frame["ttft_ms"].notna()]
    assert len(timed) == len(rows.rows)  # one each
    assert (timed["full_ttft_ms"] > 0).all()
    assert frame[frame["ttft_ms"].isna()]["full_ttft_ms"].isna().all()
