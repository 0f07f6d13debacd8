"""Every key of both configurations is given wrong values: each is a ConfigError that names the key, never a crash."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from common.config import StrictModel, load_config
from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

LONG = "'" + "x" * 5000 + "'"
# As written in TOML. A few are right for some keys: see ACCEPTED.
VALUES = (
    "true",
    '""',
    '"x"',
    '"1"',
    '"."',
    '"a\\u0000b"',
    LONG,
    '"s3://user:secret@bucket/x"',
    "nan",
    "inf",
    "-inf",
    "-1",
    "-0.5",
    "0",
    "1.0",
    "1.5",
    "9223372036854775808",
    "0x1" + "0" * 5000,
    "[]",
    "[1]",
    "[true]",
    '[""]',
    "[" * 30 + "]" * 30,
    "{}",
    "{zzz = 1}",
    "1979-05-27",
    "07:32:00",
    "1979-05-27T07:32:00Z",
)

# Kinds of keys, and which of VALUES each takes.
ACCEPTED: dict[str, set[str]] = {
    "count": set(),
    "count or 0": {"0"},
    "stage of ZeRO": {"0"},
    "share above 0": {"1.0"},
    "share below 1": {"0"},
    "share": {"0", "1.0"},
    "number above 0": {"1.0", "1.5"},
    "number": {"0", "1.0", "1.5"},
    "switch": {"true"},
    "choice": set(),
    "list of choices": set(),
    "path": {'"x"', '"1"', '"."', LONG},
    "output": {'"x"', '"1"', LONG},
    "date": {"1979-05-27"},
    "text": {'"x"', '"1"', '"."', '"a\\u0000b"', LONG, '"s3://user:secret@bucket/x"'},
    "free table": {"{}", "{zzz = 1}"},
    "table": {"{}"},
    "table with required keys": set(),
    "two numbers": set(),
    "layers": {"[1]"},
    "list of tables": set(),
    "not beside the others": set(),
    # It may be empty: no metrics but those of metrics.jsonl.
    "trackers": {"[]"},
    # Another temperature needs another tail.
    "temperature": {"1.0"},
    # Another weight needs pairs.
    "weight of pairs": {"0"},
}

CAPTURE_KEYS = {
    "kind": "choice",
    "teacher": "path",
    "dataset": "path",
    "image_root": "path",
    "follow_symlinks": "switch",
    "output": "output",
    "chat_template": "path",
    "chat_template_date": "date",
    "score": "choice",
    "image_aspect_ratio": "choice",
    "top_k": "count or 0",
    "top_p": "share above 0",
    "min_k": "count",
    "num_draws": "count",
    "precision": "choice",
    "store_images": "switch",
    "seed": "count or 0",
    "generate": "table",
    "generate.temperature": "number",
    "generate.top_p": "share above 0",
    "generate.num_samples": "count",
    "generate.max_new_tokens": "count",
    "samples_per_shard": "count",
    "max_tokens": "count",
    "ids": "choice",
    "on_bad_sample": "choice",
    "max_skipped": "share",
    "preflight": "switch",
    "num_loader_threads": "count",
    "num_nodes": "count",
    "node_rank": "count or 0",
    "engine": "table",
    "engine.dtype": "choice",
    "engine.tensor_parallel_size": "count",
    "engine.pipeline_parallel_size": "count",
    "engine.data_parallel_size": "count",
    "engine.gpu_memory_utilization": "share above 0",
    "engine.kv_cache_gib": "number above 0",
    "engine.max_num_seqs": "count",
    "engine.max_num_batched_tokens": "count",
    "engine.enforce_eager": "switch",
    "engine.capture": "choice",
    "engine.options": "free table",
    "ray": "table",
    "ray.address": "text",
    "ray.max_actors": "count",
    "ray.num_gpus": "number",
    "ray.num_cpus": "number above 0",
}

STAGE_KEYS = {
    "stage": "choice",
    "output": "output",
    "seed": "count or 0",
    "model": "table with required keys",
    "model.path": "path",
    "model.chat_template": "path",
    "model.chat_template_date": "date",
    "moe": "table",
    "moe.num_experts": "count",
    "moe.top_k": "count",
    "moe.layers": "layers",
    "moe.noise": "number",
    "data": "table with required keys",
    "data.shards": "path",
    "data.dataset": "not beside the others",
    "data.mix": "list of tables",
    "data.mix.0.shards": "path",
    "data.mix.0.dataset": "not beside the others",
    "data.mix.0.image_root": "path",
    "data.mix.0.features": "path",
    "data.mix.0.weight": "number above 0",
    "data.image_root": "path",
    "data.follow_symlinks": "switch",
    "data.features": "path",
    "data.image_aspect_ratio": "choice",
    "data.score": "choice",
    "data.ids": "choice",
    "data.preflight": "switch",
    "data.on_bad_sample": "choice",
    "data.max_skipped": "share",
    "data.max_tokens": "count",
    "data.validation": "path",
    "data.validation_fraction": "share below 1",
    "data.shuffle_window": "count",
    "data.num_workers": "count or 0",
    "data.batching": "choice",
    "data.group_by_length": "switch",
    "data.check": "choice",
    "loss": "table with required keys",
    "loss.distillation": "number",
    "loss.cross_entropy": "number",
    "loss.balance": "number",
    "loss.router_z": "number",
    "loss.preference": "weight of pairs",
    "loss.divergence": "choice",
    "loss.temperature": "temperature",
    "loss.tail": "choice",
    "loss.preference_type": "choice",
    "loss.beta": "number above 0",
    "loss.label_smoothing": "share below 1",
    "loss.length_normalised": "switch",
    "optim": "table with required keys",
    "optim.learning_rate": "number above 0",
    "optim.global_batch_size": "count",
    "optim.micro_batch_size": "count",
    "optim.epochs": "count",
    "optim.max_steps": "count",
    "optim.scheduler": "choice",
    "optim.warmup_ratio": "share below 1",
    "optim.weight_decay": "number",
    "optim.betas": "two numbers",
    "optim.eps": "number above 0",
    "optim.max_grad_norm": "number",
    "run": "table",
    "run.precision": "choice",
    "run.zero_stage": "stage of ZeRO",
    "run.expert_parallel_size": "count",
    "run.activation_checkpointing": "switch",
    "run.save_steps": "count",
    "run.keep_checkpoints": "count",
    "run.eval_steps": "count",
    "run.log_steps": "count",
    "run.resume": "choice",
    "run.report_to": "trackers",
    "run.max_loss_ratio": "number",
    "run.deepspeed": "path",
    "run.training_arguments": "free table",
    "trainable": "list of choices",
}

CAPTURE = "teacher = 'teacher'\ndataset = 'data.json'\noutput = 'out'\n"
STAGE = (
    "stage = 'dense-to-sparse'\noutput = 'out'\nmodel = {path = 'student'}\noptim.learning_rate = 1e-4\n"
    "[loss]\ndistillation = 1\ncross_entropy = 1\n"
)
CONFIGURATIONS: list[tuple[type[StrictModel], str, dict[str, str]]] = [
    (PrecomputeConfig, CAPTURE, CAPTURE_KEYS),
    (TrainConfig, f"{STAGE}[data]\nshards = 'scores'\n", STAGE_KEYS),
]


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields all keys of a configuration, with their tables."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        annotation = field.annotation
        found = [annotation, *getattr(annotation, "__args__", ())]
        for table in found:
            if isinstance(table, type) and issubclass(table, BaseModel):
                yield from keys_of(table, f"{prefix}{name}.{'0.' if name == 'mix' else ''}")


def override(key: str, value: str) -> str:
    """Returns the argument of --set; a key of the first set is set with the list that holds it."""
    table, _, name = key.rpartition(".")
    if table != "data.mix.0":
        return f"{key}={value}"
    other = "" if name == "shards" else "shards = 'scores', "
    return f"data.mix=[{{{other}{name} = {value}}}]"


@pytest.mark.parametrize(("schema", "text", "kinds"), CONFIGURATIONS)
def test_every_key_has_a_kind(schema: type[StrictModel], text: str, kinds: dict[str, str]) -> None:
    assert list(keys_of(schema)) == list(kinds)
    assert set(kinds.values()) <= set(ACCEPTED)
    del text


def test_a_wrong_value_of_any_key_is_a_config_error_that_names_the_key(
    tmp_path: Path, record_counts: Callable[[str], None]
) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "run.toml"
    for schema, text, kinds in CONFIGURATIONS:
        for key, kind in kinds.items():
            in_mix = key.startswith("data.mix.")
            path.write_text(text.replace("shards = 'scores'\n", "") if in_mix else text, "utf-8")
            for value in VALUES:
                try:
                    load_config(schema, path, [override(key, value)])
                except ConfigError as error:
                    assert value not in ACCEPTED[kind], f"{key} = {value}: {error}"
                    check_message(str(error), key, value)
                    outcomes["refused"] += 1
                else:
                    assert value in ACCEPTED[kind], f"{key} = {value} was accepted"
                    outcomes["accepted as documented"] += 1
    assert outcomes["refused"] >= 1500
    record_counts(f"{outcomes.total():,} wrong settings: " + ", ".join(f"{n:,} {name}" for name, n in outcomes.items()))


def check_message(message: str, key: str, value: str) -> None:
    assert key.rpartition(".")[2] in message, f"{key} = {value}: {message}"
    assert "secret" not in message
    assert max(map(len, message.splitlines())) < 700, f"{key} = {value}"


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("run.save_steps=true", "run.save_steps: expected a whole number, found True"),
        ("run.save_steps='1'", "run.save_steps: expected a whole number, found '1'"),
        (
            "run.save_steps=0x1" + "0" * 5000,
            "expected a number of at most 64 bits, found one of 20,001 bits",
        ),
        ("run.zero_stage=true", "run.zero_stage: expected a whole number, found True"),
        ("optim.learning_rate=nan", "optim.learning_rate: expected a finite number, found nan"),
        ("optim.learning_rate=true", "optim.learning_rate: expected a number, found True"),
        ("optim.betas=[0.9]", "optim.betas: expected a value at position 2, found [0.9]"),
        ("optim.betas=[0.9, 0.98, 0.999]", "optim.betas: expected a list of at most 2, found [0.9, 0.98, 0.999]"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: expected a number less than 1, found 1"),
        ("seed=-1", "seed: expected a number greater than or equal to 0, found -1"),
        ("seed=4294967296", "seed: expected a number less than or equal to 4294967295, found 4294967296"),
        ("trainable=[]", "trainable: expected a list of at least 1, found []"),
        ("data.mix=[]", "data.mix: expected a list of at least 1, found []"),
        ("data.features=[]", "data.features: expected a list of at least 1, found []"),
        ("moe.layers=[]", "or a list of at least 1, found []"),
        ("model.path=3", "model.path: expected a path, found 3"),
        ("model.path=", "model.path: expected a path or an address, found an empty one"),
        ("output=", "output: expected a path or an address, found an empty one"),
        ("output=.", "output: expected a directory of its own for the output, such as runs/first, found '.'"),
        ("run.training_arguments.when=1979-05-27", "run.training_arguments.when: "),
        ("run.training_arguments=" + "{a = " * 70 + "1" + "}" * 70, "expected at most 64 tables and lists within"),
        ("run.training_arguments." + "a." * 900 + "a=1", "expected at most 64 tables and lists within each other"),
        ("x" * 9000 + "=1", "x ...: unknown key; known keys: stage"),
        ("run.save_steps.x.y=1", "run.save_steps: expected a whole number, found a table"),
        ("stage.x=1", "stage is a value in the file, not a table"),
        ("stage." + "x" * 9000 + "=1", "stage is a value in the file, not a table"),
    ],
)
def test_what_is_wrong_with_an_override_is_said(tmp_path: Path, setting: str, line: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"{STAGE}[data]\nshards = 'scores'\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, [setting])
    assert line in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 100_000, "lists or tables are nested too deep"),
        (b"a = " + b"{a=" * 100_000, "lists or tables are nested too deep"),
        (b"a = " + b"1" * 5000, "not valid TOML: Exceeds the limit"),
        (b"a = 'x\0'", "not valid TOML: "),
        (b"\0", "not valid TOML: "),
        (b"a = '\xff'", "not valid TOML: 'utf-8' codec can't decode"),
        ("a = 'x'".encode("utf-16"), "not valid TOML: "),
        (b"a = 1\na = 2", "not valid TOML: "),
        (b"[a]\n[a]", "not valid TOML: "),
        (b"a = 1\na.b = 2", "not valid TOML: "),
        (b"a = 2024-13-45", "not valid TOML: "),
        (b"'" + b"x" * 5000, "not valid TOML: "),
        (b"x" * 5000, "not valid TOML: "),
        (b"a = 1979-05-27", "a: unknown key"),
        (b"a." * 900 + b"a = 1", "expected at most 64 tables and lists within each other"),
        (b"'a\\nb\x1b' = 1", "not valid TOML: "),
        (b'"a\\nb" = 1', "'a\\nb': unknown key"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_config_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert message in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 700


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(CAPTURE, "utf-8-sig")
    assert load_config(PrecomputeConfig, path).output == Path("out")


def test_a_recorded_configuration_with_empty_defaults_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"{STAGE}[data]\nshards = 'scores'\n", "utf-8")
    config = load_config(TrainConfig, path)
    recorded = config.model_dump(mode="json")
    assert recorded["data"]["mix"] == []
    assert TrainConfig.model_validate(recorded) == config


def test_a_line_break_in_an_override_begins_no_other_key(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(CAPTURE, "utf-8")
    assert load_config(PrecomputeConfig, path, ["output=1\nseed=2"]).output == Path("1\nseed=2")
