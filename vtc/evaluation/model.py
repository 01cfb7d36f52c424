"""The model `vtc` for stock lmms-eval: any image-text-to-text model and its processor, compressed.

One chat class of our own instead of a mixin over lmms-eval's: theirs take one sample at a time,
need packages they don't declare, and turn an error into an empty answer. Prompts and generation
arguments are those of lmms-eval's `llava_hf`, so that `method=none` gives its answers.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from vtc.errors import InputError, OptionError, SampleError, UnsupportedModeError
from vtc.evaluation.compression import Compression
from vtc.evaluation.kept import left_of
from vtc.evaluation.loading import Loaded, load
from vtc.evaluation.measure import Numbers, SampleCounts, means, token_numbers
from vtc.evaluation.visuals import Visuals, evidence, for_processor, numbered, visuals_of

if TYPE_CHECKING:
    from vtc.runtime.encodings import Encodings

_LOADING = ("device", "device_map", "dtype", "revision", "trust_remote_code", "attn_implementation")


class Vtc(lmms):  # type: ignore[misc]
    """`lmms-eval --model vtc --model_args pretrained=<folder or hub id>,method=vtc_cls,keep=0.11`.

    Args:
        pretrained: a folder or a hub id; or a model already loaded, to share it between runs.
        method: a registered method.
        keep: as `vtc.patch` takes it, or `64tok`; a bare 1 is refused (write 1.0 or 1tok).
        positions: the position policy.
        seed: for methods that draw.
        batch_size: samples per call; with more than one, prompts are padded on the left.
        timed_samples: with batches, so many samples are still run alone, to be timed. Times are
            never those of a batch; the first sample is run twice and timed the second time.
        record_left: whether a sample's counts hold which of its tokens were left.
        encodings: what the model's encoder gave for questions asked before, if it need not run
            over their pictures again; without `timed_samples`.
        use_cache: as `generate` takes it.
        max_batch_size: accepted because lmms-eval passes it; not used.
        arguments: `device`, `device_map`, `dtype`, `revision`, `trust_remote_code` and
            `attn_implementation` go to the loading, all others are options of the method.

    Raises:
        OptionError: a wrong method, option, keep, position policy, batch size or folder; before
            anything is loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | Loaded,
        method: str = "vtc_cls",
        keep: float | int | str | None = None,
        positions: str = "keep",
        seed: int = 0,
        batch_size: int | str = 1,
        timed_samples: int = 12,
        record_left: bool = False,
        encodings: Encodings | None = None,
        use_cache: bool = True,
        max_batch_size: int | str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        loading = {key: arguments.pop(key) for key in _LOADING if key in arguments}
        self.compression = Compression(method, keep, positions, seed, arguments)
        self.batch_size = _whole("batch_size", batch_size, least=1)
        self.timed_samples = _whole("timed_samples", timed_samples, least=0)
        self.use_cache = use_cache
        self.record_left, self.encodings = record_left, encodings
        self._loaded: Loaded | None = None
        self._shared = isinstance(pretrained, Loaded)
        self._loaded = pretrained if isinstance(pretrained, Loaded) else load(pretrained, **loading)

    @property
    def loaded(self) -> Loaded:
        """Model and processor; gone after a run that loaded its own."""
        if self._loaded is None:
            raise InputError("this lmms-eval model was cleaned after its run; build a new one")
        return self._loaded

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.loaded.model.device
        return device

    def clean(self) -> None:
        """Free memory after a run, as lmms-eval does; a shared model stays."""
        if not self._shared:
            self._loaded = None
            super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: lmms-eval has no likelihood tasks for chat models."""
        raise UnsupportedModeError(
            "model 'vtc' got a likelihood task, expected one that generates an answer; "
            "choose a task with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: one question, one answer."""
        raise UnsupportedModeError(
            "model 'vtc' got a task of several rounds, expected one question and one answer; "
            "choose a task with output_type generate_until"
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request.

        Raises:
            SampleError: after all of them, if any failed in any process; nothing is reported then.
        """
        results: list[GenerationResult | None] = [None] * len(requests)
        failed, first, start = 0, None, time.perf_counter()
        bar = tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        with self.compression.patch(self.loaded.model) as handle:
            if self.encodings is not None:
                handle.recall(self.encodings)
            if self.timed_samples or self.batch_size == 1:
                self.warm_up([request.args for request in requests[:1]], handle)
            for indices in self._batches(requests):
                batch = [requests[i].args for i in indices]
                try:
                    answers = self.answer(batch, handle)
                except Exception as error:
                    causes = self._causes(batch, handle, error)
                    failed, first = failed + len(causes), first or causes[0]
                else:
                    for i, answer in zip(indices, answers, strict=True):
                        results[i] = answer
                bar.update(len(batch))
        bar.close()
        _refuse(failed, len(requests), first)
        done = [result for result in results if result is not None]
        _log(requests, done, time.perf_counter() - start)
        return done

    def _causes(
        self, batch: Sequence[tuple[Any, ...]], handle: Any, error: Exception
    ) -> list[tuple[tuple[Any, ...], Exception]]:
        """The samples of a failed call that fail alone, with their errors; if none does, all."""
        found = [(args, error) for args in batch]
        if len(batch) > 1:
            alone = []
            for args in batch:
                try:
                    self.answer([args], handle)
                except Exception as own:
                    alone.append((args, own))
            found = alone or found
        for args, cause in found:
            logger.error(f"{_where(args)}: {type(cause).__name__}: {cause}")
        return found

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests for one call: the same generation arguments, task and split."""
        alone = min(self.timed_samples, len(requests)) if self.batch_size > 1 else len(requests)
        yield from ([i] for i in range(alone))

        def key(i: int) -> str:
            _, _, arguments, _, task, split = requests[i].args
            return json.dumps([arguments, task, split], sort_keys=True, default=str)

        rest = sorted(range(alone, len(requests)), key=key)
        for _, group in itertools.groupby(rest, key):
            indices = list(group)
            for at in range(0, len(indices), self.batch_size):
                yield indices[at : at + self.batch_size]

    def warm_up(self, batch: Sequence[tuple[Any, ...]], handle: Any) -> None:
        """Answer once for nothing; what is drawn does not change what is drawn behind it."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            try:
                self.answer(batch, handle)
            except Exception as error:
                # the same sample comes again at once and is counted there
                logger.debug(f"warm-up failed: {error}")

    def answer(self, batch: Sequence[tuple[Any, ...]], handle: Any) -> list[GenerationResult]:
        """Answer the requests of one call, given by their arguments, on the model as it is.

        Args:
            batch: of each request (context, doc_to_messages, generation arguments, number of the
                question, task, split).
            handle: of the patch in force.
        """
        docs = [self.task_dict[task][split][doc_id] for _, _, _, doc_id, task, split in batch]
        prompts, shown = [], []
        for args, doc in zip(batch, docs, strict=True):
            prompt, visuals = self._prompt(args[1](doc))
            prompts.append(prompt)
            shown.append(visuals)
        answers, lengths = self._generate(prompts, shown, batch[0][2])
        counts = self._count(docs, shown, handle, lengths)
        return [GenerationResult(*pair) for pair in zip(answers, counts, strict=True)]

    def _prompt(self, messages: list[dict[str, Any]]) -> tuple[str, Visuals]:
        chat = ChatMessages(messages=messages)
        visuals = visuals_of(chat)
        text = self.loaded.processor.apply_chat_template(
            chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
        )
        return text, visuals

    def _generate(
        self, prompts: list[str], shown: Sequence[Visuals], arguments: dict[str, Any]
    ) -> tuple[list[str], list[int]]:
        """Texts and their numbers of tokens; generation arguments as lmms-eval's `llava_hf`."""
        model, processor = self.loaded.model, self.loaded.processor
        inputs = processor(
            text=prompts, padding=True, return_tensors="pt", **for_processor(shown)
        ).to(self.device, model.dtype)
        temperature, end = arguments.get("temperature", 0), processor.tokenizer.eos_token_id
        output = model.generate(
            **inputs,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_p=arguments.get("top_p"),
            num_beams=arguments.get("num_beams", 1),
            max_new_tokens=arguments.get("max_new_tokens", 1024),
            use_cache=self.use_cache,
            pad_token_id=end,
            eos_token_id=end,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        lengths = [(row.index(end) + 1 if end in row else len(row)) for row in new.tolist()]
        return processor.batch_decode(new, skip_special_tokens=True), lengths

    def _count(
        self,
        docs: Sequence[Any],
        shown: Sequence[Visuals],
        handle: Any,
        lengths: list[int],
    ) -> list[SampleCounts]:
        # a call without pictures has no report
        report = handle.report() if any(visuals.shown for visuals in shown) else None
        remaining = handle.remaining if report else []
        numbers = numbered(shown, len(report.visual_tokens) if report else 0)
        counts = []
        for doc, visuals, own, length in zip(docs, shown, numbers, lengths, strict=True):
            found: Numbers = {}
            if own:
                found = token_numbers(report, own, alone=len(docs) == 1)
                found |= evidence(doc, visuals, remaining, own)
            counts.append(SampleCounts(output_tokens=length, numbers=found))
            if self.record_left:
                left = [one for n, i in enumerate(own) for one in left_of(remaining, i, n)]
                counts[-1].left = left
        return counts


def _refuse(failed: int, asked: int, first: tuple[tuple[Any, ...], Exception] | None) -> None:
    """Raise in every process if a sample failed in any: one alone would leave others waiting."""
    said = f"{_where(first[0])}: {type(first[1]).__name__}: {first[1]}" if first else None
    found = _from_all((failed, asked, said))
    causes = [said for _, _, said in found if said]
    if causes:
        raise SampleError(
            f"{sum(failed for failed, _, _ in found)} of {sum(asked for _, asked, _ in found)} "
            f"samples failed, so no accuracy is reported; the first was {causes[0]}"
        ) from (first[1] if first else None)


def _log(requests: Sequence[Instance], results: Sequence[GenerationResult], seconds: float) -> None:
    """Means over the samples of all processes and over each task's.

    Once, because lmms-eval averages repeated logs, and in each process, because it reads the first.
    """
    own = [
        (request.args[4], result.token_counts.output_tokens, result.token_counts.numbers)
        for request, result in zip(requests, results, strict=True)
    ]
    everything = _from_all((own, seconds))
    samples = [sample for part, _ in everything for sample in part]
    found = means(numbers for _, _, numbers in samples)
    tasks = dict.fromkeys(task for task, _, _ in samples)
    for task in tasks if len(tasks) > 1 else ():
        of_task = means(numbers for name, _, numbers in samples if name == task)
        found |= {f"{name}/{task}": value for name, value in of_task.items()}
    tokens, seconds = sum(n for _, n, _ in samples), max(spent for _, spent in everything)
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={**found, "n_samples": len(samples), "n_failed": 0},
    )


def _from_all(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _where(args: tuple[Any, ...]) -> str:
    return f"question {args[3]} of {args[4]}"


def _whole(name: str, value: int | str, least: int) -> int:
    """lmms-eval hands numbers over as it read them from text: `auto` and 1.5 get this far."""
    if not str(value).isdecimal() or int(value) < least:
        raise OptionError(f"{name}={value!r}: expected a whole number of at least {least}")
    return int(value)
