"""All uses of private API of torch, transformers and ONNX Runtime.

`tests/test_compat.py` imports each name and checks its signature, so that an upgrade that changes one fails there.
"""
