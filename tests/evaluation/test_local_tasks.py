"""Stock tasks on local copies: only where the questions come from changes, and what is not whole is
refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vtc.errors import InputError, OptionError
from vtc.evaluation.benchmarks import BENCHMARKS, GQA_PICTURES, availability, benchmark
from vtc.evaluation.local_copies import local_copy
from vtc.evaluation.local_tasks import find_copies, with_pictures, write_local_tasks

pytestmark = pytest.mark.eval
datasets = pytest.importorskip("datasets", reason="needs the eval extra")

# one row that the stock code of every benchmark can read
TEN = ["red"] * 10
ROW = {
    "question_id": "1",
    "question": "which?",
    "answer": "yes",
    "category": "existence",
    "imageId": "n1",
    "type": "human_test",
    "hint": "",
    "answers": TEN,
    **{name: name for name in ("index", "A", "B", "C", "D", "L2-category", "source", "split")},
    "choices": ["red", "blue"],
    "dataset": "d",
    "question_type": "Regular Text Recognition",
    "bbox": [1.0, 2.0, 3.0, 4.0],
    "segmentation": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
OTHERWISE = {
    "scienceqa_img": {"answer": 1},
    "vqav2_val": {"answers": [{"answer": "red"}] * 10},
    **{name: {"answer": ["the red one", "it"]} for name in BENCHMARKS if name[:6] == "refcoc"},
}
# the tasks of RefCOCO differ in split and kind; one of each kind is enough
EACH = [name for name in BENCHMARKS if name[:6] != "refcoc"] + [
    "refcoco_bbox_rec_val",
    "refcoco+_bbox_testA",
    "refcocog_seg_test",
]


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(columns, rows=2, without=()):
    """A `datasets.Dataset` of equal rows."""
    columns = {name: value for name, value in columns.items() if name not in without}
    found = datasets.Dataset.from_dict({name: [value] * rows for name, value in columns.items()})
    return found.cast_column("image", datasets.Image()) if "image" in columns else found


def columns_of(name):
    of = benchmark(name)
    found = {column: (ROW | OTHERWISE.get(name, {}))[column] for column in of.columns}
    return found if name == "gqa" else found | {"image": picture()}


def put(root, name, rows=2, without=(), split=None, folder=None):
    """A copy as `hf download` leaves it, in a folder of the task's name."""
    of = benchmark(name)
    split = split or of.split
    folder = root / (folder or name)
    for at, columns in [(of.subset or "data", columns_of(name))] + [
        (GQA_PICTURES, {"id": "n1", "image": picture()})
    ] * (name == "gqa"):
        (folder / at).mkdir(parents=True, exist_ok=True)
        file = folder / at / f"{split}-00000-of-00001.parquet"
        table(columns, rows, without).to_parquet(file)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No waiting between tries, and a cache of data sets that nothing else uses."""
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # lmms-eval asks once
    _resolve_hf_datasets_cache_dir.cache_clear()
    yield
    _resolve_hf_datasets_cache_dir.cache_clear()


def config(path):
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(path))


def code(value):
    """Functions are loaded anew each time; what they do is compared."""
    if isinstance(value, list):
        return [code(part) for part in value]
    if isinstance(value, dict):
        return {key: code(part) for key, part in value.items()}
    return value.__code__ if callable(value) else value


@pytest.mark.parametrize("name", EACH)
def test_only_the_data_changes_and_the_stock_code_reads_it(name, tmp_path):
    from lmms_eval.tasks import TaskManager, get_task_dict

    put(tmp_path / "root", name)
    (copy,) = write_local_tasks(tmp_path / "root", tmp_path / "tasks", [name])
    stock, own = config(benchmark(name).file), config(tmp_path / "tasks" / f"{name}.yaml")
    changed = {"dataset_path", "dataset_name", "dataset_kwargs"}
    # GQA's own code fetches the pictures from the hub
    changed |= {"process_docs"} if name == "gqa" else set()
    rest = [{k: code(v) for k, v in found.items() if k not in changed} for found in (stock, own)]
    assert rest[0] == rest[1]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    for asked in (name, f"vtc_local_{name}", "vtc_local"):
        found = get_task_dict([asked], manager, "chat")
        while isinstance(found, dict):
            ((_, found),) = found.items()
        docs = list(found.test_docs())
        assert len(docs) == copy.questions.rows * (2 if "bbox_rec" in name else 1)
        assert found.doc_to_visual(docs[0])[0].size == (20, 10)
        assert isinstance(found.doc_to_text(docs[0]), str)
        assert found.process_results(docs[0], ["yes"])


def saved(folder):
    datasets.DatasetDict({"test": table(columns_of("pope"))}).save_to_disk(folder)


def cached(folder):
    put(folder.parent, "pope", folder=f"{folder.name}/snapshots/aa")
    put(folder.parent, "pope", rows=5, folder=f"{folder.name}/snapshots/bb")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aa\n")


LAYOUTS = {
    "pope": lambda folder: put(folder.parent, "pope"),
    "POPE": saved,
    "lmms-lab/POPE": lambda folder: put(folder.parent, "pope", folder="POPE"),
    "datasets--lmms-lab-encoder--POPE": cached,
    "datasets--lmms-lab--POPE": cached,
    "Pope": lambda folder: (
        folder.mkdir(),
        table(columns_of("pope")).to_parquet(folder / "test.parquet"),
    ),
}


@pytest.mark.parametrize("place", LAYOUTS)
def test_layouts(place, tmp_path):
    LAYOUTS[place](tmp_path / place)
    # what else lies there is no matter
    (tmp_path / "notes").mkdir()
    (copy,), notes = find_copies(tmp_path)
    assert (copy.benchmark.name, copy.questions.rows, notes) == ("pope", 2, [])
    reader = copy.config["dataset_path"]
    if copy.questions.files:
        loaded = datasets.load_dataset(reader, **copy.config["dataset_kwargs"])
    else:
        loaded = datasets.load_from_disk(reader)
    assert loaded["test"].num_rows == 2


def test_one_split_of_refcoco_makes_the_tasks_of_that_split(tmp_path):
    put(tmp_path, "refcoco_bbox_rec_testA", folder="RefCOCO")
    copies, notes = find_copies(tmp_path)
    assert {copy.benchmark.name for copy in copies} == {
        "refcoco_bbox_rec_testA",
        "refcoco_bbox_testA",
    }
    # the segmentation is missing, and the other splits
    assert len(notes) == sum(name.startswith("refcoco_") for name in BENCHMARKS) - 2
    assert all(note.startswith("left out: refcoco_") for note in notes)


def shards(root):
    put(root, "pope")
    (file,) = root.rglob("*.parquet")
    file.rename(file.with_name("test-00000-of-00003.parquet"))


def twice(root):
    folder = put(root, "pope")
    shutil.copytree(folder / "data", folder / "more")


def damaged(root):
    folder = put(root, "pope")
    next(folder.rglob("*.parquet")).write_text("version https://git-lfs.github.com/spec/v1\n")


def one_dataset(root):
    table(columns_of("pope")).save_to_disk(root / "pope")


def two_snapshots(root):
    cached(root / "datasets--lmms-lab-encoder--POPE")
    (root / "datasets--lmms-lab-encoder--POPE" / "refs" / "main").unlink()


def pictures_missing(root):
    shutil.rmtree(put(root, "gqa") / GQA_PICTURES)


REFUSED = {
    "nothing there": (lambda root: None, "has no data set of a benchmark"),
    "split": (
        lambda root: put(root, "pope", split="train"),
        "pope: .*has 'train', expected the split 'test'",
    ),
    "column": (
        lambda root: put(root, "mme", without=("category",)),
        "mme: .*has the columns question_id, .*expected category too",
    ),
    "picture": (lambda root: put(root, "pope", without=("image",)), "expected image too"),
    "rows": (lambda root: put(root, "pope", rows=0), "pope: .*no rows"),
    "shards": (shards, "has 1 files of the split, expected the 3"),
    "twice": (twice, "lies in .*data and in .*more"),
    "damaged": (damaged, "cannot be read .*a pointer of Git LFS is not the file"),
    "one dataset": (one_dataset, "single Dataset, expected splits by name"),
    "snapshots": (two_snapshots, "has 2 snapshots and none is named main"),
    "gqa": (pictures_missing, "gqa: .*expected the split 'testdev' of config 'testdev_balanced_im"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_whole_is_refused(what, tmp_path):
    spoil, message = REFUSED[what]
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        find_copies(tmp_path)


def test_what_is_asked_for_must_be_there(tmp_path):
    put(tmp_path, "pope")
    with pytest.raises(InputError, match=r"gqa: .*hf download lmms-lab-encoder/GQA"):
        find_copies(tmp_path, ["pope", "gqa"])
    with pytest.raises(OptionError, match="benchmark 'popes' is unknown; expected one of pope"):
        find_copies(tmp_path, ["popes"])
    with pytest.raises(InputError, match="is not a folder"):
        find_copies(tmp_path / "gone")
    with pytest.raises(OptionError, match="prompts: got 'mme'"):
        write_local_tasks(tmp_path, tmp_path / "tasks", prompts={"mme": {}})


def test_prompts_replace_the_stock_ones_and_leave_the_rest(tmp_path):
    put(tmp_path, "textvqa_val")
    prompts = {"textvqa_val": {"post_prompt": "!"}}
    write_local_tasks(tmp_path, tmp_path / "tasks", prompts=prompts)
    found = config(tmp_path / "tasks" / "textvqa_val.yaml")["lmms_eval_specific_kwargs"]
    assert found == {"default": {"pre_prompt": "", "post_prompt": "!", "ocr": False}}


def test_gqa_is_joined_by_name(tmp_path):
    folder = put(tmp_path, "gqa")
    colors = {"n3": "green", "n1": "red", "n2": "blue"}
    images = [Image.new("RGB", (4, 4), color) for color in colors.values()]
    pictures = datasets.Dataset.from_dict({"id": [*colors], "image": images}).cast_column(
        "image", datasets.Image()
    )
    pictures.to_parquet(tmp_path / "pictures.parquet")
    datasets.DatasetDict({"testdev": pictures}).save_to_disk(tmp_path / "saved")
    ids = ["n1", "n2", "n2", "n3"]
    questions = datasets.Dataset.from_dict({"imageId": ids})
    for source in ("pictures.parquet", "saved"):
        joined = with_pictures(questions, [str(tmp_path / source)])
        for name, row in zip(ids, joined, strict=True):
            assert row["image"].getpixel((0, 0)) == Image.new("RGB", (1, 1), colors[name]).getpixel(
                (0, 0)
            )
    with pytest.raises(InputError, match="picture 'n9' of a question is not among the 3"):
        with_pictures(
            datasets.Dataset.from_dict({"imageId": ["n9"]}), [str(tmp_path / "pictures.parquet")]
        )
    # joined by hand, no second data set is needed
    of = benchmark("gqa")
    own = table(columns_of("gqa") | {"image": picture()}, without=("imageId",))
    own.to_parquet(next((folder / of.subset).glob("*")))
    shutil.rmtree(folder / GQA_PICTURES)
    assert local_copy(folder, of).pictures is None


def prepare(cache, owner, tmp_path):
    """What `load_dataset("owner/POPE")` leaves behind."""
    put(tmp_path / "source", "pope")
    (file,) = (tmp_path / "source").rglob("*.parquet")
    datasets.load_dataset(
        "parquet", data_files={"test": str(file)}, cache_dir=str(tmp_path / "made")
    )
    (made,) = (tmp_path / "made" / "parquet").glob("*/*/*/")
    folder = cache / f"{owner}___pope" / "default" / "0.0.0" / "aa"
    shutil.copytree(made, folder)
    (folder / "parquet-test.arrow").rename(folder / "pope-test.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "pope"}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("owner", "said"),
    [
        ("lmms-lab-encoder", "ready"),
        ("lmms-lab", "prepared under the older name lmms-lab/POPE"),
        (None, "not in the cache"),
    ],
)
def test_whether_a_task_runs_offline_now(owner, said, tmp_path):
    from lmms_eval.tasks import TaskManager, get_task_dict

    if owner:
        prepare(tmp_path / "cache", owner, tmp_path)
    assert availability(benchmark("pope")).startswith(said)
    folder = str(benchmark("pope").file.parent)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if owner == "lmms-lab-encoder":
        assert len(get_task_dict(["pope"], manager, "chat")["pope"].test_docs()) == 2
    else:
        with pytest.raises(Exception, match="RetryError"):
            get_task_dict(["pope"], manager, "chat")


def test_what_was_only_downloaded_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path / "datasets--lmms-lab-encoder--POPE")
    assert availability(benchmark("pope")) == (
        f"downloaded, not prepared: vtc tasks --data {tmp_path} --tasks pope"
    )
    assert find_copies(tmp_path, ["pope"])[0][0].questions.rows == 2


def test_every_benchmark_is_one_of_the_installed_lmms_eval():
    for name, of in BENCHMARKS.items():
        assert of.config["task"] == name
        assert of.dataset.count("/") == 1 and of.split and of.metrics


def test_docs_have_every_command():
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    from vtc.evaluation.benchmarks import commands

    for name in BENCHMARKS:
        assert f"`{name}`" in text
    for name in EACH[:-3]:
        for command in commands(name):
            assert command in text
