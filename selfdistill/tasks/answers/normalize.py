r"""One spelling for what people and models write in many.

`normalize` takes the dress off an answer (Unicode, Markdown, LaTeX, words such as "the answer is")
by a sequence of named steps, each a function from text to text. What an answer means is not looked
at here: `**$\dfrac12$**.` becomes `\frac{1}{2}`, and `18 dollars` stays as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from selfdistill.tasks.answers.brackets import matching_bracket
from selfdistill.tasks.final_answer import read_boxes

MOST_CHARACTERS = 1_000
"""Longer answers keep their dress: nobody reads them as one number or expression."""


def normalize(text: str) -> str:
    """Return the text in its plainest spelling, with single spaces.

    Texts of more than `MOST_CHARACTERS` characters keep everything but their spaces.
    """
    text = text.strip()
    return " ".join((text if len(text) > MOST_CHARACTERS else _plainest(text)).split())


@lru_cache(maxsize=10_000)
def _plainest(text: str) -> str:
    for step in _STEPS:
        text = step(text)
    return text


# Unicode ------------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ", "0123456789+-=()nixy")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₓ", "0123456789+-=()nix")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₓ]+")
_DEGREE_SIGNS = {ord(sign): "°" for sign in "\N{MASCULINE ORDINAL INDICATOR}\N{RING ABOVE}"}
_SYMBOLS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{FRACTION SLASH}": "/",
    "\N{DIVISION SLASH}": "/",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{BULLET OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{LESS-THAN OR SLANTED EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{GREATER-THAN OR SLANTED EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{INFINITY}": r"\infty ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{ANGLE}": r"\angle ",
    "\N{DEGREE SIGN}": r"^{\circ}",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "\N{GREEK SMALL LETTER BETA}": r"\beta ",
    "\N{GREEK SMALL LETTER GAMMA}": r"\gamma ",
    "\N{GREEK SMALL LETTER LAMDA}": r"\lambda ",
    "\N{GREEK SMALL LETTER PHI}": r"\phi ",
    "\N{GREEK SMALL LETTER OMEGA}": r"\omega ",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT_OF_A_TOKEN = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[^\W\d_]|\\[a-zA-Z]+)")


def unicode_as_latex(text: str) -> str:
    """Write powers, indices, roots, fractions and symbols of Unicode as LaTeX has them."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = _fractions_apart(text.translate(_DEGREE_SIGNS))
    text = unicodedata.normalize("NFKC", text)  # full-width digits, thin spaces, 1/2 in one sign
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # no width, no meaning
    return _roots(text).translate(_SYMBOL_TABLE)


def _fractions_apart(text: str) -> str:
    """Put a space between a number and the fraction sign after it: 2½ is a mixed number."""
    if text.isascii():
        return text
    pieces: list[str] = []
    for i, character in enumerate(text):
        is_fraction = unicodedata.decomposition(character).startswith("<fraction>")
        if is_fraction and i > 0 and text[i - 1].isdigit():
            pieces.append(" ")
        pieces.append(character)
    return "".join(pieces)


def _roots(text: str) -> str:
    text = _ROOT_OF_A_TOKEN.sub(lambda root: f"{_ROOTS[root[1]]}{{{root[2]}}}", text)
    for sign, command in _ROOTS.items():
        while f"{sign}(" in text:
            start = text.index(f"{sign}(")
            stop = matching_bracket(text, start + 1)
            if stop is None:
                break
            text = f"{text[:start]}{command}{{{text[start + 2 : stop]}}}{text[stop + 1 :]}"
    return text


# Markdown, delimiters of mathematics, boxes, and words around an answer ---------------------------

_EMPHASIS = re.compile(r"(?<![\w*)\]}])(\*{1,3})(?=[^\s*])(.+?)(?<=\S)\1(?![\w*])")
_UNDERLINED = re.compile(r"(_{1,2})(?=\S)([^_]+)(?<=\S)\1")
_HTML = re.compile(r"</?(?:b|i|u|em|strong|code|p|span)>|<br\s*/?>", re.IGNORECASE)
_CODE = re.compile(r"(`{1,3})([^`]+)\1")
_LINE_MARK = re.compile(r"(?:#{1,6}|[*•])\s+")  # "> 3" is a statement, no quotation

_DISPLAY = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
# As Pandoc has it: no space inside the dollars, no digit after them. "$5 or $6" are two prices.
_INLINE = re.compile(r"(?<!\\)\$(?=\S)([^$]*?[^\s\\$])\$(?!\d)", re.DOTALL)

_LEAD_IN = re.compile(
    r"""(?:(?:so|thus|hence|therefore|and)\b,?\s+)?
        (?:(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+)?(?:answer|result|solution|option|choice)
           (?:\s+to\s+(?:the|this)\s+(?:question|problem))?
           \s*(?:is|are|:|=)(?!\w)\s*:?
          |(?:it|this|that)\s+is(?!\w)
          |\\approx(?![a-zA-Z])|=|about(?!\w)|approximately(?!\w)|roughly(?!\w)|the(?=\s+\d))
        \s*""",
    re.VERBOSE | re.IGNORECASE,
)
_FINAL_STOP = re.compile(r"(?<!\.)[.,;]$")


def undress(text: str) -> str:
    """Take off Markdown, delimiters, a box, words before the answer, and a full stop after it."""
    for _ in range(10):  # one dress may hide another: **$\boxed{18}$.**
        before = text
        for step in (drop_markdown, drop_delimiters, drop_box, drop_lead_in, drop_final_stop):
            text = step(text).strip()
        if text == before:
            break
    return text


def drop_markdown(text: str) -> str:
    """Drop the marks of bold, italic and code, those of HTML too, and of a heading or bullet."""
    text = _HTML.sub("", text)
    text = _LINE_MARK.sub("", text) if _LINE_MARK.match(text) else text
    for mark in (_CODE, _UNDERLINED):  # around everything: both characters have other uses
        whole = mark.fullmatch(text)
        text = whole[2] if whole else text
    return _EMPHASIS.sub(r"\2", text)


def drop_delimiters(text: str) -> str:
    r"""Drop $...$, $$...$$, \(...\) and \[...\]; a dollar sign alone stays, it is money."""
    text = _DISPLAY.sub(lambda found: next(part for part in found.groups() if part), text)
    return _INLINE.sub(r"\1", text)


def drop_box(text: str) -> str:
    r"""Return what stands in \boxed{...} where there is one; of several none is chosen."""
    boxes = read_boxes(text)
    return boxes[0] if len(boxes) == 1 else text


def drop_lead_in(text: str) -> str:
    """Drop "the answer is", "Answer:", "=" and the like in front of an answer."""
    found = _LEAD_IN.match(text)
    return text[found.end() :] if found and found.end() < len(text) else text


def drop_final_stop(text: str) -> str:
    """Drop a full stop, comma or semicolon at the end; three dots stay."""
    return _FINAL_STOP.sub("", text)


# LaTeX --------------------------------------------------------------------------------------------

_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])"
)
_DIGIT_GROUPS = re.compile(
    r"(?<![\d.,])\d{1,3}(?:(?:\\[,;: ]|\\!,?|~|\{,\}|'|\s)\d{3})+(?![\d']|\s*/|\s*\\frac)"
)
_DOTTED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.])")
_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\\(?:thin|med|thick)space(?![a-zA-Z])"
)
_FRACTION_NAMES = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|operatorname|mbox|hbox|emph"
    r"|boldsymbol)\*?\s*\{([^{}]*)\}(?=(?P<word>\s*[\w\\])?)"
)
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\s*\\degree(?![a-zA-Z])")
_MODULO = re.compile(r"\\p?mod\s*(?:\{\s*(\w+)\s*\}|(\w+))|\(\s*mod\s+(\w+)\s*\)")
_MEMBER = re.compile(r"[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")
_SYNONYMS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\leq(?:slant)?(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"==", "="),
        (r"\\[lr]?vert(?![a-zA-Z])", "|"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R)", r"(-\\infty, \\infty)"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\[lc]?dots(?![a-zA-Z])", "..."),
        (r"\\lor(?![a-zA-Z])", " or "),
        (r"\\land(?![a-zA-Z])", " and "),
        (r"\\bmod(?![a-zA-Z])", " mod "),
        (r"\\([%$#&_])", r"\1"),
        (r"(?<!\\)\\!", ""),
        (r"\\log_(\d+)\s", r"\\log_{\1} "),
        (r"\{,\}", ","),
    )
)


def latex_in_one_spelling(text: str) -> str:
    """Write what LaTeX can say in several ways in one, spaces and sizes aside."""
    text = _SIZES.sub("", text)
    text = join_digit_groups(text)
    text = _SPACES.sub(" ", text)
    for pattern, plain in _SYNONYMS:
        text = pattern.sub(plain, text)
    text = _SHORT_FRACTION.sub(_braced_fraction, _FRACTION_NAMES.sub(r"\\frac", text))
    text = words_without_commands(text)
    text = _DEGREES.sub(r"^{\\circ}", text)
    text = _MODULO.sub(lambda found: f"(mod {found[1] or found[2] or found[3]})", text)
    member = _MEMBER.match(text)
    return text[member.end() :] if member else text


def join_digit_groups(text: str) -> str:
    r"""Drop what sets thousands apart, commas aside: 1\,234, 1 234, 1{,}234, 1.234.567."""
    text = _DIGIT_GROUPS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    return _DOTTED_THOUSANDS.sub(lambda found: found[0].replace(".", ""), text)


def _braced_fraction(found: re.Match[str]) -> str:
    top, bottom = (part.strip("{}").strip() for part in found.groups())
    return rf"\frac{{{top}}}{{{bottom}}}"


def words_without_commands(text: str) -> str:
    r"""Turn \text{ cm}, \mathrm{cm} and the like into the words alone, a space before them."""
    for _ in range(4):  # \textbf{\text{...}}
        before = text
        text = _TEXT.sub(lambda found: f" {found[1].strip()}{' ' if found['word'] else ''}", text)
        if text == before:
            break
    return re.sub(r"([_^({\[])\s+", r"\1", text)


# Notation of programs and keyboards ---------------------------------------------------------------

_FUNCTIONS = re.compile(
    r"(?<![\\a-zA-Z])(arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt)(?=\s*[({\d]|\s[a-z]$)"
)
_NAMES = re.compile(r"(?<![\\a-zA-Z])(pi|theta|infinity)(?![a-zA-Z])")
_SQRT_OF_BRACKETS = re.compile(r"\\sqrt\s*\(")
_PLAIN_SET = re.compile(r"\{[^{}]*\}")


def plain_code_as_latex(text: str) -> str:
    r"""Write 2**3 as 2^3, sqrt(2) as \sqrt{2}, pi as \pi, {1, 2} as \{1, 2\}."""
    text = text.replace("**", "^")
    text = _FUNCTIONS.sub(r"\\\1", text)
    text = _NAMES.sub(lambda name: "\\" + {"infinity": "infty"}.get(name[1], name[1]) + " ", text)
    while found := _SQRT_OF_BRACKETS.search(text):
        stop = matching_bracket(text, found.end() - 1)
        if stop is None:
            break
        inside = text[found.end() : stop]
        text = rf"{text[: found.start()]}\sqrt{{{inside}}}{text[stop + 1 :]}"
    if _PLAIN_SET.fullmatch(text):
        return rf"\{{{text[1:-1]}\}}"
    return text


# Dress is taken off again where a step may have found some beneath: $\text{**18**}$.
_STEPS: tuple[Callable[[str], str], ...] = (
    undress,
    unicode_as_latex,
    undress,
    latex_in_one_spelling,
    plain_code_as_latex,
    undress,
)
