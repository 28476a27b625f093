"""Names of an export's files and inputs, which its writer and its readers share."""

MANIFEST_NAME = "gralora_export.json"
MODEL_NAME = "model.onnx"
ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # files of an encoder-decoder, without their suffix
FLAG = "use_cache_branch"  # input of its decoder: whether there is a step before this one
