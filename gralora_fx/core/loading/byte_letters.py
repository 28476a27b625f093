"""Letters that byte-level tokenizers write for bytes: those of Latin-1 that are visible, and others for the rest."""

_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_REST = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_LETTERS = {byte: chr(byte if byte in _VISIBLE else 256 + _REST.index(byte)) for byte in range(256)}
