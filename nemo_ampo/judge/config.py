"""How the judge is asked: a chat endpoint, a prompt and a schedule of tries."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from nemo_ampo.chat.config import EndpointConfig, check_endpoint_files
from nemo_ampo.prompts import load_prompt, require_judge_placeholders
from nemo_ampo.ranges import LARGEST_SEED, number


# Not frozen: OmegaConf makes an optional entry read-only while it still fills it.
@dataclass
class SecondJudgeConfig:
    """A judge for comparison; its scores are logged and never rewarded. All else is as for the first one.

    Attributes:
        base_url, model, api_key_env, headers: of its endpoint.
        prompt: as in :class:`JudgeConfig`; null takes the first judge's.
        every: it scores replies of every so many steps.
        samples: so many of each such step.
    """

    base_url: str
    model: str
    api_key_env: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    prompt: str | None = None
    every: int = number(10, least=1)
    samples: int = number(32, least=1)


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """The judge's endpoint, see :class:`~nemo_ampo.chat.config.EndpointConfig`, and what it is asked there.

    Attributes:
        prompt: shipped prompt name or the path of a file with the same placeholders.
        temperatures: sampling temperature of each try for a readable verdict; its length is the number of
            tries.
        seed: sent with the first try, one more with each further one; null sends none.
        explain_parse_error: the second try shows the judge its unreadable reply and why it cannot be read.
        second: another judge that scores some of the replies too, for comparison; null for none.
    """

    section: ClassVar[str] = "judge"

    prompt: str = "judge"
    temperatures: list[float] = number([0.0, 0.0, 1.0, 1.0, 1.0], least=0, most=2, whole=False)
    seed: int | None = number(None, least=0, most=LARGEST_SEED, whole=True)
    explain_parse_error: bool = True
    second: SecondJudgeConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("prompt", bool(self.prompt.strip()), "must not be empty")
        self._check("temperatures", len(self.temperatures) > 0, "must name at least one try")
        if self.second is not None:
            self.second_judge()

    def second_judge(self) -> JudgeConfig:
        """The second judge's settings: this judge's, but for the keys of :class:`SecondJudgeConfig`."""
        assert self.second is not None
        own = {name: getattr(self.second, name) for name in ("base_url", "model", "api_key_env", "headers")}
        own |= {"prompt": self.second.prompt or self.prompt, "endpoints": [], "second": None}
        return _SecondJudge(**{f.name: getattr(self, f.name) for f in fields(self)} | own)


@dataclass(frozen=True)
class _SecondJudge(JudgeConfig):
    section: ClassVar[str] = "judge.second"


def check_judge(config: JudgeConfig) -> None:
    """The files it names, which are to be asked for before a model is loaded.

    Raises:
        ConfigError: naming the key or the prompt.
    """
    check_endpoint_files(config)
    for prompt in (config.prompt, *([config.second_judge().prompt] if config.second else [])):
        require_judge_placeholders(load_prompt(prompt))
