"""Names of inputs that several stages use, and a decoder step's inputs beside token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

IDS, EMBEDS = "input_ids", "inputs_embeds"
GIVEN = -1  # the id of a token whose embedding is given
PAST = "past_key_values"
PAST_PREFIX, PRESENT_PREFIX = f"{PAST}.", "present."  # of the tensors of a cache in an export
TEXT_INPUTS = (IDS, "attention_mask", "token_type_ids", "position_ids", EMBEDS)
LABELS = ("labels", "start_positions", "end_positions")
ADAPTER_NAMES = "adapter_names"  # argument of a call in PyTorch: the adapter of each row
ROWS = "adapter_rows"  # input of a graph with adapters by row: the rows of each
# argument of a call and input of a graph: the column, counting cached ones, from which each adapter acts
STARTS = "adapter_starts"
ITEM_COUNT = "num_items_in_batch"  # divisor of a loss over accumulated batches
# starts of the texts in a row, from packing collators; positions that restart mean the same
PACKING = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


@dataclass(frozen=True)
class StepInput:
    """A step's input with a value for every position, or one for all of them, not needed for text alone."""

    name: str
    absent: float = 0  # its value at a position of text
    axis: int | None = 0  # the axis of the batch; the next one is that of positions. None if all share one value
    # the input with the same batch and positions: a step's, or, for the mask, all earlier ones too
    follows: str = IDS
    others: tuple[int, ...] = ()  # other axes that vary, of size 1 for text alone

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes that may vary."""
        return (*(() if self.axis is None else (self.axis, self.axis + 1)), *self.others)

    def of_text(self, like: Any, inputs: Mapping[str, Any]) -> Any:
        """Return the values for a step of text alone, in the type of an example."""
        sizes = [1 if axis in self.others else size for axis, size in enumerate(like.shape)]
        if self.axis is not None:
            sizes[self.axis : self.axis + 2] = inputs[self.follows].shape[:2]
        return like.new_full(sizes, self.absent)


def takes_embeddings(inputs: Collection[str]) -> bool:
    """Return whether a decoder's step takes embeddings, which replace ids equal to `GIVEN`."""
    return EMBEDS in inputs and IDS in inputs


def beside_ids(inputs: Collection[str]) -> dict[str, StepInput]:
    """Return a step's inputs beside ids that text leaves out, by name; empty if it takes no embeddings."""
    if not takes_embeddings(inputs):
        return {}
    from gralora_fx.base.features import parts

    return {each.name: each for table in parts("step inputs", inputs) for each in table if each.name in inputs}


def split_labels(inputs: Mapping[str, Any], traced: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split inputs into those other than labels, and the labels."""
    outside = [name for name in LABELS if name not in traced]
    labels = {name: inputs[name] for name in outside if inputs.get(name) is not None}
    return {name: value for name, value in inputs.items() if name not in outside}, labels


def packed_problem(task: str | None, inputs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a decoder's positions that begin anew in a row; None if nothing is.

    Tokens are of one text if their entries of the mask are equal.
    """
    positions: Any = inputs.get("position_ids")
    mask: Any = inputs.get("attention_mask")
    if not (task or "").startswith("text-generation") or getattr(positions, "ndim", 0) != 2 or positions.shape[1] < 2:
        return None
    is_back = positions[:, 1:] <= positions[:, :-1]
    if getattr(mask, "ndim", 0) == 2:
        mask = mask[:, -positions.shape[1] :]
        is_back = is_back & (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] != 0)
    if not bool(is_back.any()):
        return None
    return (
        "input 'position_ids' begins anew within a row, so that it holds several texts, which this call would not keep "
        "apart; give each a row of its own, or train without use_cache on a trace with a cache, which keeps them apart"
    )


OtherValues = Callable[[Any, Any], Any]  # of an input's value and a generator of random numbers


class InputFacts(Protocol):
    """A frozen record of requirements on one input, stored in the manifest by its name; `str` puts them in words."""

    input: ClassVar[str]  # the input's name
    title: ClassVar[str]  # the beginning of a line that shows the record

    @property
    def trace_options(self) -> Mapping[str, Any]:
        """Options of `trace` that reproduce such a trace."""

    @property
    def smallest(self) -> Sequence[int]:
        """The sizes of the last axes of the smallest allowed input."""

    def problem(self, shape: Sequence[int], sizes: Sequence[Any]) -> str | None:
        """Return why a shape is not allowed beside the graph's sizes, and what to do; None if it is."""

    def others(self, example: Any) -> Iterator[tuple[str, OtherValues]]:
        """Yield other inputs for a comparison, each with its description and a function that makes it."""

    def wrong_field(self) -> str | None:
        """Return the name of a field whose value no export writes; None if all are valid."""
