"""Cache of rendered chat templates: render once per pattern of roles, then fill in the message contents.

The template is run on opaque contents, which can only be written, concatenated, trimmed, and tested for being empty. A
template that does anything else with them has no skeleton and is run for every conversation. Does not handle token ids.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from llmworks.core.types import Message
from llmworks.tokenize.chat.templates import FROZEN_DATE, Segment, render_text, split_segments

MARK = "\U0010fffe"
SLOT = re.compile(
    MARK + "([0-9]+)([rbet])"
)  # a content in rendered text: its turn, and r (raw) or trimmed at b (beginning), e (end), t (both)
TRIM: dict[str, Callable[[str], str]] = {"r": str, "b": str.lstrip, "e": str.rstrip, "t": str.strip}
TurnPattern = tuple[
    tuple[str, int, bool, bool], ...
]  # per turn: role, weight, whether the content is not empty, whether it is more than white space


class ContentInspected(Exception):
    """The template inspected a content."""


class ContentSlot(NamedTuple):
    """Placeholder for a turn's content: its trimming (a key of `TRIM`), and whether it is more than white space."""

    turn: int
    trim: str
    has_text: bool

    def trim_side(self, side: str) -> ContentSlot:
        """Return the slot trimmed at one more side, "b" (beginning) or "e" (end)."""
        return self._replace(trim=side if self.trim in ("r", side) else "t")


class OpaqueContent:
    """Text with unknown contents: pieces that are strings or slots, and whether it is not empty."""

    def __init__(self, pieces: Sequence[str | ContentSlot], there: bool) -> None:
        self.pieces, self.is_nonempty = tuple(pieces), there

    def __add__(self, other: Any) -> OpaqueContent:
        return self._concatenate(self, other)

    def __radd__(self, other: Any) -> OpaqueContent:
        return self._concatenate(other, self)

    def _concatenate(self, *sides: Any) -> OpaqueContent:
        # jinja2.Markup is refused (type is not str), since it escapes what it is concatenated with
        pieces = [
            piece
            for side in sides
            for piece in (
                side.pieces if isinstance(side, OpaqueContent) else (side,) if type(side) is str else self._refuse()
            )
            if piece != ""
        ]
        return OpaqueContent(pieces, any(map(bool, sides)))

    def strip(self) -> OpaqueContent:
        """Return the text without surrounding white space."""
        pieces = list(self.pieces)
        for at, side in ((0, "b"), (-1, "e")):
            end = pieces[at]
            trimmed = end.trim_side(side) if isinstance(end, ContentSlot) else TRIM[side](end)
            if len(pieces) > 1 and not (trimmed.has_text if isinstance(trimmed, ContentSlot) else trimmed):
                self._refuse()  # the trimming would continue into the neighboring piece
            pieces[at] = trimmed
        return OpaqueContent(pieces, any(p.has_text if isinstance(p, ContentSlot) else bool(p) for p in pieces))

    def __bool__(self) -> bool:
        return self.is_nonempty

    def __eq__(self, other: object) -> bool:
        return not self.is_nonempty if other == "" else False if other is None else self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ContentInspected

    __hash__ = __len__ = __iter__ = __contains__ = __getitem__ = __getattr__ = __str__ = __repr__ = __format__ = (
        __mul__
    ) = __rmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __rmod__ = __int__ = __float__ = __index__ = __call__ = __html__ = (
        _refuse
    )


CONTENT_TESTS = {
    "string": True,
    "defined": True,
    "undefined": False,
    "none": False,
    "mapping": False,
    "iterable": True,
    "sequence": True,
    "number": False,
}
LIST_FILTERS = {
    "length",
    "count",
    "first",
    "last",
    "list",
    "selectattr",
    "rejectattr",
    "default",
    "d",
}  # filters that only pass list items on


class SkeletonCache:
    """Cache of the skeletons of one tokenizer's template, one for each pattern of turns."""

    def __init__(self, tokenizer: Any, *, frozen: bool = False) -> None:
        self._tokenizer, self._frozen = tokenizer, frozen
        self._template = _compile_template(tokenizer.chat_template or "", frozen)
        self._known: dict[TurnPattern, list[Segment] | None] = {}

    def get_segments(self, pattern: TurnPattern, messages: Callable[[], Sequence[Message]]) -> list[Segment] | None:
        """Return the segments of a pattern with slots for contents, or None if the template has no skeleton.

        `messages` returns a conversation of this pattern, on which the skeleton is verified.
        """
        if pattern not in self._known:
            self._known[pattern] = self._render_skeleton(pattern, messages())
        return self._known[pattern]

    def _render_skeleton(self, pattern: TurnPattern, example: Sequence[Message]) -> list[Segment] | None:
        if self._template is None:
            return None
        turns = [Message(role, "", weight=weight) for role, weight, _, _ in pattern]
        contents = [
            OpaqueContent([ContentSlot(i, "r", filled)], there) for i, (_, _, there, filled) in enumerate(pattern)
        ]
        try:
            skeleton = split_segments(lambda count, prompt: self._render(pattern[:count], contents, prompt), turns)
            texts = [message.content for message in example]
            # without an end token, the trained part would end at the trailing white space of the content
            if any(SLOT.split(text)[-1] == "" for text, _ in skeleton):
                return None
            real = split_segments(
                lambda count, prompt: render_text(
                    self._tokenizer, example[:count], generation_prompt=prompt, frozen=self._frozen
                ),
                example,
            )
        except Exception:  # the normal renderer will raise and report it
            return None
        return skeleton if [(fill_slots(text, texts), learned) for text, learned in skeleton] == real else None

    def _render(self, pattern: TurnPattern, contents: Sequence[OpaqueContent], prompt: bool) -> str:
        messages = [{"role": role, "content": content} for (role, *_), content in zip(pattern, contents, strict=False)]
        extra = {**self._tokenizer.special_tokens_map, **({"date_string": FROZEN_DATE} if self._frozen else {})}
        assert self._template is not None
        text: str = self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **extra
        )
        return text


def get_pattern(messages: Sequence[Message]) -> TurnPattern | None:
    """Return the pattern of a conversation; None with tool calls, tool results, names or other fields."""
    if any(m.tool_calls or m.tool_call_id or m.name or m.extra for m in messages):
        return None
    return tuple((m.role, m.weight, bool(m.content), bool(m.content.strip())) for m in messages)


def fill_slots(text: str, contents: Sequence[str]) -> str:
    """Fill the slots of a segment with contents."""
    return SLOT.sub(lambda m: TRIM[m[2]](contents[int(m[1])]), text)


def _compile_template(template: str, frozen: bool) -> Any:
    """Compile the template for opaque contents; None if it captures its own output, which it could then inspect."""
    import jinja2
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if MARK in template:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_finalize
    )
    for drawn in ("random", "safe", "forceescape"):
        environment.filters.pop(drawn)
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": (lambda form: FROZEN_DATE) if frozen else _refuse_date,
    }
    filters = {**environment.filters, "tojson": functools.partial(json.dumps, ensure_ascii=False)}
    environment.filters = {name: _guard_filter(name, function) for name, function in filters.items()}
    environment.filters["trim"] = lambda value, *chars: value.strip(*chars)
    environment.tests = {name: _guard_test(name, function) for name, function in environment.tests.items()}
    source = re.sub(
        r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template
    )  # generation tags of transformers, which write nothing
    try:
        tree = environment.parse(source)
        kept = (
            nodes.Macro,
            nodes.CallBlock,
            nodes.AssignBlock,
            nodes.FilterBlock,
            nodes.EvalContextModifier,
            nodes.Block,
            nodes.Include,
            nodes.Import,
            nodes.FromImport,
        )
        recursive = any(loop.recursive for loop in tree.find_all(nodes.For))
        return None if recursive or any(tree.find(kind) for kind in kept) else environment.from_string(source)
    except jinja2.TemplateError:
        return None


def _finalize(value: Any) -> Any:
    if not isinstance(value, OpaqueContent):
        return value
    return "".join(
        f"{MARK}{piece.turn}{piece.trim}" if isinstance(piece, ContentSlot) else piece for piece in value.pieces
    )


def _raise_exception(message: str) -> NoReturn:
    raise ContentInspected(message)


def _refuse_date(form: str) -> NoReturn:
    raise ContentInspected("the date, which changes while this runs")


def _has_content(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_content, value.values()))
    return any(map(_has_content, value)) if isinstance(value, (list, tuple)) else isinstance(value, OpaqueContent)


def _guard_filter(name: str, function: Any) -> Any:
    """Wrap a filter so that it refuses opaque contents."""
    if name in LIST_FILTERS:
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(_has_content, (*args, *kwargs.values()))):
            raise ContentInspected(name)
        return function(*args, **kwargs)

    return _copy_pass_arg(function, call)


def _guard_test(name: str, function: Any) -> Any:
    """Wrap a test so that it treats opaque contents as strings, or refuses them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, OpaqueContent) for a in args):
            if name not in CONTENT_TESTS:
                raise ContentInspected(name)
            return CONTENT_TESTS[name]
        return function(*args, **kwargs)

    return _copy_pass_arg(function, call)


def _copy_pass_arg(function: Any, call: Any) -> Any:
    """Copy Jinja's pass_context, pass_eval_context or pass_environment mark from the function to its wrapper."""
    if hasattr(function, "jinja_pass_arg"):
        call.jinja_pass_arg = function.jinja_pass_arg
    return call
