"""Names of an export's files and inputs, shared by its writer and its readers."""

MANIFEST_NAME = "gralora_export.json"
MODEL_NAME = "model.onnx"
ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # files of an encoder-decoder, without their suffix
FLAG = "use_cache_branch"  # input of its decoder: whether the step has a past
ADAPTERS = "adapters"  # folder of an export's adapter files
QUERY_SEQLENS, PAST_SEQLENS = "query_seqlens", "past_seqlens"  # inputs of a batched decoder: tokens to read, and before
