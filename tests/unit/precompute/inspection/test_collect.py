"""Every number of an inspection is compared with another program's, or with one computed by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.special
import tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import cli
from common.data.chat_encoding import load_tokenizer, tokenizer_sha256
from common.data.samples import ImageRef, Kind
from common.errors import ConfigError, ModelError, ProvenanceError, ShardError
from common.shards.manifest import TokenizerIdentity, read_manifest, shard_path
from common.shards.score_shard import ShardFile
from common.storage.files import Location, parse_location
from precompute.inspection import formatting, terminal
from precompute.inspection.collect import FOOTERS, Inspection, evenly_spaced, inspect_output, open_target
from precompute.inspection.statistics import ENTROPY, NUM_KEPT, StreamingDistribution, entropies
from precompute.inspection.unpack import unpack_output
from tests.support.builders import make_draws, make_scores
from tests.support.inspect_outputs import run_sql, write_known_output, write_output
from tests.support.models import tiny_tokenizer
from tests.support.object_store import BUCKET, Store
from tests.support.outputs import flip_bit, render_text, rewrite_receipt


def inspect(path: Location, **options: object) -> Inspection:
    return inspect_output(path, progress=False, **options)  # type: ignore[arg-type]


def render_inspection(inspection: Inspection, width: int = 100, max_tokens: int = 48) -> str:
    text = render_text(terminal.render_terminal(inspection, max_tokens=max_tokens), width)
    return "\n".join(line.rstrip() for line in text.splitlines())


def numbers_by_metric(inspection: Inspection) -> dict[str, tuple[float, ...]]:
    return {d.measure.name: (*d.quantiles, d.mean, d.num_values) for d in inspection.distributions}


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_distributions_are_those_of_duckdb_and_scipy(tmp_path: Path, kind: Kind, drawn: bool) -> None:
    capture = {"top_k": 0, "num_draws": 20} if drawn else {"top_k": 6}
    write_output(tmp_path / "out", kind, **capture)
    unpack_output(open_target(tmp_path / "out"), tmp_path / "lists", progress=False)
    found = numbers_by_metric(inspect(tmp_path / "out"))

    files = f"'{tmp_path}/lists/*.parquet'"
    prefixes = ("",) if kind == "kd" else ("chosen_", "rejected_")
    columns = {
        "own log-prob": "unnest({p}own_logprobs)",
        "kept mass": "1 - unnest({p}rest_mass)::double",
        "k": "len(unnest({p}topk_ids))",
        "scored tokens": "len({p}own_logprobs)",
        "length": "len({p}input_ids)",
    }
    queries = {
        name: " union all ".join(f"select {column.format(p=p)} as x from {files}" for p in prefixes)
        for name, column in columns.items()
    }
    if kind == "dpo":
        queries["margin"] = f"select chosen_logprob_sum - rejected_logprob_sum as x from {files}"
    levels = "[0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]"
    for name, query in queries.items():
        (answer,) = run_sql(f"select quantile_cont(x::double, {levels}), avg(x), count(*) from ({query})")
        assert found.pop(name) == pytest.approx((*answer[0], *answer[1:]), rel=1e-6, abs=1e-6), name

    rows = []
    for p in prefixes:
        lists = run_sql(f"select unnest({p}topk_logprobs), unnest({p}rest_mass) from {files}")
        rows += [scipy.special.entr([*np.exp(np.array(logprobs, np.float64)), rest]).sum() for logprobs, rest in lists]
    expected = (*np.quantile(rows, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]), np.mean(rows), len(rows))
    assert found.pop("entropy") == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not found


def test_a_histogram_holds_each_value_once(tmp_path: Path) -> None:
    write_output(tmp_path, top_k=6)
    for d in inspect(tmp_path).distributions:
        assert sum(d.counts) == d.num_values
        assert d.edges[0] <= d.quantiles[0]
        assert d.edges[-1] >= np.float32(d.quantiles[-1])
        assert len(d.edges) == len(d.counts) + 1 <= 37


def test_entropy_never_exceeds_that_of_the_whole_distribution() -> None:
    rng = np.random.default_rng(0)
    for scores in (make_scores(rng, 50, 8), make_draws(rng, 50, 30)):
        found = entropies(scores)
        assert (found >= 0).all()
        # The rest, spread over ten entries, adds rest * ln 10.
        stops = np.cumsum(scores.counts)
        for row, stop in enumerate(stops):
            probs = np.exp(scores.logprobs[stop - scores.counts[row] : stop].astype(np.float64))
            spread_out = scipy.special.entr([*probs, *[float(scores.rest_mass[row]) / 10] * 10]).sum()
            assert found[row] == pytest.approx(spread_out - float(scores.rest_mass[row]) * math.log(10), abs=1e-7)


def test_dropped_values_change_neither_ends_nor_mean_and_hardly_quantiles() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.exponential(1, 100_003)
    values = StreamingDistribution(ENTROPY, max_held=5000)
    for part in np.array_split(numbers, 97):
        values.add(part)
    found = values.distribution()
    assert found is not None
    assert (found.num_values, found.quantiles[0], found.quantiles[-1]) == (100_003, numbers.min(), numbers.max())
    assert found.mean == pytest.approx(numbers.mean(), rel=1e-9)
    # The tolerance is several standard errors of a quantile of 2,500 values.
    assert found.quantiles[1:-1] == pytest.approx(np.quantile(numbers, [0.05, 0.25, 0.5, 0.75, 0.95]), rel=0.2)
    assert 2500 <= sum(found.counts) <= 5000


def test_values_that_are_all_equal_have_one_bin() -> None:
    values = StreamingDistribution(ENTROPY)
    values.add(np.array([]))
    assert values.distribution() is None
    values.add(np.array([2.0, 2.0]))
    found = values.distribution()
    assert found is not None
    assert (found.edges, found.counts) == ((1.5, 2.5), (2,))


def test_bins_of_whole_numbers_have_a_whole_width() -> None:
    for low, high in ((3, 3), (0, 35), (0, 36), (5, 1000)):
        values = StreamingDistribution(NUM_KEPT)
        values.add(np.arange(low, high + 1))
        found = values.distribution()
        assert found is not None
        width = found.edges[1] - found.edges[0]
        assert all(edge % 1 == 0.5 for edge in found.edges)
        assert set(found.counts[:-1]) <= {width}
        assert sum(found.counts) == high - low + 1


def test_bytes_by_column_are_those_of_duckdb_and_add_up_to_the_files(tmp_path: Path) -> None:
    write_output(tmp_path)
    found = inspect(tmp_path)
    columns = {column.name: column.num_bytes for column in found.columns}
    answers = run_sql(
        f"select split_part(path_in_schema, ', ', 1), sum(total_compressed_size) "
        f"from parquet_metadata('{tmp_path}/*.parquet') group by 1"
    )
    footers = columns.pop(FOOTERS)
    assert columns == {name: int(num_bytes) for name, num_bytes in answers}
    num_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    assert footers + sum(columns.values()) == num_bytes == found.counts.num_bytes
    assert {c.name for c in found.columns if c.is_packed} == {name for name in columns if name.startswith("topk_")}
    # In the table, numbered columns are added up.
    bytes_by_name = {name: num_bytes for name, num_bytes, _, _ in formatting.column_rows(found)}
    assert bytes_by_name["topk_logprobs_0 to _3"] == sum(columns[f"topk_logprobs_{plane}"] for plane in range(4))
    assert len(bytes_by_name) == len(columns) + 1 - 3 - 3
    assert sum(bytes_by_name.values()) == num_bytes
    assert list(bytes_by_name.values()) == sorted(bytes_by_name.values(), reverse=True)


def test_positions_are_spread_evenly() -> None:
    assert evenly_spaced(10, None) == evenly_spaced(10, 10) == evenly_spaced(10, 11) == list(range(10))
    assert evenly_spaced(10, 0) == evenly_spaced(0, 5) == []
    assert evenly_spaced(10, 1) == [5]
    for count, limit in ((1000, 7), (9, 8), (100, 33)):
        positions = np.array(evenly_spaced(count, limit))
        assert len(positions) == limit
        gaps = np.diff(positions)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
        assert abs(positions[0] - (count - 1 - positions[-1])) <= 1


def test_the_number_of_row_groups_read_is_limited_and_shown(tmp_path: Path) -> None:
    write_output(tmp_path, num_samples=260, shard=130, top_k=3)
    part, whole = inspect(tmp_path, max_groups=2), inspect(tmp_path, max_groups=None)
    assert (part.counts.num_groups, part.counts.num_groups_read) == (6, 2)
    # Row groups 1 and 4 are read; the six have 64, 64, 2, 64, 64, 2 rows.
    assert part.counts.num_rows_read == 128
    assert part.counts.num_rows == whole.counts.num_rows == whole.counts.num_rows_read == 260
    assert part.columns == whole.columns
    assert "2 of 6 row groups: 128 rows, 1,024 scored tokens" in render_inspection(part)
    assert "all 6 row groups" in render_inspection(whole)


def test_a_known_sample_is_printed_as_computed_by_hand(tmp_path: Path) -> None:
    write_known_output(tmp_path)
    found = inspect(tmp_path)
    text = render_inspection(found, 80)
    # 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8 = 1.213; 1/2 ln 2 + 2/4 ln 4 = 1.040; -20 ln 2 = -13.863.
    assert text[text.index("sample one") :].splitlines() == [
        "sample one, position 0 in the dataset, shard 0",
        "user: A question?",
        "assistant: An answer.",
        "",
        "token log-prob entropy rank  the teacher's best",
        "7       -0.693   1.213  1/3 7·50.0%  8·25.0%  5·12.5%",
        "8       -0.693   1.040  1/2 8·50.0%  7·25.0%",
        "9      -13.863   0.000    - 8·100%",
    ]
    assert "shards                 1 of 1, complete" in text
    assert "skipped samples        2, by choice" in text
    assert ["k", "1", "1.1", "1.5", "2", "2.5", "2.9", "3", "2"] in map(str.split, text.splitlines())
    assert f"teacher weights  {'1' * 16}…" in text


def test_a_long_sample_is_cut_with_a_notice(tmp_path: Path) -> None:
    write_known_output(tmp_path, answer="word " * 200)
    text = render_inspection(inspect(tmp_path, max_tokens=2))
    assert "and 1 more scored tokens" in text
    assert "(400 more characters)" in text
    assert render_inspection(inspect(tmp_path), max_tokens=2) == text


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path: Path) -> None:
    write_known_output(tmp_path, sample_id="\x1b[2Jx", answer="a\x1b]0;b\x07\u202ec [bold]d[/bold]")
    text = render_inspection(inspect(tmp_path))
    assert "\\x1b[2Jx" in text
    assert "a\\x1b]0;b\\x07\\u202ec [bold]d[/bold]" in text
    assert "\x1b" not in text


def test_samples_are_found_by_id_and_by_position(tmp_path: Path) -> None:
    write_output(tmp_path, num_samples=150, shard=140, top_k=2)
    for wanted, index in (("s139", 139), ("139", 139), ("s70", 70), ("s140", 140), ("0", 0)):
        assert inspect(tmp_path, sample=wanted).samples[0].index == index
    for wanted in ("s150", "150", "-1", ""):
        with pytest.raises(ConfigError, match="holds sample"):
            inspect(tmp_path, sample=wanted)


def test_samples_are_the_first_row_and_others_evenly_spread(tmp_path: Path) -> None:
    write_output(tmp_path, num_samples=70, shard=32, top_k=2)
    assert [s.index for s in inspect(tmp_path, num_samples=8).samples] == [0, 4, 13, 21, 30, 39, 48, 56]
    assert [s.index for s in inspect(tmp_path, sample="s9", num_samples=2).samples] == [9, 17]


def test_tokens_have_the_scores_of_the_shard(tmp_path: Path) -> None:
    manifest = write_output(tmp_path, top_k=6)
    shard = ShardFile(shard_path(tmp_path, 1), manifest, 1)
    row = next(iter(shard))
    shard.close()
    (scored,) = row.conversations
    found = inspect(tmp_path, sample="s4", num_alternatives=6).samples[0]
    tokens = [token for span in found.conversations[0].spans for token in span]
    assert [len(span) for span in found.conversations[0].spans] == [3, 5]
    assert [t.token_id for t in tokens] == scored.encoded.response_ids.tolist()
    assert [t.position for t in tokens] == scored.encoded.response_positions.tolist()
    assert [t.own_logprob for t in tokens] == scored.scores.own_logprobs.tolist()
    assert [a.token_id for t in tokens for a in t.alternatives] == scored.scores.ids.tolist()
    probabilities = [a.probability for t in tokens for a in t.alternatives]
    assert probabilities == pytest.approx(np.exp(scored.scores.logprobs.astype(np.float64)))
    assert {a.draws for t in tokens for a in t.alternatives} == {None}


def test_without_kept_entries_only_own_log_probs_are_shown(tmp_path: Path) -> None:
    manifest = write_output(tmp_path, "dpo", num_samples=3, top_k=0)
    assert manifest.capture.max_kept == 0
    found = inspect(tmp_path)
    assert [d.measure.name for d in found.distributions] == ["own log-prob", "margin", "scored tokens", "length"]
    assert "no entries, the log-probs of the tokens alone" in render_inspection(found)


def test_an_output_under_way_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    write_output(tmp_path, num_shards=1)
    found = inspect(tmp_path)
    assert found.ok and found.counts.num_rows == 4
    assert "1 of 3, not complete yet" in render_inspection(found)
    write_output(tmp_path / "begun", num_shards=0)
    begun = inspect(tmp_path / "begun")
    assert begun.ok and not begun.samples
    assert "0 of 3, not complete yet" in render_inspection(begun)


def test_the_terminal_says_which_entries_are_kept(tmp_path: Path) -> None:
    write_output(tmp_path / "drawn", top_k=0, num_draws=20)
    assert "20 draws a token, seed" in render_inspection(inspect(tmp_path / "drawn"))
    write_output(tmp_path / "top_p", top_k=9, top_p=0.9, min_k=2)
    assert "from 2 to 9 best entries, until they hold 0.9" in render_inspection(inspect(tmp_path / "top_p"))


def test_no_other_sample_is_shown_in_place_of_one_that_cannot_be_read(tmp_path: Path) -> None:
    write_output(tmp_path)
    row_group = pq.read_metadata(shard_path(tmp_path, 1)).row_group(0)
    columns = {column["path_in_schema"]: column for column in row_group.to_dict()["columns"]}
    damaged = columns["rest_mass.list.element"]
    flip_bit(shard_path(tmp_path, 1), damaged["data_page_offset"] + damaged["total_compressed_size"] - 1)
    rewrite_receipt(tmp_path, 1)
    found = inspect(tmp_path, sample="s4", num_samples=3)
    assert found.samples == ()
    assert [Path(problem.path) for problem in found.problems] == [shard_path(tmp_path, 1)]
    assert found.counts.num_rows_read == 6


def test_one_shard_file_is_shown_alone(tmp_path: Path) -> None:
    write_output(tmp_path)
    found = inspect(shard_path(tmp_path, 1))
    assert (found.counts.num_rows, found.samples[0].index) == (4, 4)
    assert found.counts.num_bytes == shard_path(tmp_path, 1).stat().st_size
    assert "1 of 1, complete" in render_inspection(found)
    shard_path(tmp_path, 1).with_suffix(".json").unlink()
    with pytest.raises(ShardError, match="never finished"):
        inspect(shard_path(tmp_path, 1))


def test_damaged_shards_are_named_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_output(tmp_path, num_samples=12, shard=3)
    cut, gone, flipped = (shard_path(tmp_path, number) for number in (0, 1, 2))
    cut.write_bytes(cut.read_bytes()[:-40])
    gone.unlink()
    column = pq.read_metadata(flipped).row_group(0).column(0)
    data = bytearray(flipped.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 0x10
    flipped.write_bytes(bytes(data))
    rewrite_receipt(tmp_path, 2)
    found = inspect(tmp_path, num_samples=3)
    assert [Path(problem.path) for problem in found.problems] == [cut, gone, flipped]
    assert {s.shard for s in found.samples} == {3}
    assert found.counts.num_rows_read == 3
    text = render_inspection(found, 200)
    assert "4 of 4, complete; 2 of them cannot be read" in text
    assert all(str(path) in text for path in (cut, gone, flipped))

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["decant", "inspect-shards", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "shard-00002.parquet" in capsys.readouterr().out


def test_an_output_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    write_output(tmp_path)
    (tmp_path / "manifest.json").unlink()
    for path in (tmp_path, shard_path(tmp_path, 1)):
        with pytest.raises(ShardError, match=r"manifest\.json: does not exist"):
            inspect(path)


def test_token_texts_come_from_the_tokenizer_of_the_shards_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    sha256 = tokenizer_sha256(tokenizer)
    identity = TokenizerIdentity(sha256=sha256, vocab_size=len(tokenizer), template_sha256="4" * 64)
    write_known_output(tmp_path / "out", tokenizer=identity)
    found = inspect(tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    (span,) = found.samples[0].conversations[0].spans
    # Single bytes below 128 are text.
    assert [t.text for t in span] == [tokenizer.decode([i]) for i in (7, 8, 9)] == ["(", ")", "*"]

    write_known_output(tmp_path / "other")
    with pytest.raises(ProvenanceError, match=sha256):
        inspect(tmp_path / "other", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(ModelError, match="no such model directory"):
        inspect(tmp_path / "out", tokenizer=tmp_path / "nowhere")


def test_the_space_before_a_sentencepiece_token_is_shown(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(WordLevel({"<unk>": 0, "\u2581a": 5, "\u2581word": 7, "s": 8}, unk_token="<unk>"))
    words.decoder = tokenizers.decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tokenizer")
    sha256 = tokenizer_sha256(load_tokenizer(tmp_path / "tokenizer"))
    identity = TokenizerIdentity(sha256=sha256, vocab_size=10, template_sha256="4" * 64)
    write_known_output(tmp_path / "out", tokenizer=identity)
    (span,) = inspect(tmp_path / "out", tokenizer=tmp_path / "tokenizer").samples[0].conversations[0].spans
    # The tokenizer has no token 9.
    assert [token.text for token in span] == [" word", "s", "⟨9⟩"]


def test_json_says_what_the_terminal_says(tmp_path: Path) -> None:
    write_known_output(tmp_path, images=(ImageRef("a.png", b"12345"),))
    found = inspect(tmp_path)
    body = json.loads(json.dumps(formatting.to_dict(found)))
    assert body["manifest"] == read_manifest(tmp_path).model_dump(mode="json")
    assert body["counts"]["num_scored_tokens"] == 3 and body["counts"]["num_skipped"] == 2
    assert body["samples"][0]["images"] == [{"path": "a.png", "num_bytes": 5}]
    token = body["samples"][0]["conversations"][0]["spans"][0][1]
    assert token["rank"] == 1 and token["alternatives"][1]["token_id"] == 7
    assert {d["measure"]["name"]: d["mean"] for d in body["distributions"]}["k"] == 2


@pytest.mark.slow
def test_it_needs_no_engine_and_no_transformers(tmp_path: Path) -> None:
    write_known_output(tmp_path / "out")
    code = (
        "import sys; sys.argv = ['decant', 'inspect-shards', *sys.argv[1:]]; import cli, atexit\n"
        "atexit.register(lambda: print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules]))\n"
        "cli.main()"
    )
    arguments = [str(tmp_path / "out"), "--html", str(tmp_path / "a.html"), "--unpack", str(tmp_path / "lists")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(cli.__file__).parent,
        check=True,
    )
    assert done.stdout.strip().endswith("[]")
    assert (tmp_path / "a.html").is_file() and (tmp_path / "lists" / "shard-00000.parquet").is_file()


@pytest.mark.slow
def test_an_output_in_an_object_store_is_inspected_and_unpacked_like_a_local_one(tmp_path: Path, store: Store) -> None:
    remote = parse_location(f"s3://{BUCKET}/{tmp_path.name}")
    for output in (tmp_path / "out", remote):
        write_output(output, num_samples=640, shard=320, top_k=60)
    here, there = inspect(tmp_path / "out", num_samples=3), inspect(remote, num_samples=3)
    assert (here.counts, here.columns, here.distributions) == (there.counts, there.columns, there.distributions)
    assert here.samples == there.samples
    assert inspect(shard_path(remote, 1), max_groups=1).counts.num_rows_read == 64

    # Of ten row groups the first, for its first row, and one more; footers are read by themselves.
    store.clear()
    inspect(remote, max_groups=1)
    assert sum(request.num_received for request in store.requests) < here.counts.num_bytes

    for output, name in ((tmp_path / "out", "a"), (remote, "b")):
        assert unpack_output(open_target(output), tmp_path / name, progress=False).ok
    for number in (0, 1):
        assert pq.read_table(shard_path(tmp_path / "a", number)) == pq.read_table(shard_path(tmp_path / "b", number))
