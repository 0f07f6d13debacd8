"""Thousands of random damages: each is reported or changes no value, and none makes verification crash.

The counts are shown in the summary of the test run.
"""

import itertools
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common.data.chat_encoding import ChatEncoder
from common.errors import DecantError
from common.shards.manifest import published_shards, read_manifest, read_receipts, shard_path
from common.shards.parquet_shard import read_footer
from common.shards.token_order import classes_from_text
from precompute.config import PrecomputeConfig
from precompute.inspection.collect import inspect_output, open_target
from precompute.inspection.unpack import unpack_output
from precompute.logits.run import run_capture
from precompute.merge import merge_outputs
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import read_all_rows, read_published_files, rewrite_receipt, row_values
from train.data.sources import ShardSource

ROOT = Path(__file__).parents[3]

NUM_SHARDS = 3

CAPTURES: dict[str, dict[str, Any]] = {
    "best entries, q8": {"precision": "q8"},
    "drawn entries": {"top_k": 0, "num_draws": 10, "seed": 3},
    "pairs": {"kind": "dpo", "top_k": 4},
    "stored images": {"store_images": True},
}

Record = Callable[[str], None]
Changes = list[tuple[Path, Path | None]]


@pytest.fixture(scope="module")
def intact_outputs(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> dict[str, Path]:
    """Outputs with each kind of settings, of six samples in three shards."""
    outputs = {}
    for number, (name, settings) in enumerate(CAPTURES.items()):
        root = tmp_path_factory.mktemp(f"set-{number}")
        records = (preference_records if settings.get("kind") == "dpo" else conversation_records)(root, 6)
        config = make_config(root, llava_dir, records, samples_per_shard=2, **settings)
        # Without this, so few entries would have a single table.
        with patch("common.shards.token_order.ENTRIES_PER_TABLE", 40):
            run_capture(config, progress=False, start_teacher=FakeTeacher)
        outputs[name] = root / "out"
    return outputs


@pytest.fixture
def outputs(intact_outputs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: shutil.copytree(output, tmp_path / name) for name, output in intact_outputs.items()}


def read_everything(output: Path) -> list[Any]:
    """Returns all that readers take from an output: manifest, receipts, footers, and each row's values."""
    manifest = read_manifest(output)
    footers = [read_footer(shard_path(output, number)) for number in published_shards(output)]
    for footer in footers:
        # Some bits of zstd and base64 have no meaning, so decoded classes are compared.
        classes = classes_from_text(footer["token_classes"].encode(), manifest.tokenizer.vocab_size, "here")
        footer["token_classes"] = classes.tobytes().hex()
    return [
        manifest,
        read_receipts(output, manifest),
        footers,
        [list(row_values(row)) for row in read_all_rows(output)],
    ]


class DamagedOutput:
    """An output that is damaged and restored repeatedly; `counts` has the outcomes."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.files = read_published_files(output)
        self.counts: Counter[str] = Counter()
        self.expected = read_everything(output)

    def verify_and_restore(self, what: object) -> None:
        """Verifies the output, counts the outcome, and restores the files."""
        try:
            outcome = "harmless" if verify_logits(self.output, progress=False).ok else "reported"
        except DecantError as error:
            raise AssertionError(f"{what}: {error}") from error
        if outcome == "harmless":
            assert read_everything(self.output) == self.expected, f"{what}: passes, but has other values"
        self.counts[outcome] += 1
        for path in self.output.glob("shard-*"):
            if path.name not in self.files:
                path.unlink()
        for name, data in self.files.items():
            path = self.output / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)


def summarise(counts: Counter[str]) -> str:
    return f"{counts['reported']:,} reported, {counts['harmless']:,} without effect, 0 unnoticed, 0 crashes"


def choose_bit(rng: random.Random, files: dict[str, bytes]) -> tuple[str, int]:
    """Returns a random file and a random bit in it; every file is equally likely."""
    name = rng.choice(sorted(files))
    return name, rng.randrange(8 * len(files[name]))


def flip_bit(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURES)
def test_flipped_bits_are_reported_or_change_nothing(
    outputs: dict[str, Path], name: str, record_counts: Record
) -> None:
    """Flips 500 of 2,000 bits, anywhere in shards, receipts and manifest."""
    damaged, rng = DamagedOutput(outputs[name]), random.Random(name)
    for _ in range(500):
        file, bit = choose_bit(rng, damaged.files)
        (damaged.output / file).write_bytes(flip_bit(damaged.files[file], bit))
        damaged.verify_and_restore(f"bit {bit} of {file}")
    assert damaged.counts["reported"] > 400
    record_counts(f"500 flipped bits, {name}: {summarise(damaged.counts)}")


def read_by_every_command(output: Path, out: Path, llava_dir: Path) -> list[str]:
    """Reads an output by each command but verify-shards; returns the names of those that refuse it."""
    encoder = ChatEncoder.load(llava_dir)

    def train() -> None:
        source = ShardSource(output, encoder, "pad")
        for position in range(len(source)):
            source[position]

    readers: dict[str, Callable[[], object]] = {
        "inspect": lambda: check_problems(inspect_output(output, max_groups=None, progress=False).problems),
        "unpack": lambda: check_problems(unpack_output(open_target(output), out / "unpacked", progress=False).problems),
        "merge": lambda: merge_outputs([output], out / "merged", progress=False),
        "train": train,
    }
    refused = []
    for name, read in readers.items():
        try:
            read()
        except DecantError:
            refused.append(name)
    return refused


def check_problems(problems: Sequence[object]) -> None:
    if problems:
        raise DecantError(str(problems[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURES)
def test_flipped_bits_end_no_reader_otherwise_than_by_an_error(
    outputs: dict[str, Path], name: str, llava_dir: Path, tmp_path: Path, record_counts: Record
) -> None:
    """Flips 500 of 2,000 bits; each reader refuses the output or reads the values that were written.

    A signal, such as an exception of pyarrow that nobody catches, would end this process.
    """
    output, rng = outputs[name], random.Random(f"every command {name}")
    files = read_published_files(output)
    assert read_by_every_command(output, tmp_path / "intact", llava_dir) == []
    counts: Counter[str] = Counter()
    for number in range(500):
        file, bit = choose_bit(rng, files)
        (output / file).write_bytes(flip_bit(files[file], bit))
        refused = read_by_every_command(output, tmp_path / f"out-{number}", llava_dir)
        counts.update(refused)
        counts["read"] += 4 - len(refused)
        shutil.rmtree(tmp_path / f"out-{number}", ignore_errors=True)
        (output / file).write_bytes(files[file])
    assert min(counts[reader] for reader in ("inspect", "unpack", "merge", "train")) > 250
    record_counts(f"500 flipped bits, {name}, read by four commands: {dict(counts)}, 0 signals")


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURES)
def test_flipped_bits_behind_a_matching_receipt_are_reported_or_change_nothing(
    outputs: dict[str, Path], name: str, record_counts: Record
) -> None:
    """Pages have checksums, and the footer is compared with manifest and receipt."""
    damaged, rng = DamagedOutput(outputs[name]), random.Random(name)
    shards = {file: data for file, data in damaged.files.items() if file.endswith(".parquet")}
    for _ in range(100):
        file, bit = choose_bit(rng, shards)
        (damaged.output / file).write_bytes(flip_bit(shards[file], bit))
        rewrite_receipt(damaged.output, int(file[6:11]))
        damaged.expected[1] = read_receipts(damaged.output, read_manifest(damaged.output))
        damaged.verify_and_restore(f"bit {bit} of {file}")
    record_counts(f"100 flipped bits behind a matching receipt, {name}: {summarise(damaged.counts)}")


@pytest.mark.slow
def test_files_that_are_cut_short_are_reported(outputs: dict[str, Path], record_counts: Record) -> None:
    rng, counts = random.Random(0), Counter[str]()
    for output in outputs.values():
        damaged = DamagedOutput(output)
        for _ in range(50):
            file = rng.choice(sorted(damaged.files))
            length = rng.randrange(len(damaged.files[file]))
            (output / file).write_bytes(damaged.files[file][:length])
            damaged.verify_and_restore(f"{file} cut to {length} bytes")
        counts += damaged.counts
    # A JSON file may lose its last line break without effect.
    assert counts["reported"] >= 195
    record_counts(f"200 files cut short: {summarise(counts)}")


def rearrangements(output: Path, other: Path) -> Iterator[tuple[str, Changes]]:
    """Yields kinds of misplaced files: each file with the file that replaces it, None if it is removed."""
    kinds = {kind: [output / f"shard-0000{number}.{kind}" for number in range(NUM_SHARDS)] for kind in _KINDS}
    for files in kinds.values():
        for a, b in itertools.combinations(files, 2):
            yield "swapped", [(a, b), (b, a)]
        for file in files:
            yield "swapped with another output's", [(file, other / file.name)]
            yield "missing", [(file, None)]
            for name in ("shard-00007", "shard-000001", "shard-1", "shard-00001-copy"):
                yield "renamed", [(file, None), (file.with_name(name + file.suffix), file)]
        for a, b in itertools.permutations(files, 2):
            yield "duplicated", [(b, a)]
    for m, n in itertools.combinations(range(NUM_SHARDS), 2):
        yield "both files swapped", [(kinds[k][i], kinds[k][j]) for k in _KINDS for i, j in ((m, n), (n, m))]
    for number in range(NUM_SHARDS):
        yield "both files missing", [(files[number], None) for files in kinds.values()]
        past: Changes = [
            (files[number].with_name(f"shard-00007{files[number].suffix}"), files[number]) for files in kinds.values()
        ]
        yield "both files duplicated past the end", past
    yield "manifest missing", [(output / "manifest.json", None)]
    yield "manifest of another output", [(output / "manifest.json", other / "manifest.json")]


_KINDS = ("parquet", "json")


@pytest.mark.slow
def test_files_in_other_places_are_reported(outputs: dict[str, Path], record_counts: Record) -> None:
    counts: dict[str, Counter[str]] = {}
    first, *others = outputs.values()
    for output, other in zip([first, *others], [*others, first], strict=True):
        damaged, elsewhere = DamagedOutput(output), read_published_files(other)
        for kind, changes in rearrangements(output, other):
            for file, source in changes:
                if source is None:
                    file.unlink(missing_ok=True)
                else:
                    file.write_bytes((damaged.files if source.parent == output else elsewhere)[source.name])
            damaged.verify_and_restore(f"{kind}: {changes}")
            counts.setdefault(kind, Counter()).update(damaged.counts)
            damaged.counts.clear()
    for kind, found in counts.items():
        assert not found["harmless"], kind
        record_counts(f"{found.total()} times {kind}: {summarise(found)}")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from precompute.config import PrecomputeConfig
from precompute.inspection.collect import inspect_output, open_target
from precompute.inspection.unpack import unpack_output
from precompute.logits.run import run_capture
from tests.support.fake_teacher import FakeTeacher

config = PrecomputeConfig.model_validate_json(sys.argv[1])
rng = random.Random(0)
num_killed = num_completed = 0
while num_killed < int(sys.argv[2]):
    output = Path(f"{config.output}-{num_completed}")
    child = os.fork()
    if not child:
        own = config.model_copy(update={"output": output})
        run_capture(own, progress=False, start_teacher=lambda settings: FakeTeacher(settings, delay_s=0.02))
        os._exit(0)
    time.sleep(rng.uniform(0.02, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    num_killed += os.WIFSIGNALED(status)
    num_completed += os.WIFEXITED(status)
sys.stdout.write(f"{num_completed}")
"""


@pytest.mark.slow
def test_what_killed_runs_left_is_completed_with_the_same_bytes(
    tmp_path: Path, llava_dir: Path, record_counts: Record
) -> None:
    """Runs are killed at random moments one after the other; each published shard has the right bytes."""
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 10), samples_per_shard=2)
    undisturbed = config.model_copy(update={"output": tmp_path / "undisturbed"})
    run_capture(undisturbed, progress=False, start_teacher=FakeTeacher)
    expected = read_published_files(undisturbed.output)
    num_kills = 50
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, config.model_dump_json(), str(num_kills)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killer.returncode == 0, killer.stderr
    num_completed = int(killer.stdout)
    for number in range(num_completed + 1):
        own = config.model_copy(update={"output": Path(f"{config.output}-{number}")})
        complete_and_compare(own, expected, is_complete=number < num_completed)
    record_counts(
        f"{num_kills} SIGKILLs in {num_completed + 1} captures: each completed by reruns, with the bytes of one that "
        "was left alone"
    )


def complete_and_compare(config: PrecomputeConfig, expected: dict[str, bytes], *, is_complete: bool) -> None:
    """Checks that published shards have the expected bytes, and that a last run adds the missing ones."""
    for number in published_shards(config.output):
        path = shard_path(config.output, number)
        assert path.read_bytes() == expected[path.name]
    if not is_complete:
        run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert read_published_files(config.output) == expected
    assert verify_logits(config.output, config.dataset, progress=False).ok
