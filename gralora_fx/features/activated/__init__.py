"""Activated adapters: active from certain tokens of a row on; the base computes the tokens before."""
