"""Images: models that read pixels, and decoders that take what images put in the place of tokens."""

from gralora_fx.base.features import Feature

FEATURE = Feature(
    "images",
    # inputs of a trace or an export, a key of its manifest, and a type of models
    signs=frozenset({"pixel_values", "inputs_embeds", "image_sizes", "git"}),
    parts={
        "tasks": "tasks_and_inputs:TASKS",
        "main inputs": "tasks_and_inputs:MAIN_INPUTS",
        "input axes": "tasks_and_inputs:INPUT_AXES",
        "step inputs": "tasks_and_inputs:STEP_INPUTS",
        "input facts": "image_sizes:FACTS",
        "trace options": "image_trace:TRACE_OPTIONS",
        "export options": "image_sizes:ImageOptions",
        "example inputs": "image_inputs:example_of",
        "step examples": "image_inputs:examples_beside",
        "call patches": "given_embeddings:called_with_images",
        "own traces": "image_trace:trace_images",
        "optional inputs": "optional_inputs:optional_image_inputs",
        "fresh step inputs": "image_inputs:images_beside",
        "given rows": "image_rows:ImageRows",
        "given prompts": "image_rows:with_images",
    },
)
