"""Generation with an export that has a cache: prompts run together, each answer until its own end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from numpy.typing import NDArray

from gralora_fx.errors import ServingError, first_line
from gralora_fx.format.input_names import EMBEDS
from gralora_fx.run.engine.adapters import AdapterNames, names_of_rows
from gralora_fx.run.engine.decoder import Decoder
from gralora_fx.run.engine.limits import LEAST_CHUNK, DecoderLimits, DecoderSize, PromptLimit, part_length
from gralora_fx.run.generate.answer_options import AnswerOptions, AnswerStart
from gralora_fx.run.generate.answer_row import AnswerRow, NoProposals, Proposer, new_proposer
from gralora_fx.run.generate.completion import Completion, TextRequest
from gralora_fx.run.generate.prompts import AnswerCall, GenerateInputs, Prompts
from gralora_fx.run.generate.token_choice import Choice, TokenScore

if TYPE_CHECKING:
    from gralora_fx.core.loading.text_tokenizer import TextTokenizer
    from gralora_fx.run.engine.cache_memory import Source
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs
    from gralora_fx.run.generate.prompts import EncoderInput

_CHUNK, _CHUNK_OF_MANY = 256, 64  # tokens of each prompt in a step
_FORCED = 32  # maximum tokens forced by a constraint that a step reads


class GivenPrompts(Protocol):
    """Reads prompts with more than text, which companions turn into inputs of a decoder's rows or of an encoder."""

    @staticmethod
    def refuse() -> NoReturn:
        """Raise a `ServingError`: the export reads text only."""
        ...

    def are_in(self, prompts: Any) -> bool:
        """Return whether chats among the prompts hold more than text within their messages."""
        ...

    def read(self, inputs: GenerateInputs, adapter: AdapterNames, limit: PromptLimit) -> Prompts:
        """Read the arguments of `generate`: prompts, and each one's inputs beside text."""
        ...

    def read_one(
        self, prompt: Any, media: Sequence[Any], adapter: str | None, described: Sequence[Any] = ()
    ) -> tuple[list[int], Source | None]:
        """Return a prompt's ids, and the source that replaces some of them; None for text alone."""
        ...


@dataclass(frozen=True)
class Generation:
    """Generation with an export."""

    limits: DecoderLimits  # limits of a row
    # opens the model as decoder rows of a size; raises as `Decoder` does
    open_decoder: Callable[[DecoderSize], Decoder]
    encoder_inputs: EncoderInputs | None = None  # reads encoder inputs of an encoder-decoder; None for a decoder
    given_prompts: GivenPrompts | None = None  # reads prompts with more than text; None if the export reads text only

    @cached_property
    def proposer(self) -> Proposer:
        """The proposer of tokens, with its measurements from earlier calls."""
        return new_proposer()

    def read(
        self, inputs: GenerateInputs, options: AnswerOptions, adapter: AdapterNames, tokenizer: TextTokenizer | None
    ) -> Prompts:
        """Convert the arguments of `generate` to inputs of encoder and decoder."""
        reader = self.encoder_inputs
        if reader is None:
            reason = "the model is a decoder, without an encoder"
            inputs.check_unused(reason, "features")
            if options.start is not None:
                options.start.check_unused(reason, "language", "task", "forced_bos_token_id")
            media = self.given_prompts
            if inputs.media is not None or (media is not None and media.are_in(inputs.prompts)):
                return self._read_media(inputs, adapter)
            texts = inputs.read(tokenizer, PromptLimit.of_context(self.limits))
            return texts if inputs.inputs_embeds is None else _with_embeddings(texts, inputs)
        inputs.check_unused("an encoder-decoder's encoder reads what it answers", EMBEDS)
        if inputs.media is not None and not reader.reads_media:
            return self._read_media(inputs, adapter)
        return reader.read(inputs, AnswerCall(options.start or AnswerStart(), adapter, tokenizer, self.open_decoder))

    def _read_media(self, inputs: GenerateInputs, adapter: AdapterNames) -> Prompts:
        if self.given_prompts is not None:
            reader = self.encoder_inputs
            limit = PromptLimit.of_context(self.limits) if reader is None else PromptLimit.of_source(reader.limit)
            return self.given_prompts.read(inputs, adapter, limit)
        from gralora_fx.base.features import parts

        for kind in parts("given prompts"):
            kind.refuse()
        raise ServingError("prompts are texts alone, since no feature that is installed reads more; give texts")


def _with_embeddings(texts: Prompts, inputs: GenerateInputs) -> Prompts:
    """Return prompts with the tensors that replace their tokens, as a feature reads them."""
    from gralora_fx.base.features import parts

    kinds = parts("given rows", (EMBEDS,))
    if not kinds:
        inputs.check_unused("no feature that is installed reads it", EMBEDS)
    given: Prompts = kinds[0].prompts_with(texts, inputs.inputs_embeds)
    return given


class Scored(NamedTuple):
    """An answer, or a piece of one, with its tokens' log-probabilities."""

    content: Any  # the text, or the token ids
    scores: list[TokenScore]  # the score of each of its tokens


class Completions(Iterator[Any]):
    """The completions of prompts: iterate for pieces, or call `result` for whole ones."""

    def __init__(
        self,
        generation: Generation,
        prompts: Prompts,
        tokenizer: TextTokenizer | None,
        options: AnswerOptions,
        adapter: AdapterNames = None,
    ) -> None:
        """Check the prompts, and open a decoder row for each."""
        most = options.sampling.new_tokens(prompts.rows, generation.limits, prompts.new_tokens)
        names = names_of_rows(adapter, len(prompts.rows))
        sources: Sequence[EncoderInput | None] = prompts.sources or (None,) * len(prompts.rows)
        self._requests = [
            TextRequest(
                tuple(row), new, options.of_answer(index), name, source, prompts.given[index] if prompts.given else None
            )
            for index, (row, new, name, source) in enumerate(zip(prompts.rows, most, names, sources, strict=True))
        ]
        self._prompts = prompts
        self._gives_scores = options.sampling.logprobs is not None
        reader = tokenizer if prompts.gives_text or options.stop else None
        ends = options.ends(generation.limits)
        self._completions = [Completion(reader, ends, options.stop) for _ in prompts.rows]
        self._scores: list[list[TokenScore]] = [[] for _ in prompts.rows]
        self._rows: _Rows | None = _Rows(generation, self._requests, ends, options)

    def __next__(self) -> Any:
        """Return the next step's new text or ids, or a list of them for a list of prompts."""
        going = [row for row, completion in enumerate(self._completions) if not completion.has_ended]
        if self._rows is None or not going:
            self._rows = None  # frees the cache and the adapter
            raise StopIteration
        before, texts = [len(completion.ids) for completion in self._completions], [""] * len(self._completions)
        scores: list[list[Any]] = [[] for _ in texts]
        try:
            self._rows.step(going)
            for row in going:
                completion = self._completions[row]
                for choice in self._rows.choices(row):
                    known = len(completion.ids)
                    texts[row] += completion.extend(choice, self._requests[row].max_new_tokens)
                    scores[row] += [choice.score] * (len(completion.ids) - known)
                    if completion.has_ended:
                        break
                self._rows.settle(row)
        except Exception as error:
            self._rows = None  # a step cannot be undone after a failure
            if isinstance(error, ServingError):
                raise
            raise ServingError(f"no token can be chosen ({first_line(error)})") from error
        pieces: list[Any] = []
        for row, completion in enumerate(self._completions):
            self._scores[row] += scores[row]
            piece: Any = texts[row] if self._prompts.gives_text else completion.ids[before[row] :]
            pieces.append(Scored(piece, scores[row]) if self._gives_scores else piece)
        return pieces[0] if self._prompts.is_single else pieces

    def result(self) -> Any:
        """Return the whole completions."""
        for _ in self:
            pass
        contents: list[Any] = [each.text if self._prompts.gives_text else each.ids for each in self._completions]
        if self._gives_scores:
            contents = [Scored(*pair) for pair in zip(contents, self._scores, strict=True)]
        return contents[0] if self._prompts.is_single else contents


class _Rows:
    """Prompts in the rows of their own decoder, and their answers."""

    def __init__(
        self, generation: Generation, requests: Sequence[TextRequest], ends: frozenset[int], options: AnswerOptions
    ) -> None:
        count, longest = len(requests), max(len(request.prompt) for request in requests)
        capacity = max(len(request.prompt) + request.max_new_tokens for request in requests)
        choosers = [request.chooser(ends) for request in requests]
        self._most = generation.proposer.most(options.proposed)
        several = max(_FORCED if options.constraint is not None else LEAST_CHUNK, 1 + self._most)
        self._chunk = min(max(longest, several), capacity, _CHUNK if count == 1 else _CHUNK_OF_MANY)
        self._decoder = generation.open_decoder(DecoderSize(count, capacity, self._chunk))
        starts = [self._decoder.start_of(request.adapter, request.prompt) for request in requests]
        self._rows = [
            self._decoder.open(request.adapter, request.arrays, start=start)
            for request, start in zip(requests, starts, strict=True)
        ]
        for row, request in zip(self._rows, requests, strict=True):
            self._decoder.expect(row, len(request.prompt))
        verifies = self._decoder.verify_problem is None
        self._proposer: Proposer = generation.proposer if verifies else NoProposals()
        self._answers = [
            AnswerRow(choose, request.max_new_tokens, self._proposer.text(request.prompt))
            for choose, request in zip(choosers, requests, strict=True)
        ]
        self._logits: dict[int, NDArray[Any]] = {}
        tokens: dict[int, Sequence[int]] = {row: request.prompt for row, request in enumerate(requests)}
        while tokens:
            before = {row: (starts[row] or 0) - self._decoder.length(self._rows[row]) for row in tokens}
            counts = {row: part_length(len(left), self._chunk, before[row]) for row, left in tokens.items()}
            self._read({row: tokens[row][:count] for row, count in counts.items()}, {})
            tokens = {row: left[counts[row] :] for row, left in tokens.items() if counts[row] < len(left)}

    def step(self, going: Sequence[int]) -> None:
        """Let unfinished rows read their chosen tokens, followed by proposed ones if any."""
        waiting = {row: self._answers[row] for row in going if self._answers[row].unread}
        self._proposer.propose(list(waiting.values()), self._chunk, self._most)
        while waiting:
            tokens = {row: each.next_tokens(self._decoder.chosen) for row, each in waiting.items()}
            wanted = {row: each.wanted(len(tokens[row])) for row, each in waiting.items()}
            started = time.perf_counter()
            self._read(tokens, {row: count for row, count in wanted.items() if count is not None})
            proposed = sum(len(each.proposed) for each in waiting.values())
            self._proposer.ran(sum(map(len, tokens.values())), proposed, time.perf_counter() - started)
            waiting = {row: each for row, each in waiting.items() if not (each.proposed or each.read(len(tokens[row])))}

    def choices(self, row: int) -> Iterator[Choice]:
        """Yield the next tokens of a row after a step."""
        return self._answers[row].choices(self._logits[row], self._proposer.saw)

    def settle(self, row: int) -> None:
        """Let a row forget tokens that it has read and that were not chosen."""
        answer = self._answers[row]
        if answer.surplus:
            self._decoder.rewind(self._rows[row], self._decoder.length(self._rows[row]) - answer.surplus)
        self._proposer.settle(answer, answer.accepted)

    def _read(self, tokens: Mapping[int, Sequence[int]], last: Mapping[int, int]) -> None:
        logits_of = self._decoder.step(
            {self._rows[row]: part for row, part in tokens.items()},
            {self._rows[row]: count for row, count in last.items()},
        )
        for row in tokens:
            logits = logits_of[self._rows[row]]
            self._logits[row] = logits if row in last or not self._decoder.gives_all else logits[-1].copy()
