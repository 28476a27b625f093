"""Activated adapters: those that act from certain tokens of a row on, and leave what comes before to the base."""
