"""The JSON: its fields, what it survives, and files that are refused."""

import json

import pytest

from optfactory.bench.results import FORMAT, Row, read_json, to_json
from optfactory.errors import ConfigError
from tests.bench.harness import assert_has_the_schema, every_kind, row


def test_the_json_has_a_fixed_schema():
    assert_has_the_schema(json.loads(to_json(every_kind())))


def test_figures_survive_their_file(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text(to_json(every_kind()), encoding="utf-8")
    assert read_json(file) == every_kind()


def test_groups_follow_the_order_of_measurement_and_include_empty_cases():
    groups = every_kind().groups()
    assert list(groups) == [("large", "float32"), ("small", "float32")]
    assert [row.optimizer for row in groups["small", "float32"]] == ["lamb"]
    figures = every_kind()
    figures.rows = [row("lamb", case="gpt2")]
    assert list(figures.groups()) == [("gpt2", "float32"), ("small", "float32")]
    assert figures.groups()["small", "float32"] == []


def test_the_limit_follows_from_time_and_multiple():
    limit: Row = row("adamw8bit", ns_per_param=3.0, times_limit=1.5)
    assert limit.limit == 2.0


def test_a_bandwidth_seen_later_counts_for_all_rows_and_a_lower_one_for_none():
    figures = every_kind()
    figures.raise_bandwidth(80e9, 2**30)
    figures.raise_bandwidth(60e9, 2**30)
    assert figures.bandwidth == 80e9
    assert [row.times_limit for row in figures.rows[:2]] == [2.0, 3.5]
    assert figures.rows[0].limit == every_kind().rows[0].limit / 2


def test_no_step_that_moves_far_more_than_the_caches_hold_beats_the_limit():
    figures = every_kind()  # rows move 28 MB, the fastest in 0.69 ms
    figures.raise_bandwidth(40e9, 28_000_000 // 16)
    assert figures.bandwidth == 40e9
    figures.raise_bandwidth(40e9, 28_000_000 // 16 - 1)
    assert figures.bandwidth == pytest.approx(28e6 / 0.69e-3)
    assert all(row.best_ms >= 28e6 / figures.bandwidth for row in figures.rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("rows"),
        lambda values: values.pop("bandwidth"),
        lambda values: values["rows"][0].pop("ms"),
        lambda values: values["rows"][0].update(colour="red"),
        lambda values: values.update(colour="red"),
        lambda values: values.update(memory=7),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, change):
    values = json.loads(to_json(every_kind()))
    change(values)
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"figures\.json holds no figures"):
        read_json(file)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", None])
def test_a_file_without_figures_is_refused(tmp_path, text):
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"figures\.json holds no figures"):
        read_json(file)


def test_a_newer_format_is_refused(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text(to_json(every_kind()).replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ConfigError, match="has format 99, and this version of optfactory reads"):
        read_json(file)
