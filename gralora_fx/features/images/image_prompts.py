"""Prompts with images: their processor, the vision encoder, and the places of its features in a prompt.

text or chat, images --processor--> ids, pixels --vision_encoder.onnx--> features --by position--> what a row is given
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from gralora_fx.core.loading.tokenizers import is_chat, is_ids, load_processor
from gralora_fx.errors import ServingError, first_line, option, shown
from gralora_fx.features.images.feature_cache import FeatureCache
from gralora_fx.features.images.image_pieces import pieces_of
from gralora_fx.features.images.image_rows import Given, Outputs, given_of
from gralora_fx.features.images.tasks_and_inputs import (
    GIVEN_PLACES,
    GRID,
    GRID_THW,
    IMAGE_FEATURES,
    NEWLINE,
    VISION_ENCODER,
)
from gralora_fx.features.images.tile_packing import TilePacking
from gralora_fx.format.input_names import EMBEDS, GIVEN, IDS
from gralora_fx.run.engine.adapters import AdapterNames, LoadedAdapter, names_of_rows
from gralora_fx.run.engine.limits import PromptLimit
from gralora_fx.run.generate.prompts import EncoderInput, GenerateInputs, Prompts
from gralora_fx.run.sessions.ort_values import as_array, run_arrays
from gralora_fx.run.sessions.session_views import optional_or_required, with_adapter

if TYPE_CHECKING:
    from gralora_fx.run.generate.encoder_inputs import EncoderInputs
    from gralora_fx.run.open_export import OpenExport

_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")  # names of configurations
_PLACE = "image"  # type of a part of a message that stands for an image


class _Piece(NamedTuple):
    """One input of the vision encoder: an image, or a tile of one."""

    inputs: Mapping[str, NDArray[Any]]  # of `vision_encoder.onnx`
    digest: bytes  # of their shapes and values


class ImagePrompts:
    """Reads prompts with images for an export that has the vision encoder."""

    def __init__(self, export: OpenExport) -> None:
        """Take an open export; its processor and the vision encoder are opened for the first image."""
        self._export, self._features = export, FeatureCache()
        self._merge = token_merge(export.config)

    @classmethod
    def of(cls, export: OpenExport) -> ImagePrompts | None:
        """Return what reads prompts of an open export; None if it has nothing that reads pixels."""
        return cls(export) if VISION_ENCODER in export.manifest.companions else None

    @cached_property
    def _processor(self) -> Any:
        processor = load_processor(self._export.directory, ServingError)
        if processor is None:
            raise ServingError(
                f"{self._export.directory} holds no processor, which makes pixels of images; export with "
                f"{option(tokenizer=...)} where the model's processor is"
            )
        return processor

    @cached_property
    def _session(self) -> Any:
        return self._export.companion_session(VISION_ENCODER)

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        return {value.name: value for value in self._session.get_inputs()}

    @cached_property
    def _taken(self) -> frozenset[str]:
        """Names of all that it takes, tensors of adapters too."""
        return frozenset(value.name for value in optional_or_required(self._session))

    @cached_property
    def _packing(self) -> TilePacking | None:
        """Layout of tiles; None for a model that takes their features one after the other."""
        has_lines = any(value.name == NEWLINE for value in self._session.get_outputs())
        return TilePacking.of(self._export.config) if has_lines else None

    @cached_property
    def _token(self) -> int:
        config = self._export.config
        token = config.get("image_token_id", config.get("image_token_index"))
        if token is None:
            token = getattr(self._processor, "image_token_id", None)
        if not isinstance(token, int):
            raise ServingError("config.json does not say which token stands for an image (image_token_id)")
        return token

    @staticmethod
    def are_in(prompts: Any) -> bool:
        """Return whether chats among prompts hold images, or places for some."""
        from gralora_fx.features.images.image_files import images_of_chat

        chats = [prompts] if is_chat(prompts) else prompts if isinstance(prompts, (list, tuple)) else []
        plain = (images_of_chat(chat)[0] for chat in chats if is_chat(chat))
        return any(part.get("type") == _PLACE for chat in plain for message in chat for part in _parts_of(message))

    @staticmethod
    def refuse() -> NoReturn:
        """Raise a `ServingError`: the export reads no images."""
        raise ServingError(
            "the export reads no images: its model has no part for them, or was exported without it "
            f"({option(task='image-text-to-text-with-past')}); leave images out"
        )

    def read(self, inputs: GenerateInputs, adapter: AdapterNames, limit: PromptLimit) -> Prompts:
        """Read the prompts and images that `generate` was given, for the adapters of each, up to a number of tokens."""
        for name in (EMBEDS, "input_ids", "attention_mask"):
            inputs.check_unused("images are given with prompts as text or chats", name)
        prompts, images = inputs.prompts, inputs.media
        from gralora_fx.features.images.image_files import images_of
        from gralora_fx.features.images.image_limits import ImageLimits

        if prompts is None:  # a processor may write one
            prompts = [""] * len(images) if isinstance(images, (list, tuple)) else ""
        is_single = isinstance(prompts, str) or is_chat(prompts) or is_ids(prompts)
        given = [prompts] if is_single else list(prompts)
        if any(map(is_ids, given)):
            raise ServingError(
                "images are given with prompts as text or chats, whose ids the processor makes; give the text in place "
                "of ids, or the ids with inputs_embeds in place of images"
            )
        of_each = [None] * len(given) if images is None else [images] if is_single else _listed(images)
        if len(of_each) != len(given):
            raise ServingError(f"images has to be a list of {len(given)}, one for each prompt, None for one of text")
        names = names_of_rows(adapter, len(given))
        pairs = [
            _with_held(prompt, None if own is None else _listed(own))
            for prompt, own in zip(given, of_each, strict=True)
        ]
        texts = [text for text, _ in pairs]
        opened = [images_of(own, ImageLimits()) for _, own in pairs]
        read = [self.read_one(*each) for each in zip(texts, opened, names, strict=True)]
        for ids, _ in read:
            limit.check_tokens(ids)
        reader = self._export.generation.encoder_inputs
        if reader is None:
            return Prompts([ids for ids, _ in read], is_single, gives_text=True, given=[given for _, given in read])
        sources = [reader.example(ids) if given is None else encoder_source(reader, ids, given) for ids, given in read]
        return Prompts([[reader.rules.start] for _ in sources], is_single, gives_text=True, sources=sources)

    def read_one(
        self, prompt: Any, images: Sequence[Any], adapter: str | None, described: Sequence[Any] = ()
    ) -> tuple[list[int], Given | None]:
        """Return the ids of a prompt, and the inputs in place of those of its images; None without any.

        A text has the placeholders of the model's processor, a chat parts `{"type": "image"}`, which `described` tells
        its template; the images are in order, as `PIL.Image.Image` in RGB.
        """
        text = self._written(prompt, len(images), described)
        bos = self._processor.tokenizer.bos_token
        # as transformers' own processors do with what their template has written
        more = {"add_special_tokens": False} if bos and text.startswith(bos) and not isinstance(prompt, str) else {}
        # of one prompt, by which some processors cut none of several; GOT-OCR2's takes no list of lists
        own = (list(images) if hasattr(self._processor, "multi_page") else [list(images)]) if images else None
        try:
            if own is None:  # some processors take none
                made = dict(self._processor.tokenizer([text], return_tensors="np", **more))
            else:
                made = dict(self._processor(text=[text], images=own, return_tensors="np", **more))
        except Exception as error:  # processors raise what they like
            raise ServingError(
                f"the processor does not take the prompt with {len(images)} images ({first_line(error)}); a text needs "
                "one placeholder for each"
            ) from error
        ids = [int(token) for token in np.asarray(made["input_ids"])[0]]
        if not images:
            if self._token in ids:
                raise ServingError("the prompt has a place for an image, and none is given; give as many")
            return ids, None
        given = self.given(np.asarray(ids), made, adapter)
        if self._export.generation.limits.outside([self._token]) is not None:  # it is embedded, and never written
            other = next((token for token in ids if token != self._token), 0)  # which penalties count anyway
            ids = [other if token == self._token else token for token in ids]
        return ids, given

    def _written(self, prompt: Any, count: int, described: Sequence[Any]) -> str:
        """Return a prompt as text; a chat that has no place for its images has them before its last text."""
        if isinstance(prompt, str):
            return prompt
        if not is_chat(prompt):
            raise ServingError(f"a prompt with images is a text or a list of messages, but got {shown(prompt)}")
        messages = [dict(message) for message in prompt]
        places = sum(part.get("type") == _PLACE for message in messages for part in _parts_of(message))
        if places == 0 and count:
            last = messages[-1]
            last["content"] = [*({"type": _PLACE} for _ in range(count)), *_parts_of(last)]
            places = count
        if places != count:
            raise ServingError(f"the chat has {places} places for images, and {count} were given; give as many")
        try:
            written = self._processor.apply_chat_template(
                messages, None, list(described) or None, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template raises what it likes
            raise ServingError(f"the processor cannot write the chat ({first_line(error)})") from error
        return str(written)

    def given(self, ids: NDArray[np.int64], made: Mapping[str, Any], adapter: str | None) -> Given:
        """Return the inputs in place of tokens, each array of all tokens of the prompt."""
        ranks = {name: len(value.shape) for name, value in self._inputs.items()}
        outputs = [self._read_image(*each, adapter) for each in pieces_of(made, ranks, self._packing)]
        places, features = ids == self._token, sum(len(each[IMAGE_FEATURES]) for each in outputs)
        if (count := int(places.sum())) != features:
            raise ServingError(
                f"the prompt has {count} tokens for its images and they have {features} features; the processor "
                "beside the export is of another model"
            )
        has_grid = GRID in self._export.manifest.inputs and GRID_THW in self._inputs
        grids = np.asarray(made[GRID_THW]) if has_grid else None
        return given_of(places, outputs, grids, self._merge)

    def _read_image(
        self, pieces: Sequence[Mapping[str, NDArray[Any]]], size: tuple[int, int] | None, adapter: str | None
    ) -> Outputs:
        """Return the features of an image, or of a tile whose place does not matter."""
        outputs = [self._read_pixels(self._piece(piece), adapter) for piece in pieces]
        if self._packing is None or size is None:
            return outputs[0]
        features = np.stack([each[IMAGE_FEATURES] for each in outputs])
        return {IMAGE_FEATURES: self._packing.packed(features, outputs[0][NEWLINE], size)}

    def _piece(self, arrays: Mapping[str, NDArray[Any]]) -> _Piece:
        inputs = {name: as_array(name, array, self._inputs[name]) for name, array in arrays.items()}
        digest = hashlib.sha256()
        for name, array in inputs.items():
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return _Piece(inputs, digest.digest())

    def _read_pixels(self, piece: _Piece, adapter: str | None) -> Outputs:
        adapters = self._export.adapters
        own = self._adapter_of(adapter)
        found = self._features.get(piece.digest, own)
        if found is None:
            session = with_adapter(self._session, adapters.tensors_for(own, self._session))
            found = run_arrays(session, piece.inputs, "an image")
            self._features.put(piece.digest, own, found)
        return found

    def _adapter_of(self, name: str | None) -> LoadedAdapter | None:
        """Return an adapter that changes the vision encoder; None for the base, and for one that leaves it as it is."""
        loaded = None if name is None else self._export.adapters[name]
        return loaded if loaded is not None and not self._taken.isdisjoint(loaded.values) else None


def encoder_source(reader: EncoderInputs, ids: list[int], given: Given) -> EncoderInput:
    """Return what an encoder reads of a prompt with images."""
    array = np.array([ids])
    arrays = {IDS: np.where(given[GIVEN_PLACES], GIVEN, array), "attention_mask": np.ones_like(array)}
    return EncoderInput({**reader.checked(arrays), EMBEDS: given[EMBEDS]}, reader.rules, tuple(ids))


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _with_held(prompt: Any, images: Sequence[Any] | None) -> tuple[Any, Sequence[Any]]:
    """Return a prompt with the images that it holds, or that are given beside it."""
    from gralora_fx.features.images.image_files import images_of_chat

    if not is_chat(prompt):
        return prompt, images or ()
    chat, held = images_of_chat(prompt)
    if held and images:
        raise ServingError("images are in the chat, and given beside it too; give them in one of both")
    return chat, held or images or ()


def _parts_of(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return [part for part in content if isinstance(part, Mapping)]
    return [] if content is None else [{"type": "text", "text": content}]


def token_merge(config: Mapping[str, Any]) -> int:
    """Return how many patches a token has on a side, of a model with a configuration."""
    parts = (config.get("vision_config") or {}, config)
    found = (part.get(name) for name in _MERGES for part in parts)
    merge = next((value for value in found if value), 1)
    return int(merge[0] if isinstance(merge, (list, tuple)) else merge)
