"""Names of an export's files and inputs, shared by its writer and its readers."""

from gralora_fx.sources.directory_kind import EXPORT_FILE

MANIFEST_NAME = EXPORT_FILE
PLAIN_KIND, DECODER_KIND, ENCODER_DECODER_KIND = "plain", "decoder", "encoder-decoder"  # kinds of export
MODEL, ROWS = "model", "model_rows"  # files without their suffix: of most exports, and beside it for rows that differ
MODEL_NAME, ROWS_NAME = f"{MODEL}.onnx", f"{ROWS}.onnx"
GENAI_CONFIG = "genai_config.json"
ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # files of an encoder-decoder, without their suffix
FLAG = "use_cache_branch"  # input of its decoder: whether the step has a past
ADAPTERS = "adapters"  # folder of an export's adapter files
QUERY_SEQLENS, PAST_SEQLENS = "query_seqlens", "past_seqlens"  # inputs of a decoder's rows: tokens to read, and before
