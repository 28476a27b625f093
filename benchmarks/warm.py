"""Warm-up for forked processes: importing this module exports a BERT, so that a first export's imports are done.

It runs nothing in ONNX Runtime, whose threads do not survive a fork.
"""

import tempfile
import warnings

import torch
from transformers import BertConfig, BertModel
from transformers import logging as transformers_logging

from gralora_fx import GraloraConfig, rewrite, trace
from gralora_fx.exporters import export_onnx

_LAYERS = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
with tempfile.TemporaryDirectory() as _directory, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _model = rewrite(
        trace(BertModel(BertConfig(**_LAYERS, vocab_size=16)), task="feature-extraction"),
        GraloraConfig(r=2, target_modules="all-linear"),
    )
    export_onnx(_model, f"{_directory}/export", verify=False)
