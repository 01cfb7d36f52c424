"""The lmms-eval model `vtc` on the trained model: the same answers by every way that must agree."""

from types import SimpleNamespace

import pytest
import torch

import vtc
import vtc.evaluation.model as model_module
from vtc.errors import OptionError, SampleError, UnsupportedModeError
from vtc.evaluation.measure import SampleCounts
from vtc.evaluation.model import Vtc

pytestmark = pytest.mark.eval

# one of each kind of question, few enough to be quick
N = 10


@pytest.fixture(scope="module")
def docs(scenes):
    return list(scenes[0].eval_docs.select(range(N)))


@pytest.fixture(scope="module")
def ask(loaded):
    """A question's inputs and its answer by plain `generate`, without anything of lmms-eval."""
    model, processor = loaded.model, loaded.processor

    def plain(doc):
        content = [{"type": "image"}, {"type": "text", "text": doc["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=[doc["image"]], text=[text], return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        end = processor.tokenizer.eos_token_id
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, pad_token_id=end, eos_token_id=end
        )
        new = out[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True), len(new)

    return plain


@pytest.fixture(scope="module")
def full(answer):
    return answer(N, method="none")


def answers(samples):
    return [sample["answer"] for sample in samples]


def test_no_compression_answers_as_plain_generate(full, docs, ask):
    plain = [ask(doc) for doc in docs]
    assert answers(full) == [text for text, _ in plain]
    assert [sample["output_tokens"] for sample in full] == [length for _, length in plain]
    assert {sample["kept_fraction"] for sample in full} == {1.0}


@pytest.mark.parametrize("method", ["vtc_cls", "random", "average_pool", "downsample"])
def test_keeping_everything_answers_as_no_compression(answer, full, method):
    assert answers(answer(N, method=method, keep=1.0)) == answers(full)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_compressed_answers_are_those_of_a_patched_model(answer, docs, ask, loaded, positions):
    samples = answer(N, method="vtc_cls", keep=0.11, positions=positions)
    with vtc.patch(loaded.model, "vtc_cls", 0.11, positions=positions) as handle:
        for sample, doc in zip(samples, docs, strict=True):
            assert sample["answer"] == ask(doc)[0]
            (selection,) = handle.selections
            assert sample["llm_tokens"] == selection.valid.sum() == 22
            assert sample["visual_tokens"] == selection.lengths[0] == 196
            assert sample["kept_fraction"] == 22 / 196


def wanted_tokens(doc):
    """The cells of a 14×14 grid that a box covers by a fifth, else the one it covers most."""
    side = doc["image"].width / 14
    found = set()
    for x0, y0, x1, y1 in doc["evidence"]:
        shares = {}
        for token in range(196):
            left, top = token % 14 * side, token // 14 * side
            width = min(x1, left + side) - max(x0, left)
            height = min(y1, top + side) - max(y0, top)
            shares[token] = max(0, width) * max(0, height) / side**2
        least = min(0.2, max(shares.values()))
        found |= {token for token, share in shares.items() if share >= least - 1e-9}
    return found


def test_evidence_recall_is_that_of_the_kept_tokens(answer, docs, ask, loaded):
    samples = answer(N, method="vtc_cls", keep=0.22, batch_size=5, timed_samples=0)
    compared = 0
    with vtc.patch(loaded.model, "vtc_cls", 0.22) as handle:
        for sample, doc in zip(samples, docs, strict=True):
            ask(doc)
            kept = set(handle.selections[0].keep[0].tolist())
            if not (wanted := wanted_tokens(doc)):
                assert "evidence_recall" not in sample
                continue
            assert sample["evidence_recall"] == len(kept & wanted) / len(wanted)
            assert "evidence_covered" not in sample
            compared += 1
    assert N // 2 < compared < N


@pytest.mark.parametrize("method", ["average_pool", "downsample"])
def test_pooling_has_no_recall_and_says_what_it_covers(answer, docs, method):
    for sample, doc in zip(answer(N, method=method, keep=0.22), docs, strict=True):
        assert "evidence_recall" not in sample
        assert sample.get("evidence_covered") == (1.0 if doc["evidence"] else None)
        # the largest square of at most 43 tokens
        assert sample["llm_tokens"] == 36


def test_the_full_model_keeps_all_evidence(full, docs):
    for sample, doc in zip(full, docs, strict=True):
        assert sample.get("evidence_recall") == (1.0 if doc["evidence"] else None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "vtc_cls", "keep": 0.11},
        {"method": "vtc_cls", "keep": 0.11, "positions": "renumber"},
        {"method": "random", "keep": 0.33, "seed": 5},
        {"method": "average_pool", "keep": 0.22},
        {"method": "downsample", "keep": 0.22},
        {"method": "none"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_batches_answer_as_one_by_one(answer, arguments):
    alone = answer(N, batch_size=1, **arguments)
    batched = answer(N, batch_size=5, timed_samples=3, **arguments)
    different = {"encoder_ms", "selector_ms", "ttft_ms", "tpot_ms", "kv_bytes"}
    for one, other in zip(alone, batched, strict=True):
        assert {k: v for k, v in one.items() if k not in different} == {
            k: v for k, v in other.items() if k not in different
        }
    # times are those of a question alone, or not given
    assert [s["ttft_ms"] is not None for s in batched] == [True] * 3 + [False] * (N - 3)
    assert all(s["ttft_ms"] > 0 for s in alone)


def test_seeds_of_random_differ_and_repeat(answer):
    one, again, other = (answer(N, method="random", keep=0.11, seed=s) for s in (1, 1, 2))
    recall = [[s.get("evidence_recall") for s in samples] for samples in (one, again, other)]
    assert recall[0] == recall[1] != recall[2]
    assert answers(one) == answers(again)


def test_the_warm_up_draws_nothing_from_the_generator(loaded, monkeypatch):
    # sampled answers would depend on it
    model, before = Vtc(loaded, method="none"), torch.get_rng_state()
    monkeypatch.setattr(model, "answer", lambda batch, handle: torch.rand(3))
    model.warm_up([], None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_left_as_it_was(answer, loaded):
    answer(2, method="vtc_cls", keep=0.11)
    with pytest.raises(vtc.VtcError, match="is not patched"):
        vtc.unpatch(loaded.model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=nope,keep=0.1", "'nope' is unknown"),
        ("keep=1", "write 1.0 or 1tok"),
        ("keep=0.1,stop=8", "has no option 'stop'; it has scorer, selector, start"),
        ("keep=0.1,start=high", "expected int"),
        ("keep=0.1,positions=sideways", "positions='sideways' is unknown"),
        ("keep=0.1,batch_size=auto", "batch_size='auto': expected a whole number of at least 1"),
        ("keep=0.1,timed_samples=1.5", "timed_samples=1.5: expected a whole number"),
        ("method=vtc_cls", "got keep=None, expected how much is kept"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr("vtc.evaluation.model.load", None)
    with pytest.raises(OptionError) as caught:
        Vtc.create_from_arg_string(f"pretrained=anything,{arguments}")
    assert message in str(caught.value)


def test_arguments_as_lmms_eval_writes_them(model_name):
    arguments = "method=vtc_cls,keep=22tok,start=8,positions=renumber,dtype=bfloat16,device=cpu"
    model = Vtc.create_from_arg_string(f"pretrained={model_name},{arguments}", {"batch_size": 4})
    assert (model.compression.keep, model.compression.options) == (22, {"start": 8})
    assert (model.compression.positions, model.batch_size) == ("renumber", 4)
    assert str(model.loaded.model.dtype) == "torch.bfloat16"
    model.clean()
    with pytest.raises(vtc.VtcError, match="was cleaned after its run"):
        model.loaded  # noqa: B018


def test_tasks_it_cannot_answer_are_refused(loaded):
    model = Vtc(loaded, method="none")
    with pytest.raises(UnsupportedModeError, match="likelihood task"):
        model.loglikelihood([])
    with pytest.raises(UnsupportedModeError, match="several rounds"):
        model.generate_until_multi_round([])


@pytest.fixture
def two_processes(monkeypatch):
    """This process is one of two; what the other one says is to be put into the list."""
    other = []
    dist = "vtc.evaluation.model.dist"
    monkeypatch.setattr(f"{dist}.is_initialized", lambda: True)
    monkeypatch.setattr(f"{dist}.get_world_size", lambda: 2)

    def gather(found, value):
        found[:] = [value, other.pop(0)]

    monkeypatch.setattr(f"{dist}.all_gather_object", gather)
    return other


def test_a_sample_that_failed_in_another_process_is_refused_here(two_processes):
    two_processes += [(3, 8, "question 5 of t: RuntimeError: no memory left")]
    with pytest.raises(SampleError) as caught:
        model_module._refuse(0, 8, None)
    assert "3 of 16 samples failed" in str(caught.value)
    assert "question 5 of t: RuntimeError: no memory left" in str(caught.value)


def test_means_are_over_all_processes(two_processes, monkeypatch):
    logged = {}
    monkeypatch.setattr(model_module, "log_metrics", lambda **given: logged.update(given))
    two_processes += [([("t", 2, {"kept_fraction": 0.25})] * 3, 8.0)]
    count = SampleCounts(output_tokens=2, numbers={"kept_fraction": 0.75})
    request = SimpleNamespace(args=(None, None, None, 0, "t", "test"))
    model_module._log([request], [SimpleNamespace(token_counts=count)], 4.0)
    assert logged["additional_metrics"] == {"kept_fraction": 0.375, "n_samples": 4, "n_failed": 0}
    assert (logged["total_gen_tokens"], logged["avg_speed"]) == (8, 1.0)
