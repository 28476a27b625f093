"""Sentence encoders: transformers with the modules that make one embedding of a text, and scores of cross-encoders."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "sentences",
    signs=frozenset({"sentence-similarity", "sentence_embedding"}),
    parts={
        "tasks": "sentence_task:TASKS",
        "inferred tasks": "recognised:inferred_task",
        "scores": "recognised:note_score_function",
        "appended modules": "encoder:sentence_encoder_of",
        "routes": "embedding_route:embedding_routes",
    },
)
