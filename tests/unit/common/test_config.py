from pathlib import Path

import pytest

from common.config import StrictModel, digest, load_config
from common.errors import ConfigError


class Engine(StrictModel):
    dtype: str = "float32"
    memory: float = 0.9


class Run(StrictModel):
    name: str
    steps: int = 1
    sizes: tuple[int, ...] = ()
    engine: Engine = Engine()


def config_file(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, "utf-8")
    return path


def test_overrides_are_read_as_toml_and_else_as_bare_strings(tmp_path: Path) -> None:
    path = config_file(tmp_path, 'name = "a"\nsteps = 2\n')
    found = load_config(Run, path, ["steps=3", "engine.dtype=bfloat16", "sizes=[1, 2]", 'name="b=c"'])
    assert found == Run(name="b=c", steps=3, sizes=(1, 2), engine=Engine(dtype="bfloat16"))


def test_every_wrong_setting_is_listed_at_once(tmp_path: Path) -> None:
    path = config_file(tmp_path, 'stepz = 2\nsteps = "many"\n[engine]\ndtipe = "x"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    message = str(caught.value)
    assert all(part in message for part in (str(path), "4 setting", "name", "stepz", "steps", "engine.dtipe", "'many'"))


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
