"""Tool calls in chat answers: tools described to the model, calls constrained to their schemas and parsed."""
