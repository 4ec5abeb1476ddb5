"""A path written as an override comes back as it was; what does not parse is told with its quoted form."""

from __future__ import annotations

import argparse
import random
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_ampo.config.compose import compose
from nemo_ampo.config.reading import read_config
from nemo_ampo.config.stages import BcConfig
from nemo_ampo.errors import ConfigError
from nemo_ampo.overrides import as_typed, literal, override, typed_path

PIECES = (*"\\${}\"'=,()#~ é新a/[]\t:@%|;*?!<>&^`-_.1e", "e\u0301", "${", "\\${", "\\\\", "null", "${run.seed}", "🎲")


def back(path: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(as_typed(override("run.dir", path), lambda key: True))
    return str(OmegaConf.create({"run": {"dir": parsed.value(), "seed": 1}}).run.dir)


def test_any_path_comes_back_as_it_was() -> None:
    draw = random.Random(20)
    for _ in range(700):
        path = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 9)))
        assert back(path) == (f"./{path}" if path.startswith("~") else path)
        assert OmegaConf.create({"a": literal(path), "run": {"seed": 1}}).a == path


@pytest.mark.parametrize("path", ["1e-4", "007", "2024_01", "nan", "null", "a/b", "run (2)", "-x", "a\\", "c:d", "été"])
def test_a_whole_configuration_holds_the_path(path: str, tmp_path: Path) -> None:
    given = [override(key, path) for key in ("run.dir", "run.init_from", "data.train", "data.heldout")]
    config = read_config(compose("bc", "tiny", given), BcConfig)
    assert (config.run.dir, config.run.init_from, config.data.train, config.data.heldout) == (path,) * 4


def test_a_text_key_keeps_what_reads_as_a_number() -> None:
    rest = ["run.init_from=x", "data.train=x", "data.heldout=x"]
    assert read_config(compose("bc", "tiny", ["run.dir=1e-4", *rest]), BcConfig).run.dir == "1e-4"
    assert compose("bc", "tiny", ["run.dir=x", "run.seed=7"]).run.seed == 7


@pytest.mark.parametrize(
    "path", ["DIR/lr=1e-4/run", "DIR/新加卷", "DIR/été", "DIR/run (2)", "DIR/a,b", "DIR/it's", 'a"b', "${..}", "${"]
)
def test_what_does_not_parse_is_told_with_the_form_to_use(path: str) -> None:
    try:
        cfg = compose("bc", "tiny", [f"run.dir={path}"])
    except ConfigError as error:
        name, _, cure = str(error).partition("quote the value: ")
        assert name.startswith(f"run.dir={path}: ")
        cfg = compose("bc", "tiny", shlex.split(cure))
    assert cfg.run.dir == path


@pytest.mark.parametrize("path", ["DIR/${x}", "$${x}", "${a.b}/c", "${no_such:1}", "${oc.env:NO_SUCH_VARIABLE}", "${.x}"])
def test_what_stands_for_nothing_is_told_with_the_form_to_use(path: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose("bc", "tiny", [f"run.dir={path}"])
    name, _, cure = str(told.value).partition("to mean it as it is: ")
    assert name.startswith("run.dir: ") and "\n" not in str(told.value)
    assert compose("bc", "tiny", shlex.split(cure)).run.dir == path


def test_what_stands_for_another_key_is_its_value() -> None:
    rest = ["run.init_from=x", "data.train=x", "data.heldout=x"]
    assert compose("bc", "tiny", ["run.dir=r/${run.seed}", "run.seed=7", *rest]).run.dir == "r/7"
    assert OmegaConf.is_missing(compose("bc", "tiny", []).run, "dir"), "what is missing is said where it is asked for"


def test_a_home_folder_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match=rf'^run\.dir=~/x: .*quote the value: .*"{Path.home()}/x"'):
        compose("bc", "tiny", ["run.dir=~/x"])
    with pytest.raises(ConfigError, match=r"^run\.dir: .*nothing here expands ~"):
        read_config(compose("bc", "tiny", ['run.dir="~/x"', "run.init_from=x", "data.train=x", "data.heldout=x"]), BcConfig)


@pytest.mark.parametrize("path", ["~", "~/x", "~nobody/x"])
def test_an_option_has_the_rule_of_an_override(path: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"^{path}: nothing here expands ~"):
        typed_path(path)
    assert typed_path(f"./{path}") == Path(".", path)
