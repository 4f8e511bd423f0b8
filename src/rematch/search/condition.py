"""Conditions on the columns of an index: parsed here, then written anew as SQL.

LanceDB never reads what a user typed. Its parser can overflow the stack, and its functions can
take all memory. The grammar::

    condition   = conjunction {OR conjunction}
    conjunction = {NOT} part {AND {NOT} part}
    part        = "(" condition ")" | column
                | operand ("=" | "!=" | "<>" | "<" | "<=" | ">" | ">=") operand
                | operand [NOT] BETWEEN operand AND operand
                | column [NOT] IN "(" literal {"," literal} ")"
                | column [NOT] LIKE text
                | column IS [NOT] NULL
    operand     = column | literal
    literal     = text in single quotes | number | TRUE | FALSE

A column is a plain word in any case, or its exact name in backticks or double quotes. A column of
booleans is a condition by itself. In a pattern of LIKE, ``%`` is any text, ``_`` any character,
and a backslash takes either literally. NULL is as in SQL: a comparison with it is neither true nor
false.

A parsed condition is in a normal form. AND and OR alternate. NOT stands only before a comparison,
because LanceDB's parser refuses 24 nested NOT and takes exponential time for more. NOT IN stands
beside IS NOT NULL, because LanceDB takes ``x NOT IN (1, 2) OR x NOT IN (3, 4)`` for true if x is
NULL.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple, NoReturn

import pyarrow as pa

from rematch.errors import DataError
from rematch.search.columns import RESERVED, literal

MAX_LENGTH = 10_000  # characters
MAX_DEPTH = 16  # parentheses within parentheses
MAX_TERMS = 256  # comparisons
MAX_WILDCARDS = 32  # % and _ in all patterns: matching them takes longest

_KINDS = {pa.string(): "text", pa.float64(): "a number", pa.bool_(): "a boolean"}
_LITERALS = {
    "text": "put the value in single quotes",
    "a number": "write the value without quotes",
    "a boolean": "write TRUE or FALSE",
}
_COLUMNS_LISTED = 12
_CHARACTERS_SHOWN = 40
_EXAMPLE = "year > 2000 AND place = 'Rome'"
_KEYWORDS = frozenset("AND BETWEEN FALSE IN IS LIKE NOT NULL OR TRUE".split())
_OPERATORS = frozenset(["=", "!=", "<>", "<", "<=", ">", ">="])
_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | (?P<text>'[^']*(?:''[^']*)*'(?!'))
    | (?P<quoted>`[^`]+`|"[^"]*(?:""[^"]*)*"(?!"))
    | (?P<word>[^\W\d]\w*)
    | (?P<symbol><=|>=|<>|!=|[=<>(),+-])
    """,
    re.VERBOSE,
)

Value = str | float | bool


@dataclass(frozen=True)
class RawSQL:
    """A condition that LanceDB reads as it is, unchecked: for SQL of your own code.

    It may use every column and function of LanceDB. Never build it from what a user sends. The
    command line and the HTTP API take only conditions of the grammar.
    """

    sql: str


@dataclass(frozen=True)
class Column:
    """A column; ``kind`` is ``"text"``, ``"a number"`` or ``"a boolean"``."""

    name: str
    kind: str


Operand = Column | Value


@dataclass(frozen=True)
class Comparison:
    """``left operator right``; two columns, or a column and a literal."""

    left: Operand
    operator: str
    right: Operand


@dataclass(frozen=True)
class Between:
    """``operand BETWEEN low AND high``, both included."""

    operand: Operand
    low: Operand
    high: Operand


@dataclass(frozen=True)
class In:
    """``column IN (values)``."""

    column: Column
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Like:
    """``column LIKE pattern``."""

    column: Column
    pattern: str


@dataclass(frozen=True)
class IsNull:
    """``column IS NULL``."""

    column: Column


Term = Comparison | Between | In | Like | IsNull


@dataclass(frozen=True)
class Not:
    """The negation of a comparison."""

    term: Term


@dataclass(frozen=True)
class And:
    """All of two or more conditions, none of which is an :class:`And`."""

    parts: "tuple[Condition, ...]"


@dataclass(frozen=True)
class Or:
    """Any of two or more conditions, none of which is an :class:`Or`."""

    parts: "tuple[Condition, ...]"


Condition = Term | Not | And | Or


def parse(text: str, schema: pa.Schema) -> Condition:
    """Parse a condition on the columns of an index.

    Args:
        text: The condition.
        schema: Schema of the index's table.

    Raises:
        DataError: If the text is not a condition of the grammar, is too long or too deep, or does
            not fit the columns.
    """
    if len(text) > MAX_LENGTH:
        raise DataError(
            f"filter: has {len(text):,} characters; it may have {MAX_LENGTH:,}. Shorten it."
        )
    return _Parser(text, schema).parse()


def to_sql(condition: Condition) -> str:
    """A condition as SQL for LanceDB, which :func:`parse` reads too.

    >>> year = Column("year", "a number")
    >>> print(to_sql(And((Comparison(year, ">", 2000.0), Not(IsNull(Column("it", "text")))))))
    `year` > 2000.0 AND NOT `it` IS NULL
    """
    match condition:
        case And(parts):
            written = (f"({to_sql(p)})" if isinstance(p, Or) else to_sql(p) for p in parts)
            return " AND ".join(written)
        case Or(parts):
            return " OR ".join(map(to_sql, parts))
        case Not(term):
            return f"NOT {to_sql(term)}"
        case Comparison(left, operator, right):
            return f"{_operand(left)} {operator} {_operand(right)}"
        case Between(operand, low, high):
            return f"{_operand(operand)} BETWEEN {_operand(low)} AND {_operand(high)}"
        case In(column, values):
            return f"{_operand(column)} IN ({', '.join(map(_operand, values))})"
        case Like(column, pattern):
            return f"{_operand(column)} LIKE {_operand(pattern)}"
        case IsNull(column):
            return f"{_operand(column)} IS NULL"


def _operand(operand: Operand) -> str:
    if isinstance(operand, Column):
        return f"`{operand.name}`"  # a column's name has no backtick
    if isinstance(operand, str):
        return literal(operand)
    if isinstance(operand, bool):
        return "TRUE" if operand else "FALSE"
    return repr(operand)


def _joined(kind: type[And] | type[Or], parts: Sequence[Condition]) -> Condition:
    """Conditions joined by AND or OR; those that are joined by the same word become its parts."""
    flat: list[Condition] = []
    for part in parts:
        flat += part.parts if isinstance(part, kind) else [part]
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def _negated(condition: Condition) -> Condition:
    """The negation in normal form, by De Morgan's laws, which hold with NULL too."""
    match condition:
        case And(parts):
            return _joined(Or, [_negated(part) for part in parts])
        case Or(parts):
            return _joined(And, [_negated(part) for part in parts])
        case Not(term):
            return term
        case Comparison() | Between() | In() | Like() | IsNull():
            return Not(condition)


def _guarded(condition: Condition) -> Condition:
    """The same condition with IS NOT NULL beside each NOT IN."""
    match condition:
        case Or(parts):
            return _joined(Or, [_guarded(part) for part in parts])
        case And(parts):
            guarded: list[Condition] = []
            for part in parts:
                if isinstance(part, Not) and isinstance(part.term, In):
                    guard = Not(IsNull(part.term.column))
                    if guard not in parts and guard not in guarded:
                        guarded.append(guard)
                guarded.append(_guarded(part) if isinstance(part, Or) else part)
            return _joined(And, guarded)
        case Not(In()):
            return _guarded(And((condition,)))
        case _:
            return condition


def _kind(operand: Operand) -> str:
    if isinstance(operand, Column):
        return operand.kind
    if isinstance(operand, bool):
        return "a boolean"
    return "text" if isinstance(operand, str) else "a number"


class _Token(NamedTuple):
    """``kind`` is a group of :data:`_TOKEN`, or ``"keyword"`` or ``"end"``."""

    kind: str
    text: str
    start: int


class _Parser:
    """Recursive descent, whose only recursion is that of parentheses."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = text
        self.columns = {
            name: _KINDS.get(schema.field(name).type, "")
            for name in schema.names
            if name in ("id", "text", "path") or name not in RESERVED
        }
        self.spellings = {name.casefold(): name for name in self.columns}
        self.position = self.depth = self.terms = self.wildcards = 0
        self.tokens = self._tokens()

    def parse(self) -> Condition:
        condition = self._condition()
        if self.token.kind != "end":
            self._fail(f"unexpected {self._shown()}. Join comparisons with AND or OR.")
        return _guarded(condition)

    # ---- tokens ---------------------------------------------------------------------------------

    def _tokens(self) -> list[_Token]:
        tokens = []
        start = 0
        while start < len(self.text):
            match = _TOKEN.match(self.text, start)
            if match is None:
                self._fail_at_character(start)
            kind, text = str(match.lastgroup), match.group()
            if kind == "word" and text.isascii() and text.upper() in _KEYWORDS:
                kind, text = "keyword", text.upper()
            if kind in ("text", "quoted"):
                self._check_unicode(text, start)
            if kind != "space":
                tokens.append(_Token(kind, text, start))
            start = match.end()
        return [*tokens, _Token("end", "", start)]

    def _fail_at_character(self, start: int) -> NoReturn:
        character = self.text[start]
        if character in "'\"`":
            self._fail(f"the {character} is not closed. Close it, or double it in a text.", start)
        if character in "0123456789.":
            self._fail("not a number. Write one such as 2000, -1.5 or 1e6.", start)
        self._fail(
            f"{character!r} cannot be used in a condition. Write one such as {_EXAMPLE}.", start
        )

    def _check_unicode(self, text: str, start: int) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self._fail(
                "half a character (a lone surrogate), which no index holds. Remove it.",
                start + error.start,
            )

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def _take(self) -> _Token:
        token = self.token
        self.position += 1
        return token

    def _accept(self, text: str) -> bool:
        """Go on after this keyword or symbol, if it comes next."""
        accepted = self.token.kind in ("keyword", "symbol") and self.token.text == text
        self.position += accepted
        return accepted

    def _expect(self, text: str, after: str) -> None:
        if not self._accept(text):
            self._fail(f"{text} is missing after {after}; there is {self._shown()}. Write it.")

    def _shown(self) -> str:
        return _shortened(self.token.text) if self.token.text else "the end"

    def _fail(self, problem: str, start: int | None = None) -> NoReturn:
        place = self.token.start if start is None else start
        raise DataError(f"filter, character {place + 1}: {problem}")

    # ---- grammar --------------------------------------------------------------------------------

    def _condition(self) -> Condition:
        return self._list(Or, "OR", lambda: self._list(And, "AND", self._part))

    def _list(
        self, kind: type[And] | type[Or], word: str, part: Callable[[], Condition]
    ) -> Condition:
        parts = [part()]
        while self._accept(word):
            parts.append(part())
        return _joined(kind, parts)

    def _part(self) -> Condition:
        negated = False
        while self._accept("NOT"):
            negated = not negated
        part = self._parenthesized() if self._accept("(") else self._comparison()
        return _negated(part) if negated else part

    def _parenthesized(self) -> Condition:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(
                f"more than {MAX_DEPTH} parentheses within one another. Write it with fewer."
            )
        condition = self._condition()
        self._expect(")", "a condition in parentheses")
        self.depth -= 1
        return condition

    def _comparison(self) -> Condition:
        self.terms += 1
        if self.terms > MAX_TERMS:
            self._fail(f"more than {MAX_TERMS} comparisons. Use IN, or fewer of them.")
        start = self.token.start
        operand = self._operand()
        if self.token.kind == "symbol" and self.token.text in _OPERATORS:
            operator = self._take().text.replace("<>", "!=")
            right = self._operand()
            self._check_operands(operator, start, operand, right)
            return Comparison(operand, operator, right)
        negated = self._accept("NOT")
        if self._accept("BETWEEN"):
            low = self._operand()
            self._expect("AND", "BETWEEN and a value")
            high = self._operand()
            self._check_operands("BETWEEN", start, operand, low, high)
            condition: Condition = Between(operand, low, high)
        else:
            condition = self._column_condition(operand, start, negated=negated)
        return _negated(condition) if negated else condition

    def _column_condition(self, operand: Operand, start: int, *, negated: bool) -> Condition:
        """What only a column can begin."""
        if not isinstance(operand, Column):
            self._fail(f"a value alone. Compare a column with it, as in {_EXAMPLE}.", start)
        if self._accept("IN"):
            return In(operand, self._values(operand))
        if self._accept("LIKE"):
            return Like(operand, self._pattern(operand))
        if negated:
            self._fail(f"{self._shown()} after NOT. Write NOT IN, NOT LIKE or NOT BETWEEN.")
        if self._accept("IS"):
            is_negated = self._accept("NOT")
            self._expect("NULL", "IS")
            return Not(IsNull(operand)) if is_negated else IsNull(operand)
        if operand.kind != "a boolean":
            self._fail(
                f"{self._shown()} where a comparison should be. Write =, !=, <, <=, >, >=, IN, "
                f"LIKE, BETWEEN or IS NULL after {_written(operand.name)}. A column's name of "
                "several words goes in backticks."
            )
        return Comparison(operand, "=", True)

    def _check_operands(self, operator: str, start: int, *operands: Operand) -> None:
        kinds = {_kind(operand) for operand in operands}
        columns = [operand.name for operand in operands if isinstance(operand, Column)]
        if not columns:
            self._fail(f"{operator} has no column. Compare a column with a value.", start)
        if len(kinds) > 1:
            self._fail_at_kinds(operator, columns[0], kinds, start)
        if "a boolean" in kinds and operator not in ("=", "!="):
            self._fail(f"{operator} compares booleans, which have no order. Use = or !=.", start)

    def _fail_at_kinds(self, operator: str, column: str, kinds: set[str], start: int) -> NoReturn:
        self._fail(
            f"{operator} compares {' with '.join(sorted(kinds))}. {_written(column)} holds "
            f"{self.columns[column]}: {_LITERALS[self.columns[column]]}.",
            start,
        )

    # ---- columns and values ---------------------------------------------------------------------

    def _operand(self) -> Operand:
        if self.token.kind in ("word", "quoted"):
            return self._column(self._take())
        return self._value()

    def _column(self, token: _Token) -> Column:
        if token.kind == "word":
            name = self.spellings.get(token.text.casefold(), "")
        else:
            name = token.text[1:-1].replace('""', '"')
        if name not in self.columns:
            self._fail_at_column(token)
        if not self.columns[name]:
            self._fail(
                f"{_written(name)} holds neither text, numbers nor booleans. Use other columns.",
                token.start,
            )
        return Column(name, self.columns[name])

    def _fail_at_column(self, token: _Token) -> NoReturn:
        if self.token == _Token("symbol", "(", self.token.start):
            self._fail(
                f"{_shortened(token.text)}(…) calls a function, which a filter cannot. "
                f"Compare columns with values, as in {_EXAMPLE}.",
                token.start,
            )
        hint = ""
        if token.text[0] == '"':
            hint = " If it is a text, put it in single quotes."
        else:
            close = get_close_matches(token.text.strip("`")[:100].casefold(), self.spellings, 1)
            hint = "".join(f" Did you mean {_written(self.spellings[name])}?" for name in close)
        names = [_written(name) for name in self.columns]
        listed = ", ".join(names[:_COLUMNS_LISTED])
        more = len(names) - _COLUMNS_LISTED
        self._fail(
            f"{_shortened(token.text)} is not a column.{hint} The columns are {listed}"
            + (f" and {more} more." if more > 0 else "."),
            token.start,
        )

    def _value(self) -> Value:
        token = self._take()
        if token.kind == "text":
            return token.text[1:-1].replace("''", "'")
        if token.kind == "keyword" and token.text in ("TRUE", "FALSE"):
            return token.text == "TRUE"
        sign = -1 if token.text == "-" else 1
        number = self._take() if token.kind == "symbol" and token.text in "+-" else token
        if number.kind != "number":
            self.position -= 1
            if number.text == "NULL":
                self._fail("nothing equals NULL. Write IS NULL or IS NOT NULL after a column.")
            self._fail(
                f"{self._shown()} where a column or a value should be. Write a condition such as "
                f"{_EXAMPLE}."
            )
        value = sign * float(number.text) + 0.0  # and so 0 for -0
        if math.isinf(value):
            self._fail("too large for a number. Write one below 1.8e308.", token.start)
        return value

    def _values(self, column: Column) -> tuple[Value, ...]:
        self._expect("(", "IN")
        values: list[Value] = []
        while not values or self._accept(","):
            start = self.token.start
            values.append(self._value())
            kinds = {column.kind, _kind(values[-1])}
            if len(kinds) > 1:
                self._fail_at_kinds("IN", column.name, kinds, start)
        self._expect(")", "the values of IN")
        return tuple(values)

    def _pattern(self, column: Column) -> str:
        start = self.token.start
        pattern = self._value()
        if column.kind != "text" or not isinstance(pattern, str):
            self._fail(
                "LIKE compares text with a pattern in single quotes. For numbers and booleans "
                "use other comparisons.",
                start,
            )
        if re.fullmatch(r"(?:[^\\]|\\[\\%_])*", pattern, re.DOTALL) is None:
            self._fail(r"a \ in the pattern without \, % or _ after it. Write \\ for \.", start)
        self.wildcards += len(re.findall("[%_]", re.sub(r"\\.", "", pattern, flags=re.DOTALL)))
        if self.wildcards > MAX_WILDCARDS:
            self._fail(f"more than {MAX_WILDCARDS} of % and _ in the patterns. Use fewer.", start)
        return pattern


def _written(name: str) -> str:
    """A column's name as one writes it in a condition.

    >>> _written("year"), _written("year of birth"), _written("like")
    ('year', '`year of birth`', '`like`')
    """
    is_plain = name.isascii() and name.isidentifier() and name.upper() not in _KEYWORDS
    return _shortened(name if is_plain else f"`{name}`")


def _shortened(text: str) -> str:
    """Text of a user on one line."""
    cut = text if len(text) <= _CHARACTERS_SHOWN else text[: _CHARACTERS_SHOWN - 1] + "…"
    return cut if cut.isprintable() else repr(cut)[1:-1]
