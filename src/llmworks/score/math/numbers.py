"""Read the number that an answer gives: digits of any script, separators, fractions, percentages, plain arithmetic."""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

# Minus signs that are not the hyphen, signs of multiplication and division, separators of thousands and decimals.
SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5", "*"),
        "\u00f7": "/",
        "\u2044": "/",
        "\u066b": ".",
        **dict.fromkeys("\u066c\u2019", ","),
        **dict.fromkeys("\u00a0\u202f\u2009", " "),
    }
)
# A sign belongs to a number unless a digit, a letter or a bracket stands before it.
NUMBER = re.compile(
    r"(?:(?<![\w)\].])[-+])?(?:\d{1,3}(?:,\d{2,3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d]|,\d)|\d+)?"
    r"(?:\.\d+)?(?:[eE][-+]?\d+)?"
)
EXPRESSION = re.compile(r"[\d\s+\-*/^().,]*[+\-*/^][\d\s+\-*/^().,]*")
DATE = re.compile(r"\d+([-/.])\d+\1\d+")
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
UNITS = " \t$€£¥₹%°."
MAX_EXPONENT = 64
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def normalize_digits(text: str) -> str:
    """Return a text with ASCII digits, signs and separators, and LaTeX's spaces and plain fractions as text."""
    text = "".join(
        str(unicodedata.digit(c)) if not c.isascii() and unicodedata.category(c) == "Nd" else c for c in text
    ).translate(SIGNS)
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", " ").replace("\\%", "%").replace("\\$", "$")
    return LATEX_FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)


def read_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number, with units or currency around it, or a fraction of two."""
    text = normalize_digits(text).strip(UNITS)
    if re.fullmatch(NUMBER, text) and any(map(str.isdigit, text)):
        return to_fraction(text)
    if re.fullmatch(r"[-+]?\d+\s*/\s*\d+", text):
        above, below = (int(part) for part in text.split("/"))
        return Fraction(above, below) if below else None
    return None


def to_fraction(text: str) -> Fraction | None:
    """Return the value of a decimal number with separators of thousands; None for one too large to hold."""
    text = text.replace(",", "").replace(" ", "")
    exponent = re.search(r"[eE][-+]?0*(\d*)", text)
    if exponent and int(exponent[1] or 0) > 1000:
        return None
    return Fraction(text)


def find_answer_number(text: str, *, marked: bool) -> Fraction | None:
    """Return the number that an answer states.

    `marked`: the answer follows "the answer is" or is boxed, so it begins with its number; otherwise the last number
    counts. What follows "=" counts, what is in parentheses does not, and arithmetic is evaluated.
    """
    text = normalize_digits(text).rpartition("=")[2].strip().strip("$`*_ \t").rstrip(".")
    if DATE.fullmatch(text):
        return None
    if EXPRESSION.fullmatch(text):
        return evaluate(text)
    outside = re.sub(r"\([^()]*\)", " ", text)
    found = _find_numbers(outside) or _find_numbers(text)
    if not found:
        return None
    first = NUMBER.match(outside.lstrip(UNITS))
    begins = marked and first is not None and any(map(str.isdigit, first[0]))
    return to_fraction(found[0] if begins else found[-1])


def _find_numbers(text: str) -> list[str]:
    return [m[0] for m in NUMBER.finditer(text) if any(map(str.isdigit, m[0]))]


def evaluate(text: str) -> Fraction | None:
    """Return the value of plain arithmetic (+ - * / ^ and parentheses), or None."""
    text = re.sub(r"(?<=\d)[, ](?=\d{3}\b)", "", text).replace("^", "**").strip()
    try:
        return _evaluate(ast.parse(re.sub(r"\b0+(?=\d)", "", text), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > MAX_EXPONENT:
                raise ValueError(f"the exponent is {right}")
            return left ** int(right)
        if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](left, right)
    raise ValueError("is not plain arithmetic")
