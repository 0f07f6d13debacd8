"""Configuration files as a user writes them: what is read, and what is said of a wrong key or value."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, create_model, model_validator

from common.config import FROM_LIST, StrictModel, digest, load_config
from common.errors import ConfigError


class Engine(StrictModel):
    dtype: str = "float32"
    memory: float = 0.9
    cores: Annotated[int, Field(gt=0)] | Literal["all"] = "all"


class Source(StrictModel):
    shards: str | None = None
    dataset: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.shards is None) == (self.dataset is None):
            raise ValueError("give shards or dataset")
        return self


class Run(StrictModel):
    name: str
    steps: int = 1
    sizes: Annotated[tuple[int, ...], FROM_LIST] = ()
    engine: Engine = Engine()
    sources: Annotated[tuple[Source, ...], FROM_LIST] = ()

    @model_validator(mode="after")
    def _one_step_a_size(self) -> Self:
        if self.sizes and len(self.sizes) != self.steps:
            raise ValueError(f"steps = {self.steps}, but sizes has {len(self.sizes)}; give one size a step")
        return self


def config_file(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, "utf-8")
    return path


def test_overrides_are_read_as_toml_and_else_as_bare_strings(tmp_path: Path) -> None:
    path = config_file(tmp_path, 'name = "a"\nsteps = 1\n')
    found = load_config(Run, path, ["steps=2", "engine.dtype=bfloat16", "sizes=[1, 2]", 'name="b=c"'])
    assert found == Run(name="b=c", steps=2, sizes=(1, 2), engine=Engine(dtype="bfloat16"))


def error_lines(directory: Path, text: str) -> list[str]:
    """Returns the lines on single settings in the error that a file causes."""
    with pytest.raises(ConfigError) as caught:
        load_config(Run, config_file(directory, text))
    first, *lines = str(caught.value).splitlines()
    assert first == f"{directory / 'run.toml'}: {len(lines)} setting(s) are wrong"
    return [line.removeprefix("  ") for line in lines]


def test_every_wrong_setting_has_a_line(tmp_path: Path) -> None:
    lines = error_lines(tmp_path, 'stepz = 2\nsteps = "many"\n[engine]\ndtipe = "x"\n')
    assert lines == [
        "name: required, but not set",
        "steps: expected a whole number, found 'many'",
        "engine.dtipe: unknown key; did you mean engine.dtype?",
        "stepz: unknown key; did you mean steps?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine = {zzz = 1}", "engine.zzz: unknown key; known keys of engine: dtype, memory, cores"),
        ("zzz = 1", "zzz: unknown key; known keys: name, steps, sizes, engine, sources"),
        ("sources = [{shard = 'x'}]", "sources.0.shard: unknown key; did you mean sources.0.shards?"),
    ],
)
def test_an_unknown_key_names_the_nearest_or_all_known_ones(tmp_path: Path, text: str, line: str) -> None:
    assert error_lines(tmp_path, f'name = "a"\n{text}') == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps = 1.5", "steps: expected a whole number, found 1.5"),
        ("engine = 3", "engine: expected a table, found 3"),
        ("engine = {dtype = {}}", "engine.dtype: expected a string, found a table"),
        ("engine = {memory = 'all'}", "engine.memory: expected a number, found 'all'"),
        ("engine = {cores = 'some'}", "engine.cores: expected a whole number or 'all', found 'some'"),
        ("engine = {cores = 0}", "engine.cores: expected a number greater than 0 or 'all', found 0"),
        ("sizes = 'x'", "sizes: expected a list, found 'x'"),
        ("sizes = [1, 'x']", "sizes.1: expected a whole number, found 'x'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(tmp_path: Path, text: str, line: str) -> None:
    assert error_lines(tmp_path, f'name = "a"\n{text}') == [line]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    (line,) = error_lines(tmp_path, f'name = "a"\nsteps = "{"x" * 1000}"')
    assert line.startswith("steps: expected a whole number, found 'xxx")
    assert len(line.partition("found ")[2]) == 200


def test_the_keys_of_a_large_table_are_cut(tmp_path: Path) -> None:
    path = config_file(tmp_path, "zzz = 1")
    fields: dict[str, Any] = {f"key_{n}": (int, 0) for n in range(100)}
    schema = create_model("Large", __base__=StrictModel, **fields)
    with pytest.raises(ConfigError, match=r"zzz: unknown key; known keys: key_0, key_1, [^\n]{100,190} \.\.\.$"):
        load_config(schema, path)


def test_keys_that_contradict_each_other_are_named_without_their_tables(tmp_path: Path) -> None:
    assert error_lines(tmp_path, 'name = "a"\nsizes = [1, 2]') == ["steps = 1, but sizes has 2; give one size a step"]
    assert error_lines(tmp_path, 'name = "a"\nsources = [{}, {shards = "x", dataset = "y"}]') == [
        "sources.0: give shards or dataset",
        "sources.1: give shards or dataset",
    ]


def test_an_address_that_is_refused_is_not_repeated(tmp_path: Path) -> None:
    (line,) = error_lines(tmp_path, 'name = "a"\nsteps = "s3://user:secret@bucket/x"')
    assert "secret" not in line


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        load_config(Run, config_file(tmp_path, 'name = "a"\nsteps = \n'))


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(Run, tmp_path / "none.toml")


@pytest.mark.parametrize("override", ["steps", "=3", "engine.=3", "steps.x=3"])
def test_an_override_that_names_no_setting_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(Run, config_file(tmp_path, 'name = "a"\nsteps = 1'), [override])


def test_the_digest_is_of_content_and_not_of_spelling(tmp_path: Path) -> None:
    one = load_config(Run, config_file(tmp_path, 'name = "a"\n[engine]\nmemory = 0.9\n'))
    two = load_config(Run, config_file(tmp_path, 'steps = 1\nname = "a"'))
    assert digest(one) == digest(two)
    assert digest(one) != digest(Run(name="a", steps=2))
