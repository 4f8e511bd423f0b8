"""Custom evaluation data: rows, BEIR's layout, YAML, and their errors."""

import pytest
from shared_benchmarks import custom_data

from rematch.data.custom import load_custom
from rematch.data.instructions import instruct, instruction_table, read_table
from rematch.errors import DataError
from rematch.evaluate.benchmarks import load_benchmark


def test_custom_data_in_each_layout(tmp_path):
    custom_data(tmp_path)
    (shop, colours), left_out = load_custom(tmp_path / "shop.yaml")
    assert not left_out
    assert [shop.name, colours.name] == ["shop", "colours"]
    assert shop.queries[0].as_input() == {"text": "Find me: a red square"}
    pool, positives = shop.pool(0)
    assert positives == 1
    assert len(pool) == len(shop.documents) == 10, "without candidates, every document of the file"
    pool, positives = shop.pool(3)
    assert positives == 2
    assert [shop.documents[i].key for i in pool] == ["red", "red!", "grey"]
    assert shop.documents[0].instruction == "Represent the given image."
    assert len(colours.queries) == 2, "queries without judgements are left out"
    assert colours.documents[0].as_input()["text"] == "Red a colour"
    assert list(colours.answers[1]) == [1]
    (whole,), _ = load_custom(tmp_path / "shop.jsonl")
    (limited,), _ = load_custom(tmp_path / "shop.jsonl", limit=2)
    assert limited.queries == whole.queries[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "a"}', "needs 'query' and 'positives'"),
        ('{"query": "a", "positives": []}', "no positives"),
        ('{"query": "a", "positives": "b"}', "is not a list"),
        ('{"query": "a", "positives": ["no.png"]}', "names the picture"),
        ("", "holds no queries"),
    ],
)
def test_errors_in_rows_name_file_and_row(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        load_custom(tmp_path / "rows.jsonl")


def test_the_folder_where_one_is_has_its_own_name(tmp_path, monkeypatch):
    custom_data(tmp_path)
    monkeypatch.chdir(tmp_path / "my-beir")
    benchmark = load_benchmark(".")
    assert [benchmark.name, *(task.name for task in benchmark.tasks)] == ["my-beir", "my-beir"]


def test_errors_in_yaml_and_beir(tmp_path):
    custom_data(tmp_path)
    (tmp_path / "bad.yaml").write_text("tasks:\n  - nam: shop\n")
    with pytest.raises(DataError, match=r"bad\.yaml: tasks\.0\.name: Field required"):
        load_custom(tmp_path / "bad.yaml")
    entry = "  - {name: shop, data: shop.jsonl}\n"
    (tmp_path / "bad.yaml").write_text(f"tasks:\n{entry}{entry}")
    with pytest.raises(DataError, match=r"bad\.yaml: 2 tasks have the name 'shop'"):
        load_custom(tmp_path / "bad.yaml")
    (tmp_path / "my-beir/qrels/test.tsv").write_text("q0\tpurple\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:1: document 'purple' is not in corpus"):
        load_custom(tmp_path / "my-beir")
    (tmp_path / "my-beir/qrels/test.tsv").write_text("q0 red 1\n")
    with pytest.raises(DataError, match="between tabs"):
        load_custom(tmp_path / "my-beir")


def test_a_broken_entry_leaves_the_others_of_a_yaml_file(tmp_path):
    custom_data(tmp_path)
    with (tmp_path / "shop.jsonl").open("a") as stream:
        stream.write("{broken\n")
    source = str(tmp_path / "shop.yaml")
    with pytest.raises(DataError, match=r"shop cannot be loaded: .*shop\.jsonl:7: not valid JSON"):
        load_benchmark(source)
    benchmark = load_benchmark(source, skip_missing=True)
    assert [task.name for task in benchmark.tasks] == ["colours"]
    assert "shop.jsonl:7: not valid JSON" in benchmark.left_out["shop"]
    assert not load_benchmark(source, tasks=["colours"]).left_out


def test_queries_without_an_instruction_get_one_by_kind(tmp_path):
    custom_data(tmp_path)
    (shop,), _ = load_custom(tmp_path / "shop.jsonl")
    instruct(shop, instruction_table({"text-text": "Find a thing:"}))
    assert shop.queries[0].as_input()["text"] == "Find a thing: a red square"
    (shop_with_instruction, _), _ = load_custom(tmp_path / "shop.yaml")
    instruct(shop_with_instruction, instruction_table({}))
    assert shop_with_instruction.queries[0].as_input() == {"text": "Find me: a red square"}


def test_errors_in_a_table_of_instructions(tmp_path):
    path = tmp_path / "table.json"
    for content, message in (
        ("", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ('{"text": "a"}', "'text' is not the name of an instruction"),
        ('{"text-image": 1}', "is not text"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_table(path)
    path.write_text('{"text-image": "Find: "}')
    assert read_table(path) == {"text-image": "Find: "}
