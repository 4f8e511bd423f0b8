"""Conditions: what they mean, what is refused, and that no text harms LanceDB."""

import itertools
import operator
import random
import re

import lancedb
import pyarrow as pa
import pytest
from pydantic import ValidationError

from rematch.errors import DataError
from rematch.search.condition import (
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_TERMS,
    MAX_WILDCARDS,
    RawSQL,
    parse,
    to_sql,
)
from rematch.search.schema import IndexSettings, table_schema

TEXTS = [
    "",
    "Rome",
    "rome",
    "it's",
    "50%",
    "a_b",
    "a\\b",
    "new\nline",
    "漢字 😀",
    "ab",
    "-- x",
    "a\0b",
]
NUMBERS = [-1e22, -2.5, 0.0, 1e-7, 3.0, 2000.0, 1e300]
PATTERNS = [
    "%",
    "",
    "a%",
    "%b",
    "%\n%",
    "_",
    "__",
    "a\\_b",
    "50\\%",
    "%\\\\%",
    "%'%",
    "R_me%",
    "漢_%",
]
COLUMNS = {
    "id": TEXTS,
    "text": TEXTS,
    "place of birth": TEXTS,
    "like": TEXTS,
    "year": NUMBERS,
    'a"b': NUMBERS,
    "größe": NUMBERS,
    "good": [True, False],
    "select": [True, False],
}
SCHEMA = table_schema(IndexSettings("m", "f", 2, 0, document_instructions=True, corpus=""), 2)
for column, values in list(COLUMNS.items())[2:]:
    kinds = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
    SCHEMA = SCHEMA.append(pa.field(column, kinds[type(values[0])]))
SCHEMA = SCHEMA.append(pa.field("other", pa.int32()))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = random.Random(0)
    return [
        {
            name: rng.choice(values if name == "id" else [*values, None, None])
            for name, values in COLUMNS.items()
        }
        | {"stamp": number, "vector": [0.0, 1.0]}
        for number in range(60)
    ]


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    database = lancedb.connect(tmp_path_factory.mktemp("table"))
    return database.create_table("documents", pa.Table.from_pylist(rows, schema=SCHEMA))


def rows_where(table, sql: str) -> list[int]:
    request = table.search().where(sql).select(["stamp"]).limit(None)
    return sorted(request.to_arrow()["stamp"].to_pylist())


# ---- what conditions mean: each is written as text and as a function of a row -------------------


def both(a, b):
    return False if a is False or b is False else None if a is None or b is None else True


def negation(a):
    return None if a is None else not a


def compare(function, a, b):
    return None if a is None or b is None else function(a, b)


OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def is_like(text: str, pattern: str) -> bool:
    parts = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    wildcards = {"%": ".*", "_": "."}
    expression = "".join(wildcards.get(part) or re.escape(part[-1]) for part in parts)
    return re.fullmatch(expression, text, re.DOTALL) is not None


def cased(rng, word: str) -> str:
    return rng.choice([word, word.lower(), word.title()])


def written_column(rng, name: str) -> str:
    quoted = [f"`{name}`", '"' + name.replace('"', '""') + '"']
    plain = [name, name.upper()] if name.isidentifier() and name != "like" else []
    return rng.choice(quoted + plain)


def written_value(rng, value) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, bool):
        return cased(rng, str(value).upper())
    return rng.choice(["", "+", "+ "] if value >= 0 else [""]) + repr(value)


def random_term(rng, names):
    name = rng.choice(names)
    values = COLUMNS[name]
    column = written_column(rng, name)
    kind = rng.choice(["comparison", "columns", "null", "in", "between", "like"])
    negated = rng.random() < 0.5
    no = cased(rng, "NOT") + " " if negated else ""
    if kind == "null":
        return f"{column} IS {no}NULL", lambda row: (row[name] is None) != negated
    if kind == "in":
        members = rng.choices(values, k=rng.randint(1, 4))
        listed = ", ".join(written_value(rng, value) for value in members)
        text = f"{column} {no}{cased(rng, 'IN')} ({listed})"

        def term(row):
            return None if row[name] is None else row[name] in members

    elif kind == "between" and type(values[0]) is not bool:
        low, high = rng.choices(values, k=2)
        text = f"{column} {no}BETWEEN {written_value(rng, low)} and {written_value(rng, high)}"

        def term(row):
            return None if row[name] is None else low <= row[name] <= high

    elif kind == "like" and type(values[0]) is str:
        pattern = rng.choice(PATTERNS)
        text = f"{column} {no}{cased(rng, 'LIKE')} {written_value(rng, pattern)}"

        def term(row):
            return None if row[name] is None else is_like(row[name], pattern)

    else:
        return random_comparison(rng, name, column)
    return text, (lambda row: negation(term(row))) if negated else term


def random_comparison(rng, name: str, column: str):
    values = COLUMNS[name]
    symbol = rng.choice(list(OPERATORS))
    function = OPERATORS[symbol]
    if type(values[0]) is bool:
        if rng.random() < 0.3:
            return column, lambda row: row[name]
        symbol, function = rng.choice([("=", operator.eq), ("!=", operator.ne)])
    space = rng.choice(["", " ", "\n"])
    if rng.random() < 0.3:
        other = rng.choice([n for n, v in COLUMNS.items() if type(v[0]) is type(values[0])])
        text = f"{column}{space}{symbol}{space}{written_column(rng, other)}"
        return text, lambda row: compare(function, row[name], row[other])
    value = rng.choice(values)
    if rng.random() < 0.3:
        text = f"{written_value(rng, value)}{space}{symbol} {column}"
        return text, lambda row: compare(function, value, row[name])
    text = f"{column} {symbol}{space}{written_value(rng, value)}"
    return text, lambda row: compare(function, row[name], value)


def random_condition(rng, depth: int, names=tuple(COLUMNS)):
    """Text of a condition, and what it is for a row: True, False or None."""
    if depth == 0 or rng.random() < 0.2:
        return random_term(rng, names)
    parts = [random_condition(rng, depth - 1, names) for _ in range(rng.randint(1, 3))]
    word = rng.choice(["AND", "OR"])
    texts, functions = [], []
    for text, function in parts:
        count = rng.choice([0, 0, 1, 2, 3])
        texts.append(f"{cased(rng, 'NOT')} " * count + f"({text})")
        functions.append((lambda row, f=function: negation(f(row))) if count % 2 else function)

    def joined(row):
        if word == "AND":
            result = True
            for function in functions:
                result = both(result, function(row))
            return result
        result = True
        for function in functions:
            result = both(result, negation(function(row)))
        return negation(result)

    return f" {cased(rng, word)} ".join(texts), joined


def test_conditions_select_what_they_say(table, rows, tally):
    """Text, normal form and SQL mean what Python computes row by row, with NULL."""
    rng = random.Random(1)
    sizes = set()
    for _ in range(300):
        names = rng.sample(list(COLUMNS), rng.choice([1, 2, 5]))  # one column in several terms
        text, holds = random_condition(rng, rng.randint(0, 4), names)
        condition = parse(text, SCHEMA)
        sql = to_sql(condition)
        assert parse(sql, SCHEMA) == condition
        assert "NOT (" not in sql
        assert "NOT NOT" not in sql
        selected = rows_where(table, sql)
        assert selected == [row["stamp"] for row in rows if holds(row) is True], text
        sizes.add(len(selected))
        tally("Filters")["ran as Python says"] += 1
    assert len(sizes) > 30


def test_terms_on_one_column_join_as_their_rows_do(table, tally):
    """LanceDB merges such terms, and then took NULL NOT IN (…) for true."""
    terms = [
        f"year {term}"
        for term in (
            "IN (0, 3)",
            "NOT IN (2000, 1e300)",
            "NOT IN (0, 3)",
            "= 3",
            "!= 3",
            "!= 0",
            "BETWEEN 0 AND 3",
            "NOT BETWEEN 1 AND 9",
            "IS NULL",
            "IS NOT NULL",
        )
    ]
    selected = {term: set(rows_where(table, to_sql(parse(term, SCHEMA)))) for term in terms}
    for a, b in itertools.combinations(terms, 2):
        for word, expected in (
            ("AND", selected[a] & selected[b]),
            ("OR", selected[a] | selected[b]),
        ):
            assert set(rows_where(table, to_sql(parse(f"{a} {word} {b}", SCHEMA)))) == expected
            tally("Filters")["ran as Python says"] += 1


def test_and_binds_tighter_than_or_and_not_tightest():
    for text, sql in {
        "good OR good AND year > 1": "`good` = TRUE OR `good` = TRUE AND `year` > 1.0",
        "NOT year > 1 AND good": "NOT `year` > 1.0 AND `good` = TRUE",
        "NOT (good OR year > 1) OR NOT NOT good": (
            "NOT `good` = TRUE AND NOT `year` > 1.0 OR `good` = TRUE"
        ),
        "NOT (good AND year > 1) AND good": (
            "(NOT `good` = TRUE OR NOT `year` > 1.0) AND `good` = TRUE"
        ),
        "YEAR between -1 and - 2 and year <> -0": (
            "`year` BETWEEN -1.0 AND -2.0 AND `year` != 0.0"
        ),
    }.items():
        assert to_sql(parse(text, SCHEMA)) == sql


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "yeer > 1": "character 1: yeer is not a column. Did you mean year? The columns are id, text, "
    'path, `place of birth`, `like`, year, `a"b`, `größe`, good, select, other.',
    "`Year` = 1": "`Year` is not a column. Did you mean year?",
    "stamp > 1": "stamp is not a column",
    "vector IS NULL": "vector is not a column",
    "other > 1": "other holds neither text, numbers nor booleans",
    'text = "Rome"': 'character 8: "Rome" is not a column. If it is a text, put it in single',
    "lpad('a', 9) = 'b'": "lpad(…) calls a function",
    "good AND year = '2000'": "character 10: = compares a number with text. year holds a number: "
    "write the value without quotes.",
    "text = 5": "text holds text: put the value in single quotes",
    "good = 1": "good holds a boolean: write TRUE or FALSE",
    "year = text": "= compares a number with text",
    "year BETWEEN 1 AND 'a'": "BETWEEN compares a number with text",
    "year IN (1, 'a')": "character 13: IN compares a number with text",
    "good < TRUE": "compares booleans, which have no order",
    "year = NULL": "nothing equals NULL. Write IS NULL",
    "year IN (1, NULL)": "nothing equals NULL",
    "year LIKE '2%'": "LIKE compares text with a pattern",
    "text LIKE 5": "LIKE compares text with a pattern",
    "text LIKE 'a\\'": r"a \ in the pattern",
    "text LIKE 'a\\b'": r"a \ in the pattern",
    "year > 1e309": "character 8: too large for a number",
    "year > 1x": "character 8: not a number",
    "1 = 1": "= has no column",
    "TRUE": "a value alone",
    "1 + 1 > 0": "a value alone",
    "year": "the end where a comparison should be",
    "place of birth = 'x'": "place is not a column",
    "year of birth > 1": "goes in backticks",
    "year NOT 5": "5 after NOT",
    "year IS 5": "NULL is missing after IS; there is 5",
    "year BETWEEN 1": "AND is missing after BETWEEN",
    "(good": ") is missing",
    "good)": "unexpected ). Join comparisons with AND or OR.",
    "year > 1 -- comment": "unexpected -",
    "year > 1; good": "';' cannot be used",
    "id = $1": "'$' cannot be used",
    "? > 1": "'?' cannot be used",
    "?": "'?' cannot be used",
    " ": "the end where a column or a value should be",
    "text = 'it's'": "the ' is not closed",
    "text = '\ud800'": "half a character",
    "`\ud800` = 1": "half a character",
    "\ud800 = 1": "cannot be used",
    "good\0": r"'\x00' cannot be used",
    "`a\u2028b` = 1": r"`a\u2028b` is not a column",
    "\u0131n = 1": "is not a column",
}


@pytest.mark.parametrize("text", REFUSED)
def test_errors_say_what_is_wrong_and_where(text):
    with pytest.raises(DataError) as caught:
        parse(text, SCHEMA)
    assert re.match(r"filter, character \d+: ", str(caught.value))
    assert REFUSED[text] in str(caught.value)


def test_sizes_are_bounded_and_the_largest_conditions_run(table):
    deep = "year = 1"
    for i in range(MAX_DEPTH):
        deep = f"NOT ({deep} {'AND' if i % 2 else 'OR'} year != {i})"
    terms = " OR ".join(["good"] * MAX_TERMS)
    values = "year IN (" + "1," * ((MAX_LENGTH - 11) // 2) + "1)"
    wildcards = f"text LIKE '{'%_' * (MAX_WILDCARDS // 2)}'"
    for largest, larger, limit in (
        (deep, f"({deep})", f"more than {MAX_DEPTH} parentheses"),
        (terms, terms + " OR good", f"more than {MAX_TERMS} comparisons"),
        (values, values + "  ", f"may have {MAX_LENGTH:,}"),
        (wildcards, wildcards + " OR text LIKE '%'", f"more than {MAX_WILDCARDS} of % and _"),
    ):
        rows_where(table, to_sql(parse(largest, SCHEMA)))
        with pytest.raises(DataError, match=limit):
            parse(larger, SCHEMA)


# ---- hostile texts ------------------------------------------------------------------------------

ATTACKS = [
    "1" + "+1" * 900 + ">0",
    "(" * 5000 + "good" + ")" * 5000,
    "NOT " * 2400 + "good",
    "NOT (" * 1600 + "good" + ")" * 1600,
    "good AND (" * 900,
    "-" * 9000 + "1 = year",
    "lpad('a',2147483647)='b'",
    "levenshtein(repeat('a',100000),repeat('b',100000))>0",
    "year > (SELECT max(year) FROM documents)",
    "EXISTS (SELECT 1)",
    "year = CAST('1' AS DOUBLE)",
    "CASE WHEN good THEN TRUE END",
    "good UNION SELECT 1",
    "good; DROP TABLE documents",
    "good -- ",
    "good /* */",
    "/*" * 4000,
    "text ~ '(a+)+$'",
    "regexp_like(text, '(a*)*b')",
    "text LIKE '" + "%a_" * 3000 + "'",
    "text SIMILAR TO 'a'",
    "text ILIKE 'a'",
    "year > 1" + "0" * 9000,
    "year > 1e" + "9" * 400,
    "year > 1e-" + "9" * 400,
    "year > 0x7fffffff",
    "year > 1_000",
    "year > NaN",
    "year > Infinity",
    "year > ²",
    "year > ١",
    "year / 0 = 1",
    "year % 2 = 0",
    "id = $1",
    "id = ?",
    "id = :name",
    "id = @x",
    "id = X'00'",
    "id = E'\\n'",
    "id = N'a'",
    "id = U&'\\0061'",
    "id = $$a$$",
    "id = 'a' 'b'",
    "id || id = 'a'",
    "id COLLATE C = 'a'",
    "documents.id = 'a'",
    "tokens[0] = 1",
    "image = ''",
    "_rowid = 1",
    "_distance < 1",
    "DATE '2020-01-01' < year",
    "INTERVAL '1 day' = year",
    "id = '" + "x" * 20_000 + "'",
    "id = '" + "''" * 4000 + "'",
    "id = '" + "''" * 4000,
    "`" * 9999,
    "\0" * 100,
    "\ud800" * 100,
    "id = '\udfff'",
    "ＮＯＴ good",
    "good\u00a0AND\u3000good",
    "🙂" * 2000,
    "\u202e doog",
    "{}",
    "*",
    "COUNT(*) > 0",
]
PIECES = [
    *"()'\"`,=<>!+-.*/%_?$;:@[]{}|&^~# \\\n\t\0",
    *"aZ0é漢😀²\u2028\u0131\ud800\udc00",
    "AND OR NOT IN LIKE BETWEEN IS NULL TRUE FALSE".split(),
    "SELECT CASE WHEN CAST EXISTS ANY ILIKE ESCAPE NaN INTERVAL".split(),
    ["--", "/*", "*/", "''", "<>", "$1", "1e999", "9" * 400, "0x1", "''''", "(((", ")))"],
    ["id", "text", "year", "good", "`like`", '"a""b"', "vector", "image", "_rowid", "other"],
]
PIECES = [p for piece in PIECES for p in (piece if isinstance(piece, list) else [piece])]


def mutation(rng) -> str:
    """A valid condition with one to four pieces put in, taken out, doubled or exchanged."""
    text, _ = random_condition(rng, rng.randint(0, 3))
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 3, 10]))
        middle = rng.choice(
            [
                rng.choice(PIECES),
                f" {rng.choice(PIECES)} ",
                "",
                text[start:end] * rng.randint(2, 5),
                text[rng.randrange(len(text) + 1) :][:20],
            ]
        )
        text = text[:start] + middle + text[end:]
    return text


def test_a_hostile_text_is_refused_or_runs(table, tally):
    """Whatever the text: an error of one line, or SQL that LanceDB accepts."""
    rng = random.Random(2)
    texts = ATTACKS + [mutation(rng) for _ in range(5000)]
    texts += ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(2000)]
    accepted, errors = set(), []
    for text in texts:
        try:
            condition = parse(text, SCHEMA)
        except DataError as error:
            errors.append(str(error))
            tally("Filters")["refused"] += 1
            continue
        sql = to_sql(condition)
        assert parse(sql, SCHEMA) == condition
        accepted.add(sql)
        tally("Filters")["accepted"] += 1
    for sql in sorted(accepted):
        table.count_rows(sql)
    assert 100 < len(accepted) < 3000
    for error in errors:
        assert len(error.splitlines()) == 1
        assert len(error.encode()) < 1000


# ---- where conditions are taken -----------------------------------------------------------------


def test_raw_sql_is_for_python_only(library):
    hits = library.search("number 3", 40, filter=RawSQL("upper(id) = 'D7' AND stamp IS NOT NULL"))
    assert [hit.id for hit in hits] == ["d7"]
    with pytest.raises(DataError, match=r"RawSQL\('yeer > 1'\): .*No field named yeer"):
        library.search("number 3", filter=RawSQL("yeer > 1"))
    pytest.importorskip("fastapi")
    pytest.importorskip("langchain_core")
    from rematch.search.langchain import ReMatchRetriever
    from rematch.serve.schemas import SearchRequest

    raw = RawSQL("upper(id) = 'D7'")
    (document,) = ReMatchRetriever(index=library, filter=raw).invoke("number 3")
    assert document.id == "d7"
    for spelling in ({"sql": "true"}, ["true"], repr(raw)):
        with pytest.raises((ValidationError, DataError)):
            ReMatchRetriever(index=library, filter=spelling).invoke("number 3")
        with pytest.raises((ValidationError, DataError)):
            library.condition(SearchRequest(text="a", filter=spelling).filter)
