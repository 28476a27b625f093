r"""Classes of characters in expressions, so that a text that matches does so in every dialect of expressions.

JSON Schema's patterns are ECMA 262's, answers are checked with Python's `re` as often, and llguidance compiles Rust's.
`\d`, `\w`, `\s` and `.` differ: in ECMA 262 the first two are ASCII, in Python and Rust they have letters and digits of
all scripts. So each class is written out as what all dialects agree on: `\d`, `\w` and `\s` are ASCII, and `\D`, `\W`,
`\S` and `.` leave out whatever one of the dialects does.
"""

from __future__ import annotations

import re

# of each class: what is in it in every dialect, and what is in it in any
_CLASSES = {
    "d": ("0-9", r"\p{Nd}"),
    "w": ("0-9A-Za-z_", r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\u200c\u200d"),
    "s": (r" \t\n\r\f\v", r"\p{White_Space}\x1c-\x1f\ufeff"),
}
_DOT = r"[^\n\r\u2028\u2029]"
_ALL_DOTS = re.compile(r"\(\?[a-zA-Z]*s")  # a flag by which a dot is any character
_PART = re.compile(r"\\.|\[\^?\]?|\]|--|.", re.DOTALL)


def portable(expression: str) -> str:
    r"""Write out the classes of an expression in Rust's syntax, as what all dialects agree on.

    Before:  `\d{3}[^\s,]`
    After:   `[0-9]{3}[^[\p{White_Space}\x1c-\x1f\ufeff],]`
    """
    has_dots = _ALL_DOTS.search(expression) is None
    negated: list[bool] = []  # of each class that is open: whether what stands in it is what does not match
    written = []
    for part in _PART.findall(expression):
        is_out = bool(negated) and negated[-1]
        if part[0] == "[":
            negated.append(is_out is not part.startswith("[^"))
        elif part == "]" and negated:
            negated.pop()
        elif part == "--" and negated:  # takes what follows away
            negated[-1] = not is_out
        elif part == "." and not negated and has_dots:
            part = _DOT
        elif part[0] == "\\" and (found := _CLASSES.get(part[1:].lower())):
            is_inverse = part[1:].isupper()
            part = f"[{'^' * is_inverse}{found[is_out is not is_inverse]}]"
        written.append(part)
    return "".join(written)
