import asyncio
from dataclasses import replace

import pytest

from nemo_ampo.chat.completion import Completion
from nemo_ampo.dialogue.agents import Agent, token_counter
from nemo_ampo.dialogue.config import LeaveRule, PartnerConfig, PolicyConfig
from nemo_ampo.dialogue.episode import EpisodeRules, leaves, new_episode, play, turn_seed
from nemo_ampo.dialogue.prompts import agent_instruction, load_texts, turn_line
from nemo_ampo.dialogue.records import EpisodeKey, Termination
from nemo_ampo.dialogue.scenarios import load_scenarios
from nemo_ampo.errors import ChatError
from nemo_ampo.reply.grammar import render_reply
from nemo_ampo.sotopia.records import EpisodeStore


class Script:
    """A chat endpoint that says its lines one after the other and remembers what it was asked."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.asked = []

    def question(self, messages, **how):
        return messages, how

    async def complete(self, question):
        self.asked.append(question)
        line = self.lines.pop(0) if self.lines else '"And so on."'
        if isinstance(line, Exception):
            raise line
        return line if isinstance(line, Completion) else Completion(line, prompt_tokens=7, completion_tokens=3)


KEY = EpisodeKey(3, "C3", "agent1", 1, "m")
PLAIN = PartnerConfig(base_url="http://127.0.0.1:1/v1", model="m")
THINKER = PolicyConfig(base_url="http://127.0.0.1:1/v1", model="m")


@pytest.fixture
def scenario(folder):
    return load_scenarios(folder).scenarios[3]


@pytest.fixture
def store(tmp_path):
    return EpisodeStore(tmp_path / "results")


def rules(**changes):
    return replace(EpisodeRules("sotopia", load_texts()), **changes)


def run(scenario, store, first, second=None, config=PLAIN, **changes):
    """Play from what the store has; both seats share a chat unless there are two."""
    begun = store.read(KEY)
    episode = begun.episode if begun else new_episode(KEY, scenario, "self_play", "sotopia")
    store.begin(episode)
    agents = {
        "agent1": Agent(config, first, token_counter(config)),
        "agent2": Agent(config, second or first, token_counter(config)),
    }
    played = asyncio.run(play(episode, scenario, agents, rules(**changes), store))
    assert store.read(KEY).episode == played
    return played


def test_the_seats_take_turns_and_are_shown_what_is_theirs(scenario, store):
    chat = Script('"One."', '"Two."', '"Three."')
    episode = run(scenario, store, chat, max_turns=3)
    assert [(t.index, t.seat, t.speaker, t.text) for t in episode.turns] == [
        (0, "agent1", "Ada Quill", "One."),
        (1, "agent2", "Bo Reed", "Two."),
        (2, "agent1", "Ada Quill", "Three."),
    ]
    assert episode.terminated_by is Termination.max_turns and episode.played
    ((messages, how),) = chat.asked[2:]
    lines = [turn_line(0, "Ada Quill", "One."), turn_line(1, "Bo Reed", "Two."), turn_line(2, "Ada Quill")]
    assert messages == [{"role": "user", "content": agent_instruction(scenario, "agent1", 2, lines)}]
    assert how["temperature"] == 0.7 and how["seed"] == turn_seed(KEY, 2) == episode.turns[2].seed
    assert episode.dialogue() == (
        'Turn 0: Ada Quill said: "One."\n\nTurn 1: Bo Reed said: "Two."\n\nTurn 2: Ada Quill said: "Three."'
    )


def test_twenty_utterances_and_no_more(scenario, store):
    episode = run(scenario, store, Script())
    assert [t.index for t in episode.turns] == list(range(20)) and episode.terminated_by is Termination.max_turns


def test_seeds_differ_by_turn_pairing_seat_and_seed():
    keys = [KEY, replace(KEY, seed=2), replace(KEY, seat="agent2"), replace(KEY, combo_id="C4")]
    assert len({turn_seed(key, turn) for key in keys for turn in range(20)}) == 80
    assert turn_seed(KEY, 0) == turn_seed(replace(KEY, model="other"), 0)  # so that two models meet the same draws


@pytest.mark.parametrize(
    ("words", "strict", "reference"),
    [
        ("left the conversation", True, True),
        ("Left the conversation.", True, True),
        ("*leave the conversation*", True, True),
        ("Please do not leave the conversation!", False, True),
        ("I have left the conversation", False, True),
        ("The conversation was left", False, False),
    ],
)
def test_the_two_rules_of_leaving(words, strict, reference, scenario, store):
    assert (leaves(words, LeaveRule.strict), leaves(words, LeaveRule.reference)) == (strict, reference)
    episode = run(scenario, store, Script('"Hi."', f'"{words}"', '"Bye."'), max_turns=3)
    assert (len(episode.turns), episode.terminated_by) == ((2, "left") if strict else (3, "max_turns"))


def test_modes_are_told_read_and_recorded(scenario, store):
    good = render_reply(2, '"Yes."', {"Intent": "i", "Style": "s", "Response": "Well."})
    draft = good[: good.index("<|end_of_thinking|>")]
    chat = Script(good, draft, Completion("Thinking Level: 3\n<|begin_of_thinking|>\nHistory:\nwe", finish_reason="length"))
    episode = run(scenario, store, chat, config=THINKER)
    assert [m["role"] for m in chat.asked[0][0]] == ["system", "user"]
    assert [(t.text, t.mode, t.failed) for t in episode.turns] == [
        ("Yes.", 2, None),
        ("Well.", 0, "tags"),
        ("left the conversation", 0, "silent"),
    ]
    assert episode.terminated_by is Termination.silent and episode.turns[2].finish_reason == "length"
    assert [t.raw for t in episode.turns][:2] == [good, draft]


def test_hidden_reasoning_is_kept_and_not_spoken(scenario, store):
    episode = run(scenario, store, Script(Completion('"Good day."', reasoning="I must not tell.")), max_turns=1)
    assert (episode.turns[0].text, episode.turns[0].reasoning) == ("Good day.", "I must not tell.")


def test_a_prompt_beyond_the_limit_ends_the_dialogue_unspoken(scenario, store):
    chat = Script(*['"' + "word " * 200 + '"'] * 20)
    episode = run(scenario, store, chat, max_prompt_tokens=1000)
    assert episode.terminated_by is Termination.prompt_limit and episode.played
    assert 0 < len(chat.asked) == len(episode.turns) < 5
    refused = ChatError("status", 'status 400: {"error": {"code": "context_length_exceeded"}}')
    other = EpisodeStore(store.folder / "other")
    assert run(scenario, other, Script('"Hi."', refused)).terminated_by is Termination.prompt_limit


def test_a_dead_endpoint_fails_the_episode_and_the_next_run_goes_on_from_there(scenario, store):
    chat = Script('"One."', ChatError("timeout", "no answer within 60 s"))
    episode = run(scenario, store, chat, max_turns=3)
    assert (episode.terminated_by, episode.played, len(episode.turns)) == (Termination.failed, False, 1)
    assert episode.error == "turn 1, agent2 (Bo Reed): no answer within 60 s"
    more = Script('"Two."', '"Three."')
    episode = run(scenario, store, more, max_turns=3)
    assert [t.text for t in episode.turns] == ["One.", "Two.", "Three."] and episode.error is None
    assert len(more.asked) == 2 and 'Ada Quill said: "One."' in more.asked[0][0][0]["content"]


def test_the_dial_and_the_nucleus_go_into_the_request(scenario, store):
    chat = Script()
    run(scenario, store, chat, config=replace(THINKER, mode_bias={1: -2.0, 4: 1.5}, top_p=0.9), max_turns=1)
    assert chat.asked[0][1]["extra_body"] == {"mode_bias": {"1": -2.0, "4": 1.5}, "top_p": 0.9}


def test_the_nucleus_is_always_sent_unless_the_body_is_told_otherwise(scenario, store):
    """A server would fill in what is missing from the checkpoint's generation_config.json."""
    chat, other = Script(), Script()
    run(scenario, store, chat, max_turns=1)
    assert chat.asked[0][1]["extra_body"] == {"top_p": 1.0}
    agent = Agent(replace(PLAIN, extra_body={"top_p": None}), other, len)
    asyncio.run(agent.speak("p", seed=1))
    assert other.asked[0][1]["extra_body"] == {}
